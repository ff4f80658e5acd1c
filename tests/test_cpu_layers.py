"""The copies that write on a CPU: fp32 ones compute the same, int8 loses what it may lose."""

import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from modeling_gpt2flash import GPT2FlashForCausalLM
from tests.tiny_gpt2 import make_ours, make_pair, pad, tokens
from train.data.tokenizer import VOCABULARY_SIZE
from train.generate.cpu_layers import (
    LARGE_PAGE,
    MAX_THREADS_SINGLE_ROW,
    PackedLinear,
    in_large_pages,
    pack_weights,
    quantize_int8,
)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("rows", [1, 3])
def test_pack_weights_computes_the_same(rows: int, tmp_path: Path) -> None:
    stock, ours = make_pair(tmp_path)
    ids, mask = pad(tokens(rows), list(range(rows)), "left")
    with torch.no_grad():
        expected = stock(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
        found = pack_weights(ours, rows)(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("one_thread")
def test_the_layout_is_chosen_by_rows_and_threads() -> None:
    ours = make_ours()
    alone = pack_weights(ours, 1)
    mlp = alone.transformer.h[0].mlp
    assert type(alone.lm_head) is type(mlp.c_fc) is type(mlp.c_proj) is torch.nn.Linear
    for tall in (alone.lm_head, mlp.c_fc):
        assert tall.weight.t().is_contiguous()
        assert not tall.weight.is_contiguous()
    assert mlp.c_proj.weight.is_contiguous()
    assert type(pack_weights(ours, 2).lm_head) is PackedLinear
    torch.set_num_threads(MAX_THREADS_SINGLE_ROW + 1)
    assert type(pack_weights(ours, 1).lm_head) is PackedLinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_tensors_begin_on_a_large_page(dtype: torch.dtype) -> None:
    tensor = torch.randn(1500, 1001, dtype=torch.float32).to(dtype).t()
    moved = in_large_pages(tensor)
    assert torch.equal(moved, tensor)
    assert moved.is_contiguous()
    assert moved.data_ptr() % LARGE_PAGE == 0
    assert torch.equal(in_large_pages(tensor[:3]), tensor[:3])


@pytest.mark.parametrize("make", [lambda model: pack_weights(model, 2), quantize_int8])
def test_the_model_itself_stays_as_it_is(make) -> None:
    ours = make_ours()
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    copy = make(ours)
    assert type(ours.lm_head) is torch.nn.Linear
    assert ours.lm_head.weight is ours.transformer.wte.weight
    assert copy.transformer.wte.weight is ours.transformer.wte.weight, "what is not replaced is shared"
    after = ours.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_quantizing_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert quantize_int8(make_ours())(tokens()).logits.isfinite().all()


def perplexity(model: GPT2FlashForCausalLM, ids: Tensor) -> float:
    """Of (B, T) tokens, from the logits: the loss knows heads of fp32 only."""
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    return math.exp(torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1)))


@pytest.mark.usefixtures("one_thread")
def test_int8_costs_a_trained_model_a_percent_of_perplexity_at_most(corpus: Path) -> None:
    # 16 positions of Python, learned until the model knows them better than chance by far: an untrained model's
    # perplexity is the vocabulary's size whatever its weights are rounded to.
    text = torch.from_file(str(corpus / "train.bin"), size=1024, dtype=torch.uint16).long()
    words, ids = text.unique(return_inverse=True)
    assert len(words) < VOCABULARY_SIZE
    batch = ids.view(-1, 16)
    model = make_ours(vocab_size=len(words), n_positions=16, n_embd=48, initializer_range=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(30):
        optimizer.zero_grad()
        model.train()(batch, labels=batch).loss.backward()
        optimizer.step()
    model.eval()
    fp32 = perplexity(model, batch)
    assert fp32 < len(words) / 20
    int8 = perplexity(quantize_int8(model), batch)
    assert int8 == pytest.approx(fp32, rel=0.01)
    assert int8 != pytest.approx(fp32, rel=1e-6), "it is not fp32 in disguise"


def test_int8_opens_stock_checkpoints(small_model: Path) -> None:
    ours = GPT2FlashForCausalLM.from_pretrained(small_model).eval()
    expected = GPT2LMHeadModel.from_pretrained(small_model).eval()(tokens()).logits
    found = quantize_int8(ours)(tokens()).logits
    assert (found - expected).norm() < 0.03 * expected.norm()
