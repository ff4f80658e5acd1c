"""The benchmark of a training step: all sides train alike, and one that does not is not timed."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import ranking, sides, train_step
from benchmarks.rounds import Round
from benchmarks.sides import Case, first_steps, side_process
from train.utils.errors import UserError

# The names, layouts and methods of nanoGPT's model.py, as far as the benchmark knows of them.
STAND_IN = """
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn import functional as F

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768

class Part(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, self.heads = config.n_embd, config.n_head
        blocks = [
            Part(
                ln_1=nn.LayerNorm(width),
                attn=Part(c_attn=nn.Linear(width, 3 * width), c_proj=nn.Linear(width, width)),
                ln_2=nn.LayerNorm(width),
                mlp=Part(c_fc=nn.Linear(width, 4 * width), c_proj=nn.Linear(4 * width, width)),
            )
            for _ in range(config.n_layer)
        ]
        self.transformer = Part(
            wte=nn.Embedding(config.vocab_size, width),
            wpe=nn.Embedding(config.block_size, width),
            h=nn.ModuleList(blocks),
            ln_f=nn.LayerNorm(width),
        )
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        print("number of parameters: many")

    def forward(self, ids, targets):
        hidden = self.transformer.wte(ids) + self.transformer.wpe.weight[: ids.shape[1]]
        for block in self.transformer.h:
            parts = block.attn.c_attn(block.ln_1(hidden)).chunk(3, dim=-1)
            heads = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
            attended = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
            hidden = hidden + block.attn.c_proj(attended)
            hidden = hidden + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(hidden))))
        logits = self.lm_head(self.transformer.ln_f(hidden))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        print("using fused AdamW: False")
        matrices = [p for p in self.parameters() if p.dim() >= 2]
        vectors = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas)
"""


@pytest.fixture
def case(tmp_path: Path) -> Case:
    (tmp_path / "model.py").write_text(STAND_IN)
    return Case("tiny", block=16, batch=2, device="cpu", nanogpt=tmp_path)


def warm_up(built: dict[str, sides.Side], case: Case) -> str:
    return sides.check_same({name: sides.warm_up(side, case) for name, side in built.items()})


def losses(said: str) -> dict[str, list[float]]:
    return {line.split(": ")[0]: [float(word) for word in line.split()[1:]] for line in said.splitlines()[1:]}


@pytest.mark.slow
def test_all_sides_train_alike(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["hf-eager", "hf-sdpa", "baseline", "uncompiled", "nanogpt"]
    built = {name: sides.build(f"{name}:float32", case) for name in names}
    assert capsys.readouterr().out == ""
    assert [built[name].padding for name in names] == [0, 0, 0, 0, 47]
    found = losses(warm_up(built, case))
    assert found["baseline"] == pytest.approx(found["hf-eager"], rel=1e-5)
    assert found["nanogpt"] == pytest.approx([loss + 47 / 50257 for loss in found["hf-eager"]], abs=5e-4)
    assert found["hf-eager"][0] - found["hf-eager"][-1] > 1.0, "later losses have to show the updates"
    assert built["baseline"].optimizer.defaults["fused"] is None
    assert built["uncompiled"].optimizer.defaults["fused"] is True


def test_a_side_that_trains_otherwise_is_not_timed(case: Case) -> None:
    built = {name: sides.build(f"{name}:float32", case) for name in ("hf-sdpa", "uncompiled")}
    for group in built["uncompiled"].optimizer.param_groups:
        group["lr"] *= 1.1
    with pytest.raises(SystemExit, match="uncompiled does not train as hf-sdpa does"):
        warm_up(built, case)


def test_a_side_names_its_precision_or_takes_the_common_one() -> None:
    asked = ["baseline", "optimized", "hf-sdpa:float32"]
    assert [sides.resolve_name(side, "bfloat16") for side in asked] == [
        "baseline:float32", "optimized:bfloat16", "hf-sdpa:float32",
    ]  # fmt: skip
    for wrong in ("fastest", "optimized:int8"):
        with pytest.raises(UserError, match=f"--sides {wrong}: choose from baseline, "):
            sides.resolve_name(wrong, "float32")


def test_nanogpt_needs_its_checkout(tmp_path: Path) -> None:
    for folder, message in ((None, "name its folder with --nanogpt"), (tmp_path, "there is no model.py in it")):
        with pytest.raises(UserError, match=message):
            sides.build("nanogpt:float32", Case("tiny", 16, 1, "cpu", folder))


def test_bf16_is_autocast(case: Case) -> None:
    side = sides.build("uncompiled:bfloat16", case)
    wide = sides.build("uncompiled:float32", case)
    assert {parameter.dtype for parameter in side.model.parameters()} == {torch.float32}
    found = losses(warm_up({"wide": wide, "half": side}, case))
    assert found["half"] != found["wide"]


def test_the_table_of_a_run(case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    argv = "train_step --size tiny --block 16 --rounds 2 --threads 1 --sides hf-sdpa uncompiled"
    monkeypatch.setattr(sys, "argv", argv.split())
    train_step.main()
    header, _, *rows = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert [cell.strip() for cell in header.split("|")[1:3]] == ["side", "step (s)"]
    assert [row.split("|")[1].strip() for row in rows] == ["hf-sdpa:float32", "uncompiled:float32"]
    own = [Round(2.0, 3.0), Round(4.0, 3.0)]
    assert train_step.row("uncompiled:float32", case, own, own)[1:] == [  # 2 x 16 tokens in 3 seconds
        "3.000 (2.000 to 4.000)", "11", "1.00 (1.00 to 1.00)", "1.00", "1.00", "",
    ]  # fmt: skip


def test_a_side_that_fails_in_its_process_says_why(tmp_path: Path) -> None:
    with side_process(threads=1) as process, pytest.raises(UserError, match="there is no model"):
        process.submit(first_steps, "nanogpt:float32", Case("tiny", 16, 1, "cpu", tmp_path)).result()


def test_operators_are_ranked_by_their_own_time() -> None:
    events = [
        SimpleNamespace(key=key, input_shapes=shapes, count=2, self_cpu_time_total=taken)
        for key, shapes, taken in (
            ("aten::mm", [[8, 768], [768, 50257]], 3000.0),
            ("aten::mm", [[8, 768], [768, 768]], 1000.0),
            ("aten::addmm", [[768], [8, 768], [768, 768]], 4000.0),
            ("aten::copy_", [[8, 768], [8, 768], []], 2000.0),
        )
    ]
    assert ranking.ranking(events, "self_cpu_time_total", steps=2, top=2) == [
        ["addmm, blocks", "2.0", "40.0%", "1"],
        ["mm, vocabulary", "1.5", "30.0%", "1"],
        ["2 others", "1.5", "30.0%", "2"],
        ["all", "5.0", "100.0%", "4"],
    ]


@pytest.mark.slow
def test_compiled_sides_train_alike_too(case: Case) -> None:
    """The compiled ones with activation checkpointing are those of tests/test_compile.py."""
    names = ["hf-compiled", "optimized", "nanogpt-compiled"]
    found = losses(warm_up({name: sides.build(f"{name}:float32", case) for name in names}, case))
    assert found["optimized"] == pytest.approx(found["hf-compiled"], rel=1e-5)


@pytest.mark.slow
def test_the_ranking_of_a_side(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    argv = "ranking uncompiled --size tiny --block 16 --steps 1 --most 40"
    monkeypatch.setattr(sys, "argv", argv.split())
    ranking.main()
    said = capsys.readouterr().out
    assert "mm, vocabulary" in said
    assert "_fused_adamw_" in said
