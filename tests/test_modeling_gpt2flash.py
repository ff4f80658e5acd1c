"""The model against stock GPT-2: the same folders, numbers, gradients and tokens, and errors where stock has none."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPT2Model, StaticCache
from transformers.pytorch_utils import Conv1D

from modeling_gpt2flash import GPT2FlashConfig, GPT2FlashForCausalLM, GPT2FlashModel
from modeling_gpt2flash.documents import CACHE
from tests.tiny_gpt2 import TINY, gradients, make_ours, make_pair, pad, tokens
from train.engines.transforms import checkpoint_blocks

VARIANTS = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "n_inner": {"n_inner": 20},
    "odd": {"n_embd": 15, "n_head": 5, "n_layer": 3, "vocab_size": 37, "n_positions": 17},
    "unscaled": {"scale_attn_weights": False},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "relu": {"activation_function": "relu"},
}


# ---- the same numbers as stock GPT-2, from the same folders ----


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_logits_loss_and_gradients_are_stocks(tmp_path: Path, fields: dict, attention: str) -> None:
    stock, ours = make_pair(tmp_path, attention, **fields)
    ids = tokens()
    expected, got = stock(ids, labels=ids), ours(ids, labels=ids)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.loss, expected.loss)

    stock.train()(ids, labels=ids).loss.backward()
    for chunk_size, exact in ((0, attention == "sdpa"), (5, False), (512, False)):
        ours.config.loss_chunk_size = chunk_size
        ours.zero_grad()
        out = ours.train()(ids, labels=ids)
        out.loss.backward()
        assert (out.logits is None) == (chunk_size > 0)
        for name, gradient in gradients(ours).items():
            expected_gradient = stock.get_parameter(name).grad
            if exact:
                assert torch.equal(gradient, expected_gradient), name
            else:
                torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_stock_opens_our_folder(tmp_path: Path, fields: dict) -> None:
    ours = make_ours(**fields)
    ours.save_pretrained(tmp_path)
    stock, problems = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not problems["missing_keys"]
    assert not problems["unexpected_keys"]
    assert torch.equal(stock.eval()(tokens()).logits, ours(tokens()).logits)


def test_state_dict_is_gpt2s() -> None:
    stock, ours = GPT2LMHeadModel(GPT2Config(**TINY)).state_dict(), make_ours().state_dict()
    assert [(name, tensor.shape) for name, tensor in ours.items()] == [(n, t.shape) for n, t in stock.items()]


def test_saving_and_loading_gives_the_same_model(tmp_path: Path) -> None:
    ours = make_ours(tie_word_embeddings=False, n_inner=20)
    ours.save_pretrained(tmp_path)
    for loaded in (GPT2FlashForCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert type(loaded) is GPT2FlashForCausalLM
        assert torch.equal(loaded(tokens()).logits, ours(tokens()).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is GPT2FlashModel
    assert torch.equal(base(tokens()).last_hidden_state, ours.transformer(tokens()).last_hidden_state)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    make_ours().save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = GPT2FlashForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    loaded.resize_token_embeddings(70)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert loaded(tokens()).logits.shape == (2, 12, 70)


def test_a_base_models_folder_without_the_prefix(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = GPT2Model(GPT2Config(**TINY)).eval()
    base.save_pretrained(tmp_path)
    assert "h.0.attn.c_attn.weight" in load_file(tmp_path / "model.safetensors")
    ours = GPT2FlashForCausalLM.from_pretrained(tmp_path).eval()
    expected = base(tokens()).last_hidden_state @ base.wte.weight.T
    torch.testing.assert_close(ours(tokens()).logits, expected)


def test_an_old_checkpoints_mask_buffers_are_passed_over(tmp_path: Path) -> None:
    stock, _ = make_pair(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        weights[f"transformer.h.{layer}.attn.bias"] = torch.ones(32, 32).tril().bool()[None, None]
        weights[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours, problems = GPT2FlashForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not problems["unexpected_keys"]
    assert torch.equal(ours.eval()(tokens()).logits, stock(tokens()).logits)


def test_stocks_configuration_class_is_taken_but_not_what_it_alone_can() -> None:
    ours = GPT2FlashForCausalLM(GPT2Config(**TINY))
    assert ours(tokens(), labels=tokens()).logits is None
    with pytest.raises(ValueError, match="add_cross_attention=True is not supported"):
        GPT2FlashForCausalLM(GPT2Config(**TINY, add_cross_attention=True))


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = GPT2FlashForCausalLM(GPT2FlashConfig(vocab_size=500, n_positions=64, n_embd=96, n_layer=8, n_head=4))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().max() == 0
        elif ".ln_" in name:
            assert (parameter == 1).all()
        else:
            expected = 0.02 / math.sqrt(2 * 8) if "c_proj" in name else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.001
    assert isinstance(model.transformer.h[0].mlp.c_proj, Conv1D)


# ---- inputs ----


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_caches(attention: str, static: bool, name: str) -> None:
    ours = make_ours()
    ours.set_attn_implementation(attention)
    ids = tokens(2, 14)
    cache = StaticCache(config=ours.config, max_cache_len=20) if static else None
    parts = []
    for a, b in ((0, 6), (6, 10), (10, 11), (11, 14)):
        out = ours(ids[:, a:b], **{name: cache}, use_cache=True)
        cache = getattr(out, CACHE)
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), ours(ids).logits, rtol=1e-4, atol=1e-5)
    assert getattr(ours(ids, use_cache=False), CACHE) is None
    with pytest.raises(ValueError, match="either cache or past_key_values"):
        ours(ids, cache=cache, past_key_values=cache)


def test_what_nobody_knows_is_refused() -> None:
    """And not swallowed: a misspelt mask would be none."""
    ours = make_ours()
    for model in (ours, ours.transformer):
        with pytest.raises(TypeError, match="unexpected keyword argument 'atention_mask'"):
            model(tokens(), atention_mask=torch.ones(2, 12))
    with pytest.raises((TypeError, ValueError), match="atention_mask"):
        ours.generate(tokens(), atention_mask=torch.ones(2, 12), max_new_tokens=1)


def test_other_inputs_are_stocks(tmp_path: Path) -> None:
    stock, ours = make_pair(tmp_path)
    ids = tokens()
    embeds = stock.transformer.wte(ids)
    for inputs in (
        {"inputs_embeds": embeds},
        {"input_ids": ids, "position_ids": torch.arange(5, 17)[None]},
        {"input_ids": ids, "token_type_ids": ids % 3},
        {"input_ids": ids, "attention_mask": torch.ones(2, 1, 12, 12).bool().tril()},
        {"input_ids": ids, "logits_to_keep": 3},
        {"input_ids": ids, "logits_to_keep": torch.tensor([1, 7])},
    ):
        assert torch.equal(ours(**inputs).logits, stock(**inputs).logits)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        ours(input_ids=ids, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        ours()


def test_recorded_outputs_are_stocks(tmp_path: Path) -> None:
    stock, ours = make_pair(tmp_path, "eager")
    wanted = {"output_hidden_states": True, "output_attentions": True}
    expected, got = stock(tokens(), **wanted), ours(tokens(), **wanted)
    assert len(got.hidden_states) == 3
    assert len(got.attentions) == 2
    for ours_one, stock_one in zip(
        got.hidden_states + got.attentions, expected.hidden_states + expected.attentions, strict=True
    ):
        assert torch.equal(ours_one, stock_one)
    assert isinstance(ours(tokens(), return_dict=False), tuple)


def test_no_mask_is_built_where_causality_is_all(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, seen = make_ours(), []
    plain_sdpa = F.scaled_dot_product_attention

    def watch(query, key, value, attn_mask=None, is_causal=False, **kwargs):
        seen.append((attn_mask is None, is_causal, query.data_ptr() == key.data_ptr() - 24 * 4))
        return plain_sdpa(query, key, value, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    ours(tokens(), use_cache=False)
    ours(tokens(), attention_mask=torch.ones(2, 12), use_cache=False)
    assert seen == [(True, True, True)] * 4  # no mask, causal, and query and key are slices of one product


# ---- generation ----

SAMPLE = {"do_sample": True, "top_k": 7, "temperature": 1.3}


@pytest.mark.parametrize(
    "how", [{}, SAMPLE, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}]
)
@pytest.mark.parametrize("padded", [False, True])
def test_generated_tokens_are_stocks(tmp_path: Path, how: dict, padded: bool) -> None:
    stock, ours = make_pair(tmp_path)
    ids, mask = pad(tokens(3, 8), [0, 3, 6], "left") if padded else (tokens(1, 8), torch.ones(1, 8))
    written = []
    for model in (stock, ours):
        torch.manual_seed(3)
        settings = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 9, "disable_compile": True} | how
        written.append(model.generate(ids, attention_mask=mask, **settings))
    assert torch.equal(*written)
    assert written[0].shape[1] > 8


# ---- training ----


def test_when_logits_are_skipped() -> None:
    ours, ids = make_ours(), tokens()
    out = ours(ids, labels=ids)
    assert out.logits.shape == (2, 12, 61)
    skipped = ours(ids, labels=ids, skip_logits=True)
    assert skipped.logits is None
    torch.testing.assert_close(skipped.loss, out.loss)
    ours.train()
    assert ours(ids).logits is not None
    training = ours(ids, labels=ids)
    assert (training.logits, training.past_key_values) == (None, None)
    torch.testing.assert_close(training.loss, out.loss)
    kept = ours(ids, labels=ids, skip_logits=False, logits_to_keep=2)
    assert kept.logits.shape == (2, 2, 61)
    torch.testing.assert_close(kept.loss, out.loss)
    with pytest.raises(ValueError, match="skip_logits leaves nothing"):
        ours(ids, skip_logits=True)


@pytest.mark.parametrize("chunk_size", [0, 5])
@pytest.mark.parametrize("training", [False, True])
def test_shifted_labels_and_item_counts(chunk_size: int, training: bool) -> None:
    ours, ids = make_ours(loss_chunk_size=chunk_size).train(training), tokens()
    labels = ids.masked_fill(ids % 5 == 0, -100)
    logits = ours(ids).logits
    summed = F.cross_entropy(logits[:, :-1].reshape(-1, 61), labels[:, 1:].reshape(-1), reduction="sum")
    torch.testing.assert_close(ours(ids, labels=labels, num_items_in_batch=torch.tensor(50)).loss, summed / 50)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    torch.testing.assert_close(ours(ids, shift_labels=shifted, num_items_in_batch=50).loss, summed / 50)


def test_a_head_that_is_more_than_its_weight_is_asked() -> None:
    ours, ids = make_ours().train(), tokens()

    class Doubled(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    head = Doubled(24, 61, bias=False)
    head.weight = ours.lm_head.weight
    ours.lm_head = head
    expected = F.cross_entropy(ours(ids).logits[:, :-1].reshape(-1, 61), ids[:, 1:].reshape(-1))
    torch.testing.assert_close(ours(ids, labels=ids).loss, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    ours, ids = make_ours().train(), tokens()
    ours(ids, labels=ids).loss.backward()
    expected = gradients(ours)
    calls = []
    ours.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpoint_blocks(ours, {"use_reentrant": reentrant})
    ours.zero_grad()
    ours(ids, labels=ids).loss.backward()
    assert len(calls) == 2  # once forward, once again on the way back
    for name, gradient in gradients(ours).items():
        torch.testing.assert_close(gradient, expected[name])


def test_bf16_autocast_trains() -> None:
    ours, ids = make_ours().train(), tokens()
    full = ours(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(ids, labels=ids).loss
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, full, rtol=2e-2, atol=2e-2)
    assert all(gradient.dtype == torch.float32 for gradient in gradients(ours).values())


@pytest.mark.parametrize("chunk_size", [0, 5])
def test_compiles_whole(chunk_size: int) -> None:
    ours, ids = make_ours(loss_chunk_size=chunk_size).train(), tokens()
    ours(ids, labels=ids).loss.backward()
    expected = gradients(ours)
    ours.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    compiled(ids, labels=ids).loss.backward()
    for name, gradient in gradients(ours).items():
        torch.testing.assert_close(gradient, expected[name])


def test_compiles_whole_with_a_static_cache() -> None:
    ours, ids = make_ours(), tokens(1, 10)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    with torch.no_grad():
        cache = StaticCache(config=ours.config, max_cache_len=16)
        ours(ids[:, :8], past_key_values=cache, use_cache=True)
        steps = [compiled(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in (8, 9)]
        torch.testing.assert_close(torch.cat(steps, 1), ours(ids).logits[:, 8:], rtol=1e-4, atol=1e-5)
