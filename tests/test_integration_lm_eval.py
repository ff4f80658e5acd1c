"""lm-evaluation-harness on a folder of ours: its numbers are those worked out by hand, and stock GPT-2's."""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_gpt2flash import GPT2FlashForCausalLM
from tests.conftest import command
from tests.tiny_gpt2 import save_like_a_run
from train.export import __main__ as export

pytestmark = pytest.mark.integration
TEXT = json.__doc__ or ""
CHOICES = ["return", "import json", "{'a': 1}", "indent=4)"]


class Evaluated(NamedTuple):
    """A model, its tokenizer, and what the harness has printed of its folder and of the exported one."""

    model: GPT2FlashForCausalLM
    tokenizer: PreTrainedTokenizerBase
    ours: dict[str, dict[str, Any]]
    stock: dict[str, dict[str, Any]]


def documents() -> list[str]:
    """Of one window and of several."""
    return [TEXT[:60], TEXT[:700], TEXT[700:1100]]


def prompts() -> list[str]:
    lines = [line.strip() for line in TEXT.splitlines() if len(line.strip()) > 30][:8]
    return [f"{line[: 8 + 3 * index]}:" for index, line in enumerate(lines)]


def write_tasks(folder: Path, continuations: list[str]) -> None:
    """Three tasks, each its YAML and its JSON lines: perplexity, choice, and writing."""

    def task(name: str, lines: list[dict[str, Any]], **settings: Any) -> None:
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, "test_split": "test", **data, **settings}))

    task(
        "local_text",
        [{"text": text} for text in documents()],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )
    task(
        "local_choice",
        [{"prompt": text, "choices": CHOICES, "answer": i % len(CHOICES)} for i, text in enumerate(prompts())],
        output_type="multiple_choice",
        doc_to_text="prompt",
        doc_to_choice="choices",
        doc_to_target="answer",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    task(
        "local_writing",
        [{"prompt": text, "written": then} for text, then in zip(prompts(), continuations, strict=True)],
        output_type="generate_until",
        doc_to_text="prompt",
        doc_to_target="written",
        generation_kwargs={"until": [], "max_gen_toks": 6, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )


def evaluate(folder: Path, tasks: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    command(
        "lm_eval", "run", "--model=hf", "--model_args", f"pretrained={folder}", "dtype=float32", *arguments,
        "--include_path", tasks, "--tasks", "local_text,local_choice,local_writing", "--device=cpu",
        "--batch_size=3", "--output_path", tasks / folder.name, cwd=tasks,
    )  # fmt: skip
    (file,) = (tasks / folder.name).rglob("results_*.json")
    return json.loads(file.read_text())["results"]


@pytest.fixture(scope="module")
def evaluated(tuned_from: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    root = tmp_path_factory.mktemp("evaluated")
    model = save_like_a_run(root / "run", tuned_from, initializer_range=0.5)
    tokenizer = AutoTokenizer.from_pretrained(root / "run")
    export.main([str(root / "run"), str(root / "gpt2")])
    continuations = []
    for text in prompts():
        ids = tokenizer(text, return_tensors="pt").input_ids
        written = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        continuations.append(tokenizer.decode(written, skip_special_tokens=True))
    write_tasks(root, continuations)
    ours = evaluate(root / "run", root, "trust_remote_code=True")
    return Evaluated(model, tokenizer, ours, evaluate(root / "gpt2", root))


def loglikelihood(model: GPT2FlashForCausalLM, context: list[int], ids: list[int]) -> float:
    """Of `ids` behind at least a token of context, in windows as long as the model is; each starts as far back as
    it can and counts what is new in it."""
    stream, total, end = [*context, *ids], 0.0, 0
    size = model.config.n_positions
    while end < len(ids):
        start, end = end, min(end + size, len(ids))
        last = len(context) + end - 1
        window = torch.tensor([stream[max(0, last - size) : last]])
        with torch.no_grad():
            logs = model(window).logits[0, start - end :].double().log_softmax(-1)
        total += logs.gather(-1, torch.tensor(ids[start:end])[:, None]).sum().item()
    return total


def test_perplexity(evaluated: Evaluated) -> None:
    encoded = [evaluated.tokenizer(text).input_ids for text in documents()]
    assert max(map(len, encoded)) > 2 * evaluated.model.config.n_positions
    total = sum(loglikelihood(evaluated.model, [evaluated.tokenizer.bos_token_id], ids) for ids in encoded)
    words = sum(len(re.split(r"\s+", text)) for text in documents())
    size = sum(len(text.encode()) for text in documents())
    found = evaluated.ours["local_text"]
    assert found["bits_per_byte,none"] == pytest.approx(-total / size / math.log(2), rel=1e-5)
    assert math.log(found["word_perplexity,none"]) == pytest.approx(-total / words, rel=1e-5)


def test_choices(evaluated: Evaluated) -> None:
    right = {"acc": 0, "acc_norm": 0}
    for index, prompt in enumerate(prompts()):
        context = evaluated.tokenizer(prompt).input_ids
        scores = []
        for choice in CHOICES:
            both = evaluated.tokenizer(f"{prompt} {choice}").input_ids
            assert both[: len(context)] == context
            scores.append(loglikelihood(evaluated.model, context, both[len(context) :]))
        by_length = [score / len(choice) for score, choice in zip(scores, CHOICES, strict=True)]
        for metric, values in (("acc", scores), ("acc_norm", by_length)):
            right[metric] += values.index(max(values)) == index % len(CHOICES)
    found = evaluated.ours["local_choice"]
    assert {metric: found[f"{metric},none"] for metric in right} == {
        metric: count / len(prompts()) for metric, count in right.items()
    }


def test_writing_in_padded_batches(evaluated: Evaluated) -> None:
    assert evaluated.ours["local_writing"]["exact_match,none"] == 1.0


def test_stock_gpt2_has_the_same_numbers(evaluated: Evaluated) -> None:
    for task, found in evaluated.ours.items():
        for metric, value in found.items():
            if isinstance(value, float):
                assert value == pytest.approx(evaluated.stock[task][metric], rel=1e-5), (task, metric)
