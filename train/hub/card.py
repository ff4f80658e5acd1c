"""The model card of a run, from what it has measured and its configuration."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from train.checkpoints.loading import SIZES
from train.checkpoints.run_folder import FinishedRun
from train.compare.figures import written
from train.generate.decoding import Decoding
from train.metrics.table import METRICS
from train.utils.tables import markdown_table

CHART = "training_loss.png"
# Settings of how the run was carried out, not of what was trained.
LEFT_OUT = {"checkpoint_path", "push_to_hub", "report_to", "resume_from_checkpoint", "delete_newer_checkpoints",
            "overwrite", "train_data_path", "val_data_path", "model", "prompt", "max_new_tokens", "profile",
            "profile_steps", "memory_snapshot", "save_interval", "save_total_limit", "run_type"}  # fmt: skip


def card(run: FinishedRun, repo: str) -> ModelCard:
    """The card of a finished run that goes to the Hub as `repo`."""
    summary = run.summary
    sample, hardware, versions = summary.get("sample"), summary["hardware"], summary["versions"]
    cpu = f"{hardware['cpu']} ({hardware['cpu_usable_cores']} cores)"
    packages = [name for name in ("gpt2flash", "torch", "transformers", "deepspeed") if name in versions]
    return ModelCard.from_template(
        metadata(summary, repo),
        template_path=str(Path(__file__).with_name("card.md.jinja")),
        name=repo.rpartition("/")[2],
        repo=repo,
        summary=summary,
        origin=origin(summary["config"]["model"]),
        decoding=Decoding(),
        prompt=json.dumps(sample["prompt"], ensure_ascii=False)[1:-1] if sample else "",
        metrics=markdown_table(("metric", "value"), list(metric_rows(run))),
        chart=CHART,
        data=markdown_table(("split", "tokens", "source"), list(data_rows(summary))),
        settings=markdown_table(("setting", "value"), list(settings(summary))),
        device=hardware["gpus"][0]["name"] if hardware["gpus"] else cpu,
        versions=", ".join(f"{name} {versions[name]}" for name in packages),
    )


def metadata(summary: dict[str, Any], repo: str) -> ModelCardData:
    """What the Hub reads: the task, the base model, the data's id, and the validation as evaluation results."""
    source, model = source_of(summary, "val"), summary["config"]["model"]
    dataset = source.get("hub_id") or source.get("dataset")
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset or "custom",
            dataset_name=dataset or "validation tokens of the run",
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
        base_model=model.partition("@")[0] if is_hub_id(model) else None,
        datasets=[hub_id] if hub_id else None,
        model_name=repo.rpartition("/")[2],
        eval_results=results or None,
    )


def is_hub_id(model: str) -> bool:
    return model.count("/") == 1 and not model.endswith(".pt") and not Path(model).exists()


def source_of(summary: dict[str, Any], split: str) -> dict[str, Any]:
    """Where the tokens of a split came from, by their sidecar; empty for a bare file."""
    return summary["data"][split].get("source") or {}


def origin(model: str) -> str:
    if model in SIZES:
        return "initialized at random"
    return f"started from the weights of `{model}`" if is_hub_id(model) else "started from other weights"


def metric_rows(run: FinishedRun) -> Iterable[tuple[str, str]]:
    """Title and value of the metrics that the table marks for the card, as far as they are known."""
    for metric in METRICS:
        value = run.get(metric.key)
        if metric.card and value is not None:
            title, [text] = written(metric, [value])
            yield title + (" (nats per token)" if metric.kind == "nats" else ""), text


def data_rows(summary: dict[str, Any]) -> Iterable[tuple[str, str, str]]:
    for split in ("train", "val"):
        facts, source = summary["data"][split], source_of(summary, split)
        known = ", ".join(str(source[key]) for key in ("hub_id", "subset", "revision") if source.get(key))
        digest = f"SHA-256 `{facts['sha256'][:16]}…`" if facts.get("sha256") else ""
        named = known or source.get("dataset") or "not recorded"
        if "tokens" in facts:
            yield split, f"{facts['tokens']:,}", ", ".join(filter(None, (named, digest)))


def settings(summary: dict[str, Any]) -> Iterable[tuple[str, str]]:
    yield "steps", f"{summary['steps']:,}"
    yield "tokens per step", f"{summary['tokens_per_step']:,}"
    yield "precision of matmuls", summary["precision"]
    config = summary["config"]
    for key, value in config.items():
        if key not in LEFT_OUT and value not in (None, False, "") and not (key == "epochs" and config["max_steps"]):
            yield key, str(value)
