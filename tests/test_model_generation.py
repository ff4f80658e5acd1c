"""generate() and the text-generation pipeline on our model: token for token what stock GPT-2 writes."""

import copy
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
)

from modeling_gpt2flash import GPT2FlashForCausalLM
from tests.conftest import command
from tests.tiny_gpt2 import make_pair, pad, tokens
from train.checkpoints.loading import own_tokenizer

Pair = tuple[GPT2LMHeadModel, GPT2FlashForCausalLM]

SIZES = {"vocab_size": 300, "n_positions": 64}
PROMPTS = ["import os", "def f(self, x):\n    return"]
PLAIN = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
SAMPLED = PLAIN | {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.95}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Stock GPT-2 and ours, of the same large random weights: every token depends on all before it."""
    return make_pair(tmp_path_factory.mktemp("pair"), **SIZES)


@pytest.fixture(scope="module")
def assistants(pair: Pair) -> Pair:
    """The first of the two blocks alone, so that some guesses are right and some wrong."""
    copies = copy.deepcopy(pair)
    for model in copies:
        model.transformer.h = model.transformer.h[:1]
        model.config.n_layer = 1
    return copies


@pytest.fixture(scope="module")
def tokenizer(tuned_from: Path) -> PreTrainedTokenizerBase:
    found = own_tokenizer(str(tuned_from), n_positions=64)
    assert found is not None
    return found


def written(model: Any, ids: Tensor, **how: Any) -> Any:
    torch.manual_seed(3)
    return model.generate(ids, attention_mask=how.pop("attention_mask", torch.ones_like(ids)), **how)


@pytest.mark.parametrize(
    "how",
    [
        PLAIN | {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5, "early_stopping": True},
        SAMPLED | {"num_beams": 3},
        SAMPLED | {"num_return_sequences": 3},
        PLAIN | {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "bad_words_ids": [[7], [8, 9]]},
        SAMPLED | {"min_p": 0.05, "typical_p": 0.9, "renormalize_logits": True},
        PLAIN | {"eos_token_id": list(range(0, 300, 7)), "num_beams": 3},
    ],
    ids=["beams", "sampled beams", "several texts", "penalties", "min_p", "beams that end"],
)
def test_ways_of_decoding(pair: Pair, how: dict[str, Any]) -> None:
    ids, mask = pad(tokens(3, 9), [0, 2, 5], "left")
    expected, got = (written(model, ids, attention_mask=mask, **how) for model in pair)
    assert torch.equal(got, expected)
    assert len(got[:, 9:].unique()) > 6, "texts that repeat a token could not tell the ways apart"


@pytest.mark.parametrize("how", [PLAIN, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("guesser", ["assistant", "itself", "prompt"])
def test_guessed_tokens(pair: Pair, assistants: Pair, guesser: str, how: dict[str, Any]) -> None:
    period = tokens(1, 5)
    ids = torch.cat([period] * 3, dim=1)
    results = []
    for model, assistant in zip(pair, assistants, strict=True):
        calls: list[None] = []
        hook = model.lm_head.register_forward_hook(lambda *_, calls=calls: calls.append(None))
        guess: dict[str, Any] = {
            "assistant": {"assistant_model": assistant},
            "itself": {"assistant_model": model},
            "prompt": {"prompt_lookup_num_tokens": 3},
        }[guesser]
        results.append((written(model, ids, **how, **guess), len(calls)))
        hook.remove()
    (expected, stock_calls), (got, our_calls) = results
    assert torch.equal(got, expected)
    assert our_calls == stock_calls
    if how is PLAIN:
        assert torch.equal(got, written(pair[1], ids, **PLAIN)), "guesses change no text"


def test_scores_and_hidden_states(pair: Pair) -> None:
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected, got = (
        written(model, tokens(2, 7), output_hidden_states=True, **wanted, **SAMPLED | {"num_beams": 2})
        for model in pair
    )
    for name in ("sequences", "sequences_scores", "beam_indices"):
        assert torch.equal(got[name], expected[name])
    for name in ("scores", "logits"):
        assert all(torch.equal(*step) for step in zip(got[name], expected[name], strict=True))
    for ours, stock in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert all(torch.equal(*layer) for layer in zip(ours, stock, strict=True))


def test_stopping(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> None:
    inputs = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    whole = written(pair[0], inputs, **PLAIN)[0, inputs.shape[1] :]
    last = next(place for place in range(3, 11) if tokenizer.decode(whole[place]).strip().isalnum())
    word = tokenizer.decode(whole[last])
    at_a_token = StoppingCriteriaList([lambda ids, scores, **_: ids[:, -1] == whole[last]])
    for how in ({"stop_strings": [word], "tokenizer": tokenizer}, {"stopping_criteria": at_a_token}):
        expected, got = (written(model, inputs, **PLAIN, **how) for model in pair)
        assert torch.equal(got, expected)
        assert got.shape[1] - inputs.shape[1] <= last + 1, "it has stopped"


def test_a_streamer_gets_the_text_in_pieces(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> None:
    inputs = tokenizer(PROMPTS[1], return_tensors="pt").input_ids
    texts = []
    for model in pair:
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
        writer = threading.Thread(target=written, args=(model, inputs), kwargs={"streamer": streamer, **SAMPLED})
        writer.start()
        pieces = list(streamer)
        writer.join()
        assert len(pieces) > 3
        texts.append("".join(pieces))
    assert texts[1] == texts[0]
    assert texts[0] == tokenizer.decode(written(pair[1], inputs, **SAMPLED)[0, inputs.shape[1] :])


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": True, "num_return_sequences": 2, "return_full_text": False},
        {"do_sample": False, "num_beams": 2, "batch_size": 2},
    ],
    ids=["greedy", "sampled", "batch"],
)
def test_the_pipeline_from_a_folder(
    pair: Pair, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, how: dict[str, Any]
) -> None:
    texts = []
    for model, name in zip(pair, ("stock", "ours"), strict=True):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        write = pipeline("text-generation", model=str(tmp_path / name), device="cpu")
        assert type(write.model) is type(model)
        torch.manual_seed(3)
        texts.append(write(PROMPTS, max_new_tokens=12, **how))
    assert texts[1] == texts[0]
    assert all(text["generated_text"].strip() for prompt in texts[0] for text in prompt)


@pytest.mark.slow
def test_the_pipeline_on_the_copy_of_the_hub(
    pair: Pair, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for saved in (pair[1], tokenizer):
        saved.save_pretrained(tmp_path / "model")
    program = f"""
import sys
sys.modules["modeling_gpt2flash"] = None  # not installed
from transformers import pipeline
write = pipeline("text-generation", model="model", trust_remote_code=True, device="cpu")
assert type(write.model).__module__.startswith("transformers_modules.model."), type(write.model)
print(repr(write({PROMPTS}, max_new_tokens=12, do_sample=False)))
"""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", "")
    done = command(sys.executable, "-c", program, cwd=tmp_path)
    write = pipeline("text-generation", model=pair[0], tokenizer=tokenizer, device="cpu")
    assert done.stdout.splitlines()[-1] == repr(write(PROMPTS, max_new_tokens=12, do_sample=False))
    assert "not supported" not in done.stderr
