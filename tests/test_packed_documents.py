"""Documents in one row do not see each other in the model, whatever the kernel, the batch and what else is given."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from modeling_gpt2flash import GPT2FlashForCausalLM, choose_attention, documents
from modeling_gpt2flash import pipeline as pp
from tests.flash_stubs import FLASH, Call, install, make_flash
from tests.tiny_gpt2 import gradients, make_ours, pad, tokens

LENGTH = 12
KERNELS = ("eager", "sdpa", *FLASH)
# The lengths of the documents in each of three rows, and their bounds when the rows are laid end to end.
LENGTHS = [[5, 4, 3], [1, 1, 10], [12]]
BOUNDS = [0, 5, 9, 12, 13, 14, 24, 36]


def packed_positions(batch: int = 3) -> Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS[:batch]])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    return install(monkeypatch)


def make(kernel: str, **fields) -> GPT2FlashForCausalLM:
    if kernel in FLASH:
        return make_flash(kernel, **fields)
    return make_ours(attn_implementation=kernel, **fields)


def logits(model: GPT2FlashForCausalLM, ids: Tensor, **more) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled="flash" in model.config._attn_implementation):
        return model(ids, **more).logits


WAYS = {
    "plain": lambda ids: {"use_cache": False},
    "cache": lambda ids: {"use_cache": True},
    "own cache": lambda ids: {"past_key_values": DynamicCache()},
    "mask": lambda ids: {"use_cache": False, "attention_mask": torch.ones_like(ids)},
    "mask and cache": lambda ids: {"use_cache": True, "attention_mask": torch.ones_like(ids)},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_document_changes_no_other(calls: list[Call], kernel: str, batch: int, way: str) -> None:
    model, ids, positions = make(kernel), tokens(batch, LENGTH), packed_positions(batch)
    before = logits(model, ids, position_ids=positions, **WAYS[way](ids))
    for row, lengths in enumerate(LENGTHS[:batch]):
        for start, length in zip([0, *torch.tensor(lengths).cumsum(0).tolist()], lengths, strict=False):
            others = ids.clone()
            others[row, start : start + length] = (others[row, start : start + length] + 1) % 37
            after = logits(model, others, position_ids=positions, **WAYS[way](ids))
            changed = (after != before).any(-1)
            assert changed[row, start : start + length].all()
            changed[row, start : start + length] = False
            assert not changed.any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_document_is_what_it_is_alone(calls: list[Call], kernel: str, way: str) -> None:
    model, ids, exact = make(kernel), tokens(3, LENGTH), make_ours().double()
    close = {"rtol": 3e-2, "atol": 6e-2} if kernel in FLASH else {"rtol": 1e-4, "atol": 1e-5}
    together = logits(model, ids, position_ids=packed_positions(), **WAYS[way](ids))
    for row, lengths in enumerate(LENGTHS):
        for found, text in zip(together[row].split(lengths), ids[row].split(lengths), strict=True):
            torch.testing.assert_close(found, exact(text[None]).logits[0], check_dtype=False, **close)


@pytest.mark.parametrize("kernel", FLASH)
def test_flash_kernels_get_the_bounds_found_once(
    calls: list[Call], monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    searches = []
    search = documents.document_bounds
    monkeypatch.setattr(documents, "document_bounds", lambda starts: searches.append(1) or search(starts))
    model = make(kernel)
    logits(model, tokens(3, LENGTH), position_ids=packed_positions())
    assert [(call.bounds, call.longest) for call in calls] == [(BOUNDS, LENGTH)] * model.config.n_layer
    assert len(searches) == 1
    calls.clear()
    logits(model, tokens(3, LENGTH), position_ids=torch.arange(LENGTH)[None])
    assert [call.bounds for call in calls] == [None] * model.config.n_layer, "one document a row needs no bounds"


@pytest.mark.parametrize("kernel", FLASH)
@pytest.mark.parametrize("complete", [False, True])
def test_bounds_that_are_given_are_not_looked_for(
    calls: list[Call], monkeypatch: pytest.MonkeyPatch, kernel: str, complete: bool
) -> None:
    model, ids, positions = make(kernel), tokens(3, LENGTH), packed_positions()
    expected = logits(model, ids, position_ids=positions)
    found = calls[:]
    calls.clear()
    monkeypatch.setattr(documents, "_find_document_starts", lambda *_: pytest.fail("looked"))
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    given = documents.kernel_arguments(bounds, LENGTH) if complete else {"cu_seq_lens_q": bounds}
    assert torch.equal(logits(model, ids, position_ids=positions, **given), expected)
    assert calls == found


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_kernels_without_bounds_go_by_the_positions(kernel: str) -> None:
    model, ids, positions = make(kernel), tokens(3, LENGTH), packed_positions()
    given = documents.kernel_arguments(torch.tensor(BOUNDS, dtype=torch.int32), LENGTH)
    expected = logits(model, ids, position_ids=positions)
    assert torch.equal(logits(model, ids, position_ids=positions, **given), expected)
    with pytest.raises(ValueError, match=f"{kernel} attention separates documents by position_ids"):
        model(ids, **given)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_padding_beside_documents(calls: list[Call], kernel: str, side: str) -> None:
    """Two documents of 4 and 5 tokens, padded to 12."""
    model, alone = make(kernel), tokens(2, 9)
    ids, mask = pad(torch.cat([alone, alone[:, :3]], 1), [3, 3], side)
    own = torch.cat([torch.arange(4), torch.arange(5)])
    positions = torch.zeros_like(ids).masked_scatter(mask == 1, own.repeat(2))
    found = logits(model, ids, position_ids=positions, attention_mask=mask)[mask == 1].view(2, 9, -1)
    expected = logits(model, alone, position_ids=own.expand(2, -1))
    close = {"rtol": 3e-2, "atol": 6e-2} if kernel in FLASH else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found, expected, **close)


@pytest.mark.parametrize("kernel", KERNELS)
def test_padding_and_caches_are_no_documents(calls: list[Call], kernel: str) -> None:
    """generate() gives positions that restart behind padding, and go on from a cache."""
    model, (ids, mask) = make(kernel), pad(tokens(3, LENGTH), [0, 4, 9], "left")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = logits(model, ids, attention_mask=mask)
    start = logits(model, ids, attention_mask=mask, position_ids=positions, use_cache=False)
    close = {"rtol": 3e-2, "atol": 6e-2} if kernel in FLASH else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(start[mask == 1], expected[mask == 1], **close)
    cache = DynamicCache()
    logits(model, ids[:, :-2], attention_mask=mask[:, :-2], position_ids=positions[:, :-2], past_key_values=cache)
    rest = logits(model, ids[:, -2:], attention_mask=mask, position_ids=positions[:, -2:], past_key_values=cache)
    torch.testing.assert_close(rest, expected[:, -2:], **close)


@pytest.mark.parametrize("kernel", KERNELS)
def test_documents_behind_a_cache_are_refused(calls: list[Call], kernel: str) -> None:
    model, ids, positions = make(kernel), tokens(3, LENGTH), packed_positions()
    full, roomy = DynamicCache(), StaticCache(config=model.config, max_cache_len=2 * LENGTH)
    logits(model, ids, past_key_values=full)
    for cache in (full, roomy):
        with pytest.raises(ValueError, match=r"position_ids jump within a row.*a cache has other tokens or room"):
            model(ids, position_ids=positions, past_key_values=cache)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_compiled_whole(kernel: str) -> None:
    model, ids, positions = make(kernel), tokens(3, LENGTH), packed_positions()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for way in ("plain", "mask"):
        expected = logits(model, ids, position_ids=positions, **WAYS[way](ids))
        torch.testing.assert_close(compiled(ids, position_ids=positions, **WAYS[way](ids)).logits, expected)


@pytest.mark.parametrize("kernel", FLASH)
def test_gradients_are_those_of_single_documents(calls: list[Call], kernel: str) -> None:
    model, exact, ids = make(kernel).train(), make_ours().double(), tokens(3, LENGTH)
    labels = tokens(3, LENGTH, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, position_ids=packed_positions(), shift_labels=labels, num_items_in_batch=36).loss.backward()
    for row, lengths in enumerate(LENGTHS):
        for text, own in zip(ids[row].split(lengths), labels[row].split(lengths), strict=True):
            exact(text[None], shift_labels=own[None], num_items_in_batch=36).loss.backward()
    for name, gradient in gradients(model).items():
        expected = exact.get_parameter(name).grad.float()
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0.05 * expected.abs().max().item() + 1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_stages_find_the_bounds_once_each(calls: list[Call], monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    searches = []
    search = documents._find_document_starts
    monkeypatch.setattr(
        documents, "_find_document_starts", lambda *how, **more: searches.append(1) or search(*how, **more)
    )
    model, ids, positions = make(kernel, n_layer=4), tokens(3, LENGTH), packed_positions()
    expected = logits(model, ids, position_ids=positions, use_cache=False)
    with_flash = calls[:]
    calls.clear()
    searches.clear()
    layers = pp.model_layers(model)
    stages = [layers[:3], layers[3:]]
    passed = (ids, positions)
    with torch.autocast("cpu", torch.bfloat16, enabled=kernel in FLASH):
        for stage in stages:
            if isinstance(passed, tuple):
                passed = tuple(tensor.clone() for tensor in passed)  # as one process gets them from another
            for layer in copy.deepcopy(stage):
                passed = layer(passed)
    assert len(searches) == 2
    assert torch.equal(passed, expected)
    assert calls == with_flash


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kernel", FLASH)
@pytest.mark.parametrize("given", [False, True])
def test_real_kernels_keep_documents_apart(kernel: str, given: bool) -> None:
    try:
        choose_attention(kernel, "cuda", torch.bfloat16, 64)
    except ValueError as error:
        pytest.skip(str(error))
    lengths = [[100, 1, 99, 56], [256], [3] * 85 + [1]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths]).cuda()
    ids, sizes = tokens(3, 256).cuda(), {"n_embd": 128, "n_head": 2, "n_positions": 256}
    more = documents.kernel_arguments(documents.document_bounds(positions == 0), 256) if given else {}
    results = {}
    for name, dtype in (("exact", torch.float32), ("sdpa", torch.bfloat16), (kernel, torch.bfloat16)):
        model = make_ours(**sizes, attn_implementation="sdpa" if name == "exact" else name).cuda().train()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            own = more if name == kernel else {}
            out = model(ids, position_ids=positions, shift_labels=ids, skip_logits=False, use_cache=False, **own)
        out.loss.backward()
        results[name] = [out.logits.float(), *gradients(model).values()]
    for exact, sdpa, ours in zip(results["exact"], results["sdpa"], results[kernel], strict=True):
        assert (ours - exact).abs().max() <= 2 * (sdpa - exact).abs().max() + 1e-5
    others = ids.clone()
    others[0, :100] = (others[0, :100] + 1) % 37
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        before, after = (model(text, position_ids=positions, **more).logits for text in (ids, others))
    assert torch.equal(before[0, 100:], after[0, 100:])
    assert torch.equal(before[1:], after[1:])
    assert not torch.equal(before[0, :100], after[0, :100])
