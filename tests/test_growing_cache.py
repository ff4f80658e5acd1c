"""The cache that grows in place against transformers' own."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from tests.tiny_gpt2 import make_ours, pad, tokens
from train.generate.growing_cache import GrowingLayer, growing_cache


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_writes_the_same_as_transformers_own(attention: str, how: dict[str, Any]) -> None:
    model = make_ours(attn_implementation=attention)
    model.generation_config.do_sample = False
    texts = []
    for cache in (growing_cache(), DynamicCache(config=model.config)):
        ids, mask = pad(tokens(3, 5), [2, 0, 1], "left")
        torch.manual_seed(0)
        texts.append(
            model.generate(
                ids,
                attention_mask=mask,
                past_key_values=cache,
                max_new_tokens=20,
                pad_token_id=0,
                eos_token_id=None,
                **how,
            )
        )
    assert torch.equal(*texts)


def test_what_is_there_stays_where_it_is() -> None:
    layer = GrowingLayer()
    given = torch.randn(2, 2, 3, 40, 4)  # keys and values
    places = []
    for step in range(40):
        found = layer.update(*given[..., step : step + 1, :])
        places.append(found[0].data_ptr())
        torch.testing.assert_close(torch.stack(found), given[..., : step + 1, :], rtol=0, atol=0)
    moves = sum(before != after for before, after in pairwise(places))
    assert moves == 4  # the rooms are for 2, 6, 14, 30 and 62 positions


def test_after_a_crop_the_room_is_used_again_and_after_a_reset_forgotten() -> None:
    layer = GrowingLayer()
    keys, values = torch.randn(2, 1, 2, 6, 4)
    layer.update(keys, values)
    layer.crop(-2)
    more = torch.randn(2, 1, 2, 3, 4)
    found, _ = layer.update(*more)
    assert torch.equal(found, torch.cat([keys[:, :, :4], more[0]], dim=2))
    layer.reset()
    found, _ = layer.update(*more)
    assert torch.equal(found, more[0])
    assert layer.get_seq_length() == 3
