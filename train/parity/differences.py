"""The differences between a run and the float64 reference, read from the files that the run wrote.

    loss       |run - ref| / |ref|, mean of the global batch                            metrics.jsonl
    grad_norm  |run - ref| / |ref|, before clipping                                     metrics.jsonl
    gradient   ||run - ref|| / ||ref||, of each tensor, after clipping                  optimizer.safetensors
    weight     ||run - ref|| / ||ref||, of each tensor, after the step                  model.safetensors
    key_bias   ||logits' - logits|| / ||logits||, the reference's with the run's key biases and with its own

||.|| is the Euclidean norm over a tensor's elements. The largest difference of an element would say less: AdamW
divides each gradient by its own magnitude, so where a gradient is nearly 0 its rounding error becomes a good part of a
step, in any float32 run.

Engines need not expose gradients: AdamW's first moment m holds them, g(t) = (m(t) - beta1 m(t-1)) / (1 - beta1). With
beta1 = 0.9 this costs a digit: m's float32 rounding error counts tenfold.

The bias of attention's keys (`c_attn.bias[width : 2 width]`) has a gradient of exactly 0, since softmax ignores what
it adds to all scores of a row. In float32 the gradient is rounding error, of which AdamW makes steps as large as any.
It is left out of `gradient` and `weight`; `key_bias` shows that its value does not matter.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from train.checkpoints.run_folder import read_steps
from train.parity.reference import BETA1, Reference

TOLERANCES = {"loss": 1e-6, "grad_norm": 1e-5, "gradient": 1e-5, "weight": 1e-5, "key_bias": 1e-12}
KEY_BIAS = "attn.c_attn.bias"


@dataclass(frozen=True)
class Difference:
    """A relative difference between run and reference, and where it is."""

    value: float  # infinite if the run has no number
    where: str


def differences(run_folder: Path, reference: Reference) -> dict[str, Difference]:
    """The largest difference of each kind in `TOLERANCES`, of a run that saved each of its steps.

    Raises:
        ValueError: when steps or tensors are missing, or have another shape than the reference's.
        OSError, SafetensorError: when a file cannot be read.
    """
    found = list(_all(run_folder, reference))
    return {
        kind: max((difference for key, difference in found if key == kind), key=lambda difference: difference.value)
        for kind in TOLERANCES
    }


def _all(run_folder: Path, reference: Reference) -> Iterator[tuple[str, Difference]]:
    records, _ = read_steps(run_folder / "metrics.jsonl")
    if len(records) != len(reference.steps):
        raise ValueError(f"it logged {len(records)} steps of {len(reference.steps)}")
    before: dict[str, torch.Tensor] = {}
    for index, (record, step) in enumerate(zip(records, reference.steps, strict=True)):
        where = f"step {index + 1}"
        for kind, right in (("loss", step.loss), ("grad_norm", step.grad_norm)):
            value = math.nan if record.get(kind) is None else record[kind]
            yield kind, _difference(abs(value - right) / abs(right), where)

        folder = run_folder / f"step-{index + 1}"
        weights = load_file(folder / "model.safetensors")
        _same_names("weights", weights, step.weights)
        for name, expected in step.weights.items():
            yield "weight", relative(_without_keys(name, weights[name]), _without_keys(name, expected), where, name)
        logits = reference.logits_with(index, _key_biases(weights, step.weights))
        yield "key_bias", relative(logits, step.logits, where, "logits")

        moments = load_file(folder / "optimizer.safetensors")
        after = {
            name.removeprefix("exp_avg."): m.double() for name, m in moments.items() if name.startswith("exp_avg.")
        }
        _same_names("moments", after, step.gradients)
        for name, expected in step.gradients.items():
            actual = (after[name] - BETA1 * before.get(name, torch.zeros(()))) / (1 - BETA1)
            yield "gradient", relative(_without_keys(name, actual), _without_keys(name, expected), where, name)
        before = after


def relative(actual: torch.Tensor, expected: torch.Tensor, *where: str) -> Difference:
    """||actual - expected|| / ||expected|| over all elements, in float64."""
    if actual.shape != expected.shape:
        raise ValueError(f"{', '.join(where)}: {tuple(actual.shape)} is not the shape {tuple(expected.shape)}")
    return _difference(float((actual.double() - expected.double()).norm() / expected.double().norm()), *where)


def _difference(value: float, *where: str) -> Difference:
    return Difference(math.inf if math.isnan(value) else value, ", ".join(where))


def _same_names(what: str, actual: Mapping[str, object], expected: Mapping[str, object]) -> None:
    if actual.keys() != expected.keys():
        raise ValueError(f"its {what} have different tensors: {sorted(actual.keys() ^ expected.keys())}")


def _without_keys(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The queries' and values' part of an attention bias; any other tensor as it is."""
    return torch.cat(tensor.chunk(3)[::2]) if name.endswith(KEY_BIAS) else tensor


def _key_biases(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The attention biases of `expected`, with the keys' part of `actual`."""
    mixed = {}
    for name, bias in expected.items():
        if name.endswith(KEY_BIAS):
            query, _, value = bias.chunk(3)
            mixed[name] = torch.cat([query, actual[name].to(bias).chunk(3)[1], value])
    return mixed
