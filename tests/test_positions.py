"""Positions: padding takes none, a cache continues them, and there are no more than n_positions."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from modeling_gpt2flash import GPT2FlashModel
from tests.tiny_gpt2 import make_ours, pad, tokens


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(attention: str, side: str) -> None:
    ours = make_ours()
    ours.set_attn_implementation(attention)
    ids, mask = pad(tokens(3), [0, 4, 9], side)
    padded = ours(ids, attention_mask=mask).logits
    for row in range(3):
        alone = ours(ids[row, mask[row] == 1][None]).logits[0]
        torch.testing.assert_close(padded[row, mask[row] == 1], alone, rtol=1e-4, atol=1e-5)


def test_left_padding_with_a_cache() -> None:
    ours = make_ours()
    ids, mask = pad(tokens(2, 14), [0, 5], "left")
    full = ours(ids, attention_mask=mask).logits
    for static in (False, True):
        cache = StaticCache(config=ours.config, max_cache_len=20) if static else DynamicCache(config=ours.config)
        parts = [
            ours(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache, use_cache=True).logits
            for a, b in ((0, 8), (8, 13), (13, 14))  # a prefill, a second piece of it, a single token
        ]
        torch.testing.assert_close(torch.cat(parts, 1)[mask == 1], full[mask == 1], rtol=1e-4, atol=1e-5)
    cache = ours(ids, attention_mask=mask, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="attention_mask covers 1 positions, but there are 15: 14 cached and 1 new"):
        ours(ids[:, :1], attention_mask=mask[:, :1], past_key_values=cache)


def test_longer_than_the_positions() -> None:
    ours = make_ours()
    limit = r"32 positions \(n_positions\)"
    assert ours(tokens(1, 32)).logits.shape[1] == 32
    with pytest.raises(ValueError, match=rf"33 tokens long, but this model has {limit}"):
        ours(tokens(1, 33))
    with pytest.raises(ValueError, match=rf"33 tokens long.*{limit}"):
        ours(inputs_embeds=torch.zeros(1, 33, 24))
    with pytest.raises(ValueError, match=rf"position_ids go up to 32, .*{limit}"):
        ours(tokens(1, 2), position_ids=torch.tensor([[31, 32]]))
    for cache in (DynamicCache(config=ours.config), StaticCache(config=ours.config, max_cache_len=40)):
        ours(tokens(1, 30), past_key_values=cache, use_cache=True)
        ours(tokens(1, 2), past_key_values=cache, use_cache=True)
        with pytest.raises(ValueError, match=rf"33 tokens long \(32 cached and 1 new\), but this model has {limit}"):
            ours(tokens(1, 1), past_key_values=cache, use_cache=True)


def test_generating_beyond_the_positions_is_refused_up_front(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = make_ours()
    ids = tokens(1, 24)
    settings = {"do_sample": False, "attention_mask": torch.ones_like(ids), "eos_token_id": None, "pad_token_id": 0}
    assert ours.generate(ids, max_new_tokens=8, **settings).shape[1] == 32
    monkeypatch.setattr(GPT2FlashModel, "forward", lambda *_, **__: pytest.fail("it started"))
    for length in ({"max_new_tokens": 9}, {"max_length": 33}):
        with pytest.raises(ValueError, match=r"up to 33 tokens \(the prompt has 24\).*32 positions \(n_positions\)"):
            ours.generate(ids, **length, **settings)


def test_a_padded_batch_compiles_into_one_graph() -> None:
    ours = make_ours()
    ids, mask = pad(tokens(2), [0, 5], "left")
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, attention_mask=mask).logits, ours(ids, attention_mask=mask).logits)
