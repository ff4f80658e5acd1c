"""A model whose layers lie on several devices or on disk, and what Accelerate expects of its memory."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import convert_bytes

from modeling_gpt2flash import GPT2FlashForCausalLM
from tests.conftest import command
from tests.loopback_hub import loopback_hub
from tests.tiny_gpt2 import make_ours, tokens

LAYERS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ours")
    make_ours(n_layer=LAYERS).save_pretrained(folder)
    return folder


def size(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def spread(folder: Path, room: int, **how: Any) -> GPT2FlashForCausalLM:
    """As much of the model in memory as there is room for, in bytes, and the rest on disk."""
    return GPT2FlashForCausalLM.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": room}, offload_folder=folder / "offload", **how
    ).eval()


@pytest.fixture(scope="module")
def whole(folder: Path) -> GPT2FlashForCausalLM:
    return GPT2FlashForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("blocks", [0, 2])
def test_what_does_not_fit_stays_on_disk(folder: Path, whole: GPT2FlashForCausalLM, blocks: int) -> None:
    block = size(whole.transformer.h[0])
    room = size(whole.transformer.wte) + size(whole.transformer.wpe) + blocks * block + block // 2 if blocks else 1
    part = spread(folder, room)
    places = part.hf_device_map
    assert set(places.values()) == ({"cpu", "disk"} if blocks else {"disk"})
    assert not [name for name in places if re.search(r"\.h\.\d+\.", name)], "no block is in two places"
    assert any(parameter.is_meta for parameter in part.parameters())

    ids = tokens(2, 12)
    with torch.no_grad():
        assert torch.equal(part(ids).logits, whole(ids).logits)
        loss = whole(ids, labels=ids).loss.item()
        assert part(ids, labels=ids, skip_logits=True).loss.item() == pytest.approx(loss, abs=1e-6)
    written = [model.generate(ids, max_new_tokens=5, do_sample=False) for model in (part, whole)]
    assert torch.equal(*written)


@pytest.mark.slow
def test_accelerates_estimate_is_the_size_and_the_head(
    folder: Path, whole: GPT2FlashForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loopback_hub() as hub:
        for name, value in hub.environment.items():
            monkeypatch.setenv(name, value)
        hub.repositories["owner/small"] = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        said = command(
            "accelerate", "estimate-memory", "owner/small", "--library_name=transformers", "--trust_remote_code",
            "--dtypes=float32", cwd=tmp_path,
        ).stdout  # fmt: skip
    (row,) = re.findall(r"│ *float32│(.*)│", said)
    _, total, training = (column.strip() for column in row.split("│"))
    # The head is tied to the embeddings, and counted all the same.
    expected = size(whole) + whole.lm_head.weight.nbytes
    assert total == convert_bytes(expected)
    assert training == convert_bytes(4 * expected)
