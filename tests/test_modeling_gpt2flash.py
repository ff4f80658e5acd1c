"""The model against stock GPT-2: the same folders, numbers, gradients and tokens, and errors where stock has none."""

import ast
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    StaticCache,
    Trainer,
    TrainingArguments,
)
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.pytorch_utils import Conv1D

import modeling_gpt2flash
from modeling_gpt2flash import GPT2FlashConfig, GPT2FlashForCausalLM, GPT2FlashModel

SIZES = {
    "vocab_size": 61,
    "n_positions": 32,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TINY = SIZES | NO_DROPOUT | {"initializer_range": 0.2}  # wide enough that logits and their errors are not all tiny
PACKAGE = Path(modeling_gpt2flash.__file__).parent

VARIANTS = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "n_inner": {"n_inner": 20},
    "odd": {"n_embd": 15, "n_head": 5, "n_layer": 3, "vocab_size": 37, "n_positions": 17},
    "unscaled": {"scale_attn_weights": False},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "relu": {"activation_function": "relu"},
}


def make_pair(folder: Path, attention: str = "sdpa", **fields) -> tuple[GPT2LMHeadModel, GPT2FlashForCausalLM]:
    """Stock GPT-2 with random weights, and ours loaded from its folder."""
    torch.manual_seed(0)
    stock = GPT2LMHeadModel(GPT2Config(**TINY | fields))
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if name.endswith("bias"):  # initialised to 0, which would hide a bias that is not added
                parameter.normal_(std=0.1)
    stock.save_pretrained(folder)
    stock.set_attn_implementation(attention)
    return stock.eval(), GPT2FlashForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()


def make_ours(**fields) -> GPT2FlashForCausalLM:
    torch.manual_seed(0)
    return GPT2FlashForCausalLM(GPT2FlashConfig(**TINY | fields)).eval()


def tokens(batch: int = 2, length: int = 12, words: int = 37, seed: int = 1) -> Tensor:
    return torch.randint(1, words, (batch, length), generator=torch.Generator().manual_seed(seed))


def pad(ids: Tensor, amounts: list[int], side: str) -> tuple[Tensor, Tensor]:
    """(B, T) tokens and mask, of which row i keeps its first T - amounts[i] tokens, padded on a side."""
    ids, mask = ids.clone(), torch.ones_like(ids)
    for row, amount in enumerate(amounts):
        kept = ids[row, : ids.shape[1] - amount].clone()
        gap, rest = (
            (slice(0, amount), slice(amount, None))
            if side == "left"
            else (slice(len(kept), None), slice(0, len(kept)))
        )
        ids[row, gap], mask[row, gap] = 0, 0
        ids[row, rest] = kept
    return ids, mask


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


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
    whole = ours(ids, attention_mask=mask).logits
    for static in (False, True):
        cache = StaticCache(config=ours.config, max_cache_len=20) if static else DynamicCache(config=ours.config)
        parts = [
            ours(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache, use_cache=True).logits
            for a, b in ((0, 8), (8, 13), (13, 14))  # a prefill, a second piece of it, a single token
        ]
        torch.testing.assert_close(torch.cat(parts, 1)[mask == 1], whole[mask == 1], rtol=1e-4, atol=1e-5)
    cache = ours(ids, attention_mask=mask, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="attention_mask covers 1 positions, but there are 15: 14 cached and 1 new"):
        ours(ids[:, :1], attention_mask=mask[:, :1], past_key_values=cache)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("static", [False, True])
def test_caches(attention: str, static: bool) -> None:
    ours = make_ours()
    ours.set_attn_implementation(attention)
    ids = tokens(2, 14)
    cache = StaticCache(config=ours.config, max_cache_len=20) if static else None
    parts = []
    for a, b in ((0, 6), (6, 10), (10, 11), (11, 14)):
        out = ours(ids[:, a:b], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), ours(ids).logits, rtol=1e-4, atol=1e-5)
    assert ours(ids, use_cache=False).past_key_values is None


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
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
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


@pytest.mark.filterwarnings("ignore")
def test_trainer_divides_the_loss_once(tmp_path: Path) -> None:
    ours = make_ours(loss_chunk_size=5)
    rows = [{"input_ids": ids, "labels": ids.clone()} for ids in tokens(4, 12)]
    for ignored, row in enumerate(rows):
        row["labels"][: 1 + 2 * ignored] = -100  # micro-batches of unequal weight; the first token is no target
    expected = []
    for pair in (rows[:2], rows[2:]):
        summed = sum(
            F.cross_entropy(ours(row["input_ids"][None]).logits[0, :-1], row["labels"][1:], reduction="sum")
            for row in pair
        )
        expected.append(float(summed / sum((row["labels"][1:] != -100).sum() for row in pair)))
    settings = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=2,
        learning_rate=0.0,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        seed=0,
    )

    class InOrder(Trainer):
        def _get_train_sampler(self, *_args, **_kwargs):
            return torch.utils.data.SequentialSampler(rows)

    trainer = InOrder(ours, settings, train_dataset=rows)
    trainer.train()
    assert trainer.model_accepts_loss_kwargs
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(expected, rel=1e-3)


# ---- kernels ----


def test_names_from_a_folder_choose_no_code(tmp_path: Path) -> None:
    make_ours().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    for key in ("attn_implementation", "_attn_implementation"):
        (tmp_path / "config.json").write_text(json.dumps(fields | {key: "someone/kernel"}))
        with pytest.raises(ValueError, match="Unknown attention implementation 'someone/kernel'"):
            GPT2FlashForCausalLM.from_pretrained(tmp_path)


def test_auto_is_understood_when_loading(tmp_path: Path) -> None:
    make_ours().save_pretrained(tmp_path)
    if not torch.cuda.is_available():
        loaded = GPT2FlashForCausalLM.from_pretrained(tmp_path, attn_implementation="auto")
        assert loaded.config._attn_implementation == "sdpa"
    built = AutoModelForCausalLM.from_config(GPT2FlashConfig(**TINY), attn_implementation="auto")
    assert built.config._attn_implementation == "sdpa"  # fp32 weights
    built.set_attn_implementation("eager")
    built.set_attn_implementation("auto")
    assert built.config._attn_implementation == "sdpa"


def dense_flash(q, k, v, softmax_scale=None, causal=False, deterministic=False):
    """`flash_attn_func` of FlashAttention 3: (B, T, H, K) in and out, causality aligned to the last key."""
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1]) if causal else None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale).transpose(1, 2)


def dense_flash_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale=None,
    causal=False,
    deterministic=False,
):
    """`flash_attn_varlen_func`: sequences laid end to end, (tokens, H, K)."""
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    return torch.cat(
        [
            dense_flash(q[None, a:b], k[None, c:d], v[None, c:d], softmax_scale, causal)[0]
            for a, b, c, d in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False)
        ]
    )


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> GPT2FlashForCausalLM:
    """A model on FlashAttention's code path, with dense attention where the kernel would be."""
    package = types.ModuleType("flash_attn_interface")
    package.flash_attn_func, package.flash_attn_varlen_func = dense_flash, dense_flash_varlen
    package.flash_attn_with_kvcache = None
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    ours = make_ours()
    ours.config._attn_implementation = "flash_attention_3"
    return ours


def test_flash_without_padding(flash: GPT2FlashForCausalLM) -> None:
    ids, reference = tokens(), make_ours().bfloat16()
    expected = reference(ids).logits
    torch.testing.assert_close(flash.bfloat16()(ids).logits, expected, rtol=3e-2, atol=3e-2)
    cache = flash(ids[:, :9], use_cache=True).past_key_values
    torch.testing.assert_close(flash(ids[:, 9:], past_key_values=cache).logits, expected[:, 9:], rtol=3e-2, atol=5e-2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_flash_with_padding(flash: GPT2FlashForCausalLM, side: str) -> None:
    ids, mask = pad(tokens(3), [0, 4, 9], side)
    with torch.autocast("cpu", torch.bfloat16):
        expected = make_ours()(ids, attention_mask=mask).logits
        got = flash(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[mask == 1], expected[mask == 1], rtol=3e-2, atol=5e-2)


def test_flash_trains_under_autocast(flash: GPT2FlashForCausalLM) -> None:
    ids, reference = tokens(), make_ours().train()
    flash.train()
    for model in (flash, reference):
        with torch.autocast("cpu", torch.bfloat16):
            model(ids, labels=ids).loss.backward()
    for name, gradient in gradients(flash).items():
        scale = reference.get_parameter(name).grad.abs().max().item()
        torch.testing.assert_close(gradient, reference.get_parameter(name).grad, rtol=0, atol=0.05 * scale + 1e-4)


def test_flash_in_full_precision_gets_a_sentence(flash: GPT2FlashForCausalLM) -> None:
    with pytest.raises(ValueError, match="fp16 or bf16 and got float32"):
        flash(tokens())


# ---- what travels to the Hub ----


def test_sources_survive_the_copy_to_the_hub() -> None:
    """The copier reads imports with a pattern and flattens folders: only `from .module import name` reaches it."""
    sources = sorted(PACKAGE.rglob("*.py"))
    assert all(path.parent == PACKAGE for path in sources)
    modules = {path.stem for path in sources}
    for path in sources:
        text = path.read_text()
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                roots = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{path.name}: an import from above"
                if node.level == 1:
                    assert node.module in modules, f"{path.name}: not a sibling: {ast.unparse(node)}"
                    continue
                roots = {node.module.split(".")[0]}
            else:
                continue
            assert roots <= {"torch", "transformers", "huggingface_hub", "math", "typing"}, ast.unparse(node)
        relative = [line for line in text.splitlines() if line.lstrip().startswith(("from .", "import ."))]
        real = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
        assert len(relative) == len(real), f"{path.name}: prose that looks like an import"
    init = ast.parse((PACKAGE / "__init__.py").read_text())
    assert not any(isinstance(node, ast.ClassDef) for node in ast.walk(init))


def test_as_remote_code_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in (GPT2FlashConfig, GPT2FlashForCausalLM):
        monkeypatch.setattr(cls, "_auto_class", None)  # put back afterwards what the next two lines set
    GPT2FlashConfig.register_for_auto_class()
    GPT2FlashForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    ours = make_ours()
    ours.save_pretrained(tmp_path / "model")
    copied = {path.name for path in (tmp_path / "model").glob("*.py")}
    assert copied == {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    program = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True).eval()
assert "modeling_gpt2flash" not in sys.modules and type(model).__module__.startswith("transformers_modules")
ids = torch.arange(1, 11)[None]
print(model(ids, labels=ids).loss.item(), model.generate(ids, max_new_tokens=3, do_sample=False).tolist())
"""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ids = torch.arange(1, 11)[None]
    written = ours.generate(ids, max_new_tokens=3, do_sample=False).tolist()
    assert done.stdout.strip() == f"{ours(ids, labels=ids).loss.item()} {written}"


# ---- on a GPU ----

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
KERNELS = [name for name in modeling_gpt2flash.ATTENTION_NAMES if name.startswith("flash")]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("padded", [False, True])
def test_flash_is_as_near_to_fp32_as_sdpa(kernel: str, padded: bool) -> None:
    try:
        modeling_gpt2flash.choose_attention(kernel, "cuda", torch.bfloat16, 32)
    except ValueError as error:
        pytest.skip(str(error))
    sizes = {"n_embd": 128, "n_head": 4, "n_positions": 256}
    ids = tokens(4, 200).cuda()
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :50], mask[2, :120] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    results = {}
    for name, dtype in (("exact", torch.float32), ("sdpa", torch.bfloat16), (kernel, torch.bfloat16)):
        model = make_ours(**sizes, attn_implementation="sdpa" if name == "exact" else name).cuda().train()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            out = model(ids, attention_mask=mask, labels=labels, skip_logits=False)
        out.loss.backward()
        results[name] = [out.logits[mask == 1].float(), *gradients(model).values()]
    for exact, sdpa, ours in zip(results["exact"], results["sdpa"], results[kernel], strict=True):
        assert (ours - exact).abs().max() <= 2 * (sdpa - exact).abs().max() + 1e-5


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_chunked_loss_on_a_gpu(dtype: torch.dtype) -> None:
    ours, ids = make_ours(vocab_size=50257, n_embd=96).cuda().train(), tokens(4, 32).cuda()
    found = []
    for chunk_size in (0, 40):
        ours.config.loss_chunk_size = chunk_size
        ours.zero_grad()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = ours(ids, labels=ids).loss
        loss.backward()
        found.append((loss, ours.lm_head.weight.grad.clone()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=1e-3)
    scale = found[0][1].abs().max().item()
    torch.testing.assert_close(
        found[0][1], found[1][1], rtol=0, atol=scale * (1e-4 if dtype == torch.float32 else 3e-2)
    )
