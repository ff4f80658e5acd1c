"""Documents in one sequence: their positions, and that they do not see each other, in any layout."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from modeling_gpt2flash import GPT2FlashForCausalLM
from modeling_gpt2flash.documents import document_bounds
from tests.conftest import ROOT, check_parity, losses, ranks, train
from train.data.batches import EvalBatches, TrainBatches, document_positions
from train.data.token_file import open_tokens
from train.data.tokenizer import END_OF_TEXT

E = END_OF_TEXT
BLOCK = 32


def test_positions_restart_after_each_end_of_text() -> None:
    input_ids = np.array([[7, 8, E, 9, E, E, 5, 6], [E, 1, 2, 3, 4, 5, 6, E], [1, 2, 3, 4, 5, 6, 7, 8]])
    expected = [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 7]]
    found = document_positions(input_ids.astype(np.uint16))
    assert found.tolist() == expected
    assert found.dtype == np.int64
    assert document_positions(np.array([[E]])).tolist() == [[0]]


def test_bounds_are_those_of_the_documents() -> None:
    input_ids = np.array([[7, 8, E, 9, E, E, 5, 6], [E, 1, 2, 3, 4, 5, 6, 7]])
    bounds = document_bounds(torch.from_numpy(document_positions(input_ids)) == 0)
    assert bounds.tolist() == [0, 3, 5, 6, 8, 9, 16]
    assert bounds.dtype == torch.int32
    assert document_bounds(torch.arange(4).expand(3, 4) == 0).tolist() == [0, 4, 8, 12]


@pytest.mark.parametrize("seed", range(20))
def test_bounds_and_positions_say_the_same(seed: int) -> None:
    random = np.random.default_rng(seed)
    input_ids = random.choice([E, 1, 2], size=(random.integers(1, 5), random.integers(1, 40)))
    position_ids = torch.from_numpy(document_positions(input_ids))
    bounds = document_bounds(position_ids == 0)
    lengths = bounds.diff()
    assert lengths.min() >= 1
    assert lengths.max() == position_ids.max() + 1
    assert torch.cat([torch.arange(length) for length in lengths]).tolist() == position_ids.flatten().tolist()
    first_in_a_row = torch.arange(0, position_ids.numel(), input_ids.shape[1])
    behind_an_end = torch.from_numpy(input_ids.flatten()[:-1] == E).nonzero().flatten() + 1
    assert set(bounds[:-1].tolist()) == {*first_in_a_row.tolist(), *behind_an_end.tolist()}


def test_batches_give_positions_only_when_asked(documents: Path) -> None:
    tokens = open_tokens(documents / "train.bin", 50257)
    plain, masked = (TrainBatches(tokens, BLOCK, 4, 1, mask).micro_batch(2, 0, 0, 1, 4) for mask in (False, True))
    assert plain.keys() == {"input_ids", "shift_labels"}
    assert masked.keys() == {*plain, "position_ids", "cu_seq_lens"}
    assert all(torch.equal(masked[key], plain[key]) for key in plain)
    assert masked["position_ids"].tolist() == document_positions(plain["input_ids"].numpy()).tolist()
    assert torch.equal(masked["cu_seq_lens"], document_bounds(masked["position_ids"] == 0))
    assert len(masked["cu_seq_lens"]) > 4 + 1, "there are documents to keep apart"


def test_evaluation_pads_with_documents_that_nobody_sees(documents: Path) -> None:
    tokens = open_tokens(documents / "val.bin", 50257)
    batches = EvalBatches(tokens, BLOCK, document_mask=True)
    last = batches.micro_batch(batches.blocks - 1, 0, 1, 3)
    assert last["position_ids"].shape == last["position_ids"].shape == (3, BLOCK)
    assert last["position_ids"].tolist() == document_positions(last["input_ids"].numpy()).tolist()
    assert (last["shift_labels"][1:] == -100).all()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_document_changes_no_loss_but_its_own(small_model: Path, documents: Path, attention: str) -> None:
    """Through the batches as the loop takes them: all but the losses at the changed document's own tokens stay."""
    model = GPT2FlashForCausalLM.from_pretrained(small_model, attn_implementation=attention).eval()
    batch = TrainBatches(open_tokens(documents / "train.bin", 50257), BLOCK, 4, 1, True).micro_batch(0, 0, 0, 1, 4)

    def token_losses(input_ids: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits = model(input_ids=input_ids, use_cache=False, **more).logits
        return F.cross_entropy(logits.transpose(1, 2), batch["shift_labels"], reduction="none")

    positions = {"position_ids": batch["position_ids"]}
    before = token_losses(batch["input_ids"], **positions)
    bounds = batch["cu_seq_lens"].tolist()
    changed = 0
    for start, end in itertools.pairwise(bounds):
        others = batch["input_ids"].clone()
        own = torch.zeros(others.numel(), dtype=torch.bool)
        own[start:end] = True
        text = own.view_as(others) & (others != E)
        if not text.any():
            continue
        others[text] = (others[text] + 1) % E
        after = token_losses(others, **positions)
        assert torch.equal(after[~own.view_as(others)], before[~own.view_as(others)])
        assert not torch.equal(after[own.view_as(others)], before[own.view_as(others)])
        row_end = (start // BLOCK + 1) * BLOCK
        if end < row_end:  # a document follows: without the mask it would have seen this one
            leaked = (token_losses(others) - token_losses(batch["input_ids"])).flatten()[end:row_end]
            assert leaked.abs().max() > 1e-6
            changed += 1
    assert changed >= 4


@pytest.fixture(scope="module")
def masked(flags: list[str], documents: Path) -> list[str]:
    data = [f"--train_data_path={documents}/train.bin", f"--val_data_path={documents}/val.bin"]
    return [*flags, *data, "--document_mask", "--eval_interval=4", "--save_interval=4", "--mixed_precision=no"]


@pytest.fixture(scope="module")
def masked_run(masked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masked")
    train(*masked, f"--checkpoint_path={folder}", cwd=folder)
    return folder / "baseline"


@pytest.mark.slow
def test_validation_is_of_single_documents(masked_run: Path, documents: Path) -> None:
    """The run's validation loss against the same model given each document by itself, which needs no mask."""
    model = GPT2FlashForCausalLM.from_pretrained(masked_run).eval()
    ids = torch.from_numpy(np.fromfile(documents / "val.bin", dtype=np.uint16).astype(np.int64))
    nll = 0.0
    for start in range(0, len(ids) - 1, BLOCK):
        window, labels = ids[start : start + BLOCK + 1][:-1], ids[start : start + BLOCK + 1][1:]
        bounds = document_bounds(torch.from_numpy(document_positions(window[None].numpy())) == 0)
        lengths = bounds.diff().tolist()
        for text, following in zip(window.split(lengths), labels.split(lengths), strict=True):
            with torch.no_grad():
                nll += F.cross_entropy(model(text[None]).logits[0], following, reduction="sum").item()
    summary = json.loads((masked_run / "metrics.json").read_text())
    assert summary["val_loss"] == pytest.approx(nll / (len(ids) - 1), abs=1e-5)


@pytest.mark.slow
def test_a_resume_without_the_mask_is_refused(masked: list[str], masked_run: Path, tmp_path: Path) -> None:
    unmasked = [flag for flag in masked if flag != "--document_mask"]
    resume = [f"--resume_from_checkpoint={masked_run}/step-4", f"--checkpoint_path={tmp_path}"]
    done = train(*unmasked, *resume, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "was trained with document_mask True, and this run has False" in done.stderr
    train(*masked, *resume, cwd=tmp_path)
    assert losses(tmp_path / "baseline") == losses(masked_run)


@pytest.fixture(scope="module")
def masked_in_bf16(masked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masked_in_bf16")
    bf16 = ["--mixed_precision=bf16", "--attn_implementation=sdpa"]
    train(*masked, *bf16, f"--checkpoint_path={folder}", cwd=folder)
    return folder / "baseline"


@pytest.mark.slow
@pytest.mark.parametrize("stages", [1, 2])
def test_flash_kernels_train_on_single_documents(
    masked: list[str], masked_run: Path, masked_in_bf16: Path, tmp_path: Path, stages: int
) -> None:
    """auto takes the kernel, every call of it is told the bounds, and only the rounding of bf16 is different."""
    flags = [*masked, "--mixed_precision=bf16", "--attn_implementation=auto", f"--checkpoint_path={tmp_path}"]
    if stages == 2:
        settings = json.loads((ROOT / "ds_configs" / "pipeline.json").read_text())
        settings["pipeline"] |= {"partition": [2, 3]}
        (tmp_path / "ds.json").write_text(json.dumps(settings))
        pipeline = [f"--deepspeed_config={tmp_path}/ds.json", f"--pipeline_stages={stages}"]
        flags += ["--run_type=optimized", *pipeline]
        flags += ["--gradient_accumulation_steps=2", "--train_micro_batch_size_per_gpu=2"]
    done = ranks("flash_attention_2", *flags, cwd=tmp_path, processes=stages, module="tests.flash_stubs")
    assert "attention: flash_attention_2" in done.stdout
    # 8 steps (of 2 micro-batches in a pipeline) and 2 validations of 8 batches (16), 2 layers (1 a stage).
    assert done.stdout.count("flash_attention_2: 48 calls with bounds of documents") == stages
    assert "no bounds" not in done.stdout
    run = tmp_path / ("baseline" if stages == 1 else "optimized")
    assert losses(run) == pytest.approx(losses(masked_in_bf16), abs=2e-3)
    assert losses(run) == pytest.approx(losses(masked_run), abs=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "own",
    [
        ["--deepspeed_config=ds_configs/zero2.json", "--train_micro_batch_size_per_gpu=2"],
        [
            "--deepspeed_config=ds_configs/pipeline.json",
            "--pipeline_stages=2",
            "--gradient_accumulation_steps=2",
            "--train_micro_batch_size_per_gpu=2",
        ],
    ],
    ids=["zero2", "pipeline"],
)
def test_layouts_agree(masked: list[str], masked_run: Path, tmp_path: Path, own: list[str]) -> None:
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    done = ranks(*masked, *own, "--run_type=optimized", f"--checkpoint_path={tmp_path}", cwd=tmp_path)
    assert "attention: sdpa" in done.stdout
    check_parity(tmp_path / "optimized", masked_run)
