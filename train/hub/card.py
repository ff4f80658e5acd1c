"""The model card of a run, from what the run has measured and been told."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from train.checkpoints.loading import SIZES
from train.checkpoints.run_folder import FinishedRun
from train.utils.tables import markdown_table

CHART = "training_loss.png"
# Flags that say how the run was carried out, not what was trained.
LEFT_OUT = {"checkpoint_path", "push_to_hub", "report_to", "resume_from_checkpoint", "overwrite", "train_data_path",
            "val_data_path", "model", "prompt", "max_new_tokens", "profile", "profile_steps", "memory_snapshot",
            "save_interval", "save_total_limit", "run_type"}  # fmt: skip


def card(run: FinishedRun, repo: str) -> ModelCard:
    """The card of a finished run that goes to the Hub as `repo`."""
    summary, config = run.summary, run.summary["config"]
    return ModelCard(f"---\n{metadata(summary, config, repo).to_yaml()}\n---\n\n{text(summary, config, repo)}")


def metadata(summary: dict[str, Any], config: dict[str, Any], repo: str) -> ModelCardData:
    """What the Hub reads: the task, what was tuned, the data's id, and the validation as evaluation results."""
    source = source_of(summary, "val")
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=source.get("hub_id") or source.get("dataset") or "custom",
            dataset_name=source.get("hub_id") or source.get("dataset") or "validation tokens of the run",
            dataset_split="validation",
            metric_type=metric,
            metric_name=name,
            metric_value=round(summary[key], 4),
        )
        for metric, name, key in (
            ("loss", "validation loss (nats per token)", "val_loss"),
            ("perplexity", "perplexity per token", "perplexity"),
        )
        if summary.get(key) is not None
    ]
    hub_id = source_of(summary, "train").get("hub_id")
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "gpt2flash"],
        base_model=config["model"].partition("@")[0] if is_hub_id(config["model"]) else None,
        datasets=[hub_id] if hub_id else None,
        model_name=repo.rpartition("/")[2],
        eval_results=results or None,
    )


def is_hub_id(model: str) -> bool:
    return model.count("/") == 1 and not model.endswith(".pt") and not Path(model).exists()


def source_of(summary: dict[str, Any], split: str) -> dict[str, Any]:
    """Where the tokens of a split came from, by their sidecar; empty for a bare file."""
    return summary["data"][split].get("source") or {}


def text(summary: dict[str, Any], config: dict[str, Any], repo: str) -> str:
    model, hardware = summary["model"], summary["hardware"]
    sample = summary.get("sample")
    command = summary.get("command")  # runs of older versions did not keep it
    how = f"\n```bash\n{command}\n```\n" if command else ""
    return f"""# {repo.rpartition("/")[2]}

A GPT-2 of {summary["parameters"]:,} parameters ({model["n_layer"]} layers, {model["n_head"]} heads, width
{model["n_embd"]}, {model["n_positions"]} positions, {model["vocab_size"]:,} tokens), {origin(config["model"])},
trained on {summary["tokens"]:,} tokens.

## Use

```python
from transformers import pipeline

write = pipeline("text-generation", model="{repo}", trust_remote_code=True)
print(write("{prompt_of(sample)}", max_new_tokens=50)[0]["generated_text"])
```

The code beside the weights adds FlashAttention and a loss in chunks. Without it, stock GPT-2 opens the same weights:
`GPT2LMHeadModel.from_pretrained("{repo}")`.

## Result

{markdown_table(("figure", "value"), list(figures(summary)))}

![training loss]({CHART})
{sample_text(sample)}
## Data

{markdown_table(("split", "tokens", "source"), list(data_rows(summary)))}

## Training

{markdown_table(("setting", "value"), list(settings(summary, config)))}

Trained by {processes(summary)} on {device_of(hardware)}, {hardware["platform"]}; {versions_of(summary)}.
{how}
## Limits

It continues text and says what such text often says, true or not. What is in its data, bias and private matter
included, can come out of it. It reads {model["n_positions"]} tokens at most, and was trained on sequences of
{summary["block_size"]}. Its figures are of the validation text above and of no other.

## Licence

The code beside the weights is Apache-2.0. The weights' licence is for who trained them to state, with the data's terms
in view.
"""


def origin(model: str) -> str:
    if model in SIZES:
        return "initialised at random"
    return f"started from the weights of `{model}`" if is_hub_id(model) else "started from other weights"


def prompt_of(sample: dict[str, str] | None) -> str:
    return (sample["prompt"] if sample else "").replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def sample_text(sample: dict[str, str] | None) -> str:
    if sample is None:
        return ""
    lines = "\n".join(f"    {line}" for line in sample["text"].splitlines())
    return f"\nA sample, drawn at temperature 0.8 of the 50 likeliest tokens:\n\n{lines}\n"


def figures(summary: dict[str, Any]) -> Iterable[tuple[str, str]]:
    for name, key, form in (
        ("validation loss (nats per token)", "val_loss", ".4f"),
        ("perplexity", "perplexity", ".2f"),
        ("training loss at the end", "train_loss", ".4f"),
        ("tokens/s in training", "tokens_per_second", ",.0f"),
        ("training time (s)", "training_time_seconds", ",.0f"),
        ("peak memory (MB)", "peak_memory_bytes", ",.0f"),
        ("MFU", "mfu", ".1%"),
        ("energy (J per token)", "joules_per_token", ".4f"),
    ):
        value = summary.get(key)
        if value is not None:
            yield name, format(value / 1e6 if key == "peak_memory_bytes" else value, form)


def data_rows(summary: dict[str, Any]) -> Iterable[tuple[str, str, str]]:
    for split in ("train", "val"):
        facts, source = summary["data"][split], source_of(summary, split)
        known = ", ".join(str(source[key]) for key in ("hub_id", "subset", "revision") if source.get(key))
        digest = f"SHA-256 `{facts['sha256'][:16]}…`" if facts.get("sha256") else ""
        named = known or source.get("dataset") or "not recorded"
        if "tokens" in facts:
            yield split, f"{facts['tokens']:,}", ", ".join(filter(None, (named, digest)))


def settings(summary: dict[str, Any], config: dict[str, Any]) -> Iterable[tuple[str, str]]:
    yield "steps", f"{summary['steps']:,}"
    yield "tokens per step", f"{summary['tokens_per_step']:,}"
    yield "precision of the products", summary["precision"]
    for key, value in config.items():
        if key not in LEFT_OUT and value not in (None, False, "") and not (key == "epochs" and config["max_steps"]):
            yield key, str(value)


def device_of(hardware: dict[str, Any]) -> str:
    if hardware["gpus"]:
        return hardware["gpus"][0]["name"]
    return f"{hardware['cpu']} ({hardware['cpu_usable_cores']} cores)"


def processes(summary: dict[str, Any]) -> str:
    return "one process" if summary["world_size"] == 1 else f"{summary['world_size']} processes"


def versions_of(summary: dict[str, Any]) -> str:
    found = summary["versions"]
    return ", ".join(
        f"{name} {found[name]}" for name in ("gpt2flash", "torch", "transformers", "deepspeed") if name in found
    )
