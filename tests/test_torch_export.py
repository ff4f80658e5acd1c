"""torch.export: one graph of the model for batches and lengths of any size."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from modeling_gpt2flash import GPT2FlashForCausalLM
from tests.tiny_gpt2 import TINY, make_ours, pad, tokens

SHAPES = [(1, 1), (2, 8), (1, 32), (5, 17)]


def exported(ours: GPT2FlashForCausalLM, shortest: int = 1, **inputs: Tensor) -> ExportedProgram:
    sizes = {0: Dim("batch"), 1: Dim("length", min=shortest, max=TINY["n_positions"])}
    dynamic = {**dict.fromkeys(inputs, sizes), "use_cache": None}
    return torch.export.export(ours, (), {**inputs, "use_cache": False}, dynamic_shapes=dynamic)


def logits(model: Any, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def test_a_graph_that_was_saved_computes_the_same_at_any_size(attention: str, tmp_path: Path) -> None:
    ours = make_ours(attn_implementation=attention)
    torch.export.save(exported(ours, input_ids=tokens(2, 8)), tmp_path / "gpt2.pt2")
    graph = torch.export.load(tmp_path / "gpt2.pt2").module()
    for shape in SHAPES:
        ids = tokens(*shape)
        torch.testing.assert_close(logits(graph, input_ids=ids), logits(ours, input_ids=ids), rtol=0, atol=1e-5)
    with pytest.raises(Exception, match="32"):
        logits(graph, input_ids=tokens(1, 33))


@pytest.mark.slow
def test_padding_in_a_graph() -> None:
    ours = make_ours()
    ids = tokens(2, 8)
    graph = exported(ours, input_ids=ids, attention_mask=torch.ones_like(ids)).module()
    ids, mask = pad(tokens(3, 11), [0, 4, 7], "left")
    found = logits(graph, input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(
        found[mask == 1], logits(ours, input_ids=ids, attention_mask=mask)[mask == 1], rtol=0, atol=1e-5
    )
    alone = logits(ours, input_ids=ids[2:, 7:])
    torch.testing.assert_close(found[2:, 7:], alone, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_documents_in_a_graph_do_not_see_each_other() -> None:
    ours = make_ours()
    # From 3 tokens on: the graph has a step between positions in it, and may not take one step for any number.
    graph = exported(ours, 3, input_ids=tokens(2, 8), position_ids=torch.arange(8).repeat(2, 1)).module()
    for lengths in ([5, 7], [12], [3, 4, 5]):
        ids = tokens(2, 12)
        positions = torch.cat([torch.arange(length) for length in lengths]).repeat(2, 1)
        found = logits(graph, input_ids=ids, position_ids=positions)
        alone = torch.cat([logits(ours, input_ids=part) for part in ids.split(lengths, dim=1)], dim=1)
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)
