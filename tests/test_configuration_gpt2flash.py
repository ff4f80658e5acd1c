"""The configuration: GPT-2's, read from GPT-2's folders, and refused where the model would not do what it says."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, GPT2Config

from modeling_gpt2flash import GPT2FlashConfig


def test_defaults_are_gpt2s() -> None:
    ours, stock = GPT2FlashConfig().to_dict(), GPT2Config().to_dict()
    missing = {name for name in stock if name not in ours}
    assert missing == {
        "summary_type",
        "summary_use_proj",
        "summary_activation",
        "summary_proj_to_labels",
        "summary_first_dropout",
        "reorder_and_upcast_attn",
        "add_cross_attention",
    }
    shared = [name for name in ours if name in stock and name != "model_type"]
    assert {name: ours[name] for name in shared} == {name: stock[name] for name in shared}


def test_only_one_field_is_our_own() -> None:
    assert set(GPT2FlashConfig().to_dict()) - set(GPT2Config().to_dict()) == {"loss_chunk_size"}


def test_round_trip(tmp_path: Path) -> None:
    config = GPT2FlashConfig(n_embd=48, n_head=3, n_inner=40, loss_chunk_size=7, scale_attn_by_inverse_layer_idx=True)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gpt2flash"
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is GPT2FlashConfig
    ignored = {"_name_or_path": None}
    assert loaded.to_dict() | ignored == config.to_dict() | ignored
    assert loaded.hidden_size == 48
    assert loaded.max_position_embeddings == 1024


def test_a_stock_folder_is_read(tmp_path: Path) -> None:
    GPT2Config(n_embd=32, n_head=4, summary_type="mean").save_pretrained(tmp_path)
    config = GPT2FlashConfig.from_pretrained(tmp_path)
    assert (config.n_embd, config.n_head, config.loss_chunk_size) == (32, 4, 512)
    assert config.to_dict()["model_type"] == "gpt2flash"


def test_an_old_folder_with_unknown_fields_is_read(tmp_path: Path) -> None:
    fields = {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_ctx": 1024, "gradient_checkpointing": False}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert GPT2FlashConfig.from_pretrained(tmp_path).n_ctx == 1024


@pytest.mark.parametrize("field", ["add_cross_attention", "reorder_and_upcast_attn"])
def test_what_cannot_be_computed_is_refused(field: str, tmp_path: Path) -> None:
    GPT2Config(**{field: True}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{field}=True is not supported"):
        GPT2FlashConfig.from_pretrained(tmp_path)
    assert not getattr(GPT2FlashConfig(**{field: False}), field)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_embd": 100, "n_head": 12}, "n_embd=100 cannot be split over n_head=12"),
        ({"n_layer": 0}, "n_layer is 0, but must be at least 1"),
        ({"n_head": -1}, "n_head is -1"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"n_positions": 0}, "n_positions is 0"),
        ({"n_inner": 0}, "n_inner is 0"),
        ({"attn_pdrop": 1.5}, "attn_pdrop is 1.5"),
        ({"loss_chunk_size": -1}, "loss_chunk_size is -1"),
    ],
)
def test_impossible_sizes_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPT2FlashConfig(**fields)
