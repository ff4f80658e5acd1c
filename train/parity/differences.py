"""How far one run is from the float64 oracle, read from the files that it left.

    loss       |run - oracle| / |oracle|, mean of the global batch                      metrics.jsonl
    grad_norm  |run - oracle| / |oracle|, before clipping                               metrics.jsonl
    gradient   ||run - oracle|| / ||oracle||, of each tensor, after clipping            optimizer.safetensors
    weight     ||run - oracle|| / ||oracle||, of each tensor, after the step            model.safetensors
    key_bias   ||logits' - logits|| / ||logits||, the oracle's with the run's key biases and with its own

||.|| is the Euclidean norm over a tensor's elements. The largest element would say less: AdamW divides each gradient
by its own size, so where one comes out near 0 its rounding noise alone turns into a good part of a whole step, in any
float32 run. One among thousands of elements is like that (with GPT-2's own initial weights one was off by 4.4e-5 of
its tensor's largest, in a tensor right to 2.5e-6) and says nothing of the layout.

No engine need show its gradient, for AdamW's first moment m keeps it: g(t) = (m(t) - beta1 m(t-1)) / (1 - beta1). With
beta1 = 0.9 this costs a digit: m's float32 rounding counts tenfold.

The bias of attention's keys (`c_attn.bias[width : 2 width]`) has a gradient of exactly 0, for the softmax does not see
what it adds to all scores of a row. In float32 it is nothing but rounding noise, of which AdamW makes steps as large
as any. It is left out of `gradient` and `weight`; `key_bias` shows that whatever a run made of it changes nothing.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from train.checkpoints.run_folder import read_steps
from train.parity.reference import BETA1, Oracle

TOLERANCES = {"loss": 1e-6, "grad_norm": 1e-5, "gradient": 1e-5, "weight": 1e-5, "key_bias": 1e-12}
KEY_BIAS = "attn.c_attn.bias"


@dataclass(frozen=True)
class Difference:
    """How far a run is from the oracle, and where it is that far."""

    value: float  # infinite where the run has no number
    where: str = ""


def differences(run_folder: Path, oracle: Oracle) -> dict[str, Difference]:
    """The largest difference of each kind in `TOLERANCES`, of a run that saved each of its steps.

    Raises:
        ValueError: when steps or tensors are missing, or have another shape than the oracle's.
        OSError, SafetensorError: when a file cannot be read.
    """
    found = list(_all(run_folder, oracle))
    return {
        kind: max((difference for key, difference in found if key == kind), key=lambda difference: difference.value)
        for kind in TOLERANCES
    }


def is_green(found: Mapping[str, Difference]) -> bool:
    return all(found[kind].value <= tolerance for kind, tolerance in TOLERANCES.items())


def _all(run_folder: Path, oracle: Oracle) -> Iterator[tuple[str, Difference]]:
    records = read_steps(run_folder / "metrics.jsonl")
    if len(records) != len(oracle.steps):
        raise ValueError(f"it logged {len(records)} steps of {len(oracle.steps)}")
    before: dict[str, torch.Tensor] = {}
    for index, (record, step) in enumerate(zip(records, oracle.steps, strict=True)):
        place = f"step {index + 1}"
        for kind, right in (("loss", step.loss), ("grad_norm", step.grad_norm)):
            value = math.nan if record.get(kind) is None else record[kind]
            yield kind, _difference(abs(value - right) / abs(right), place)

        folder = run_folder / f"step-{index + 1}"
        weights = load_file(folder / "model.safetensors")
        _same_names("weights", weights, step.weights)
        for name, theirs in step.weights.items():
            yield "weight", relative(_without_keys(name, weights[name]), _without_keys(name, theirs), place, name)
        yield (
            "key_bias",
            relative(oracle.logits_with(index, _key_biases(weights, step.weights)), step.logits, place, "logits"),
        )

        moments = load_file(folder / "optimizer.safetensors")
        after = {
            name.removeprefix("exp_avg."): m.double() for name, m in moments.items() if name.startswith("exp_avg.")
        }
        _same_names("moments", after, step.gradients)
        for name, theirs in step.gradients.items():
            ours = (after[name] - BETA1 * before.get(name, torch.zeros(()))) / (1 - BETA1)
            yield "gradient", relative(_without_keys(name, ours), _without_keys(name, theirs), place, name)
        before = after


def relative(ours: torch.Tensor, theirs: torch.Tensor, *where: str) -> Difference:
    """||ours - theirs|| / ||theirs|| over all elements, in float64."""
    if ours.shape != theirs.shape:
        raise ValueError(f"{', '.join(where)}: {tuple(ours.shape)} is not the shape {tuple(theirs.shape)}")
    return _difference(float((ours.double() - theirs.double()).norm() / theirs.double().norm()), *where)


def _difference(value: float, *where: str) -> Difference:
    return Difference(math.inf if math.isnan(value) else value, ", ".join(where))


def _same_names(what: str, ours: Mapping[str, object], theirs: Mapping[str, object]) -> None:
    if ours.keys() != theirs.keys():
        raise ValueError(f"its {what} are other tensors: {sorted(ours.keys() ^ theirs.keys())}")


def _without_keys(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The queries' and values' part of an attention bias; every other tensor whole."""
    if not name.endswith(KEY_BIAS):
        return tensor
    query, _, value = tensor.chunk(3)
    return torch.cat([query, value])


def _key_biases(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The attention biases of `theirs`, with the keys' part of `ours`."""
    mixed = {}
    for name, bias in theirs.items():
        if name.endswith(KEY_BIAS):
            query, _, value = bias.chunk(3)
            mixed[name] = torch.cat([query, ours[name].to(bias).chunk(3)[1], value])
    return mixed
