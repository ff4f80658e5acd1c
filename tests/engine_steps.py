"""Steps of an engine by hand, for tests: `torchrun ... -m tests.engine_steps SCENARIO OUT <flags of train>`.

A scenario does what the training loop does not. Each process of data-parallel rank 0 writes what it saw of each step
to OUT/<rank>.json, the main process the weights in the end to OUT/weights.safetensors.
"""

import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from train.checkpoints.loading import load_for_inference, load_tokenizer
from train.config.run_config import parse
from train.engines.base import Engine, StepResult
from train.engines.pipeline.engine import PipelinedEngine
from train.generate.decoding import Decoding
from train.generate.texts import generate_text
from train.metrics.memory_tracker import MemoryTracker
from train.run.loop import build, micro_batches
from train.run.saving import save_checkpoint
from train.run.setup import ResolvedRun, resolve
from train.run.validate import validate

Batch = dict[str, torch.Tensor]
LEARNING_RATE = 1e-3


def packed(batch: Batch) -> Batch:
    """With positions that restart at every fifth token or so: what the document borders are is read off the tokens."""
    input_ids = batch["input_ids"]
    columns = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    starts = torch.where((input_ids % 5 == 0) | (columns == 0), columns, 0).cummax(1).values
    return {**batch, "position_ids": columns - starts}


def numbers(result: StepResult) -> dict[str, Any]:
    return {"loss": result.loss, "grad_norm": result.grad_norm, "updated": result.updated}


def plain(engine: Engine, run: ResolvedRun) -> Iterator[dict[str, Any]]:
    for step in range(run.total_steps):
        yield numbers(engine.train_step(step, micro_batches(engine, run, step), LEARNING_RATE))


def in_packs(engine: Engine, run: ResolvedRun) -> Iterator[dict[str, Any]]:
    """Packed and plain micro-batches, in training and evaluation, by turns of two steps."""
    for step in range(run.total_steps):
        pack: Callable[[Batch], Batch] = packed if step % 4 < 2 else dict
        result = engine.train_step(step, map(pack, micro_batches(engine, run, step)), LEARNING_RATE)
        sums = engine.eval_step(packed(run.val.micro_batch(0, engine.data_rank, engine.data_world_size, 2)))
        nll, tokens = engine.sum_over_processes(sums).tolist()
        yield {**numbers(result), "val_loss": nll / tokens}


def interrupted(engine: Engine, run: ResolvedRun) -> Iterator[dict[str, Any]]:
    """Between steps: validation with batches of another size than the training's, a checkpoint, text from it."""
    for step in range(run.total_steps):
        yield numbers(engine.train_step(step, micro_batches(engine, run, step), LEARNING_RATE))
        validate(engine, run.val, run.config.train_micro_batch_size_per_gpu + 1, max_steps=2)
        save_checkpoint(engine, run, run.state(step + 1), None)
        if engine.is_main:
            model = load_for_inference(run.config.run_folder)
            tokenizer = load_tokenizer(run.config.run_folder, model.config)
            assert tokenizer is not None
            generate_text(model, tokenizer, run.config.prompt, Decoding(4), seed=step)
        engine.wait()


def watched(engine: Engine, run: ResolvedRun) -> Iterator[dict[str, Any]]:
    """The layers of this process in the order in which they run forward in a step, and in a batch of evaluation."""
    assert isinstance(engine, PipelinedEngine)
    calls: list[int] = []
    for index, layer in engine.layers.items():
        layer.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    for step in range(run.total_steps):
        result = engine.train_step(step, micro_batches(engine, run, step), LEARNING_RATE)
        training = calls[:]
        calls.clear()
        engine.eval_step(
            run.val.micro_batch(0, engine.data_rank, engine.data_world_size, run.config.train_micro_batch_size_per_gpu)
        )
        yield {**numbers(result), "training": training, "evaluating": calls[:]}
        calls.clear()


class Operations(TorchDispatchMode):
    """Counts the operations of torch that are carried out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def counted(engine: Engine, run: ResolvedRun) -> Iterator[dict[str, Any]]:
    """How often each operation is carried out in a step."""
    for step in range(run.total_steps):
        with Operations() as operations:
            result = engine.train_step(step, micro_batches(engine, run, step), LEARNING_RATE)
        yield {**numbers(result), "operations": operations.counts}


class Reads(TorchDispatchMode):
    """Where a value of a tensor is read: on a device, the host would wait there for it.

    `Tensor.tolist` is no operation of torch and not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() == "aten::_local_scalar_dense":
            frame = sys._getframe(1)
            while "/torch/" in frame.f_code.co_filename and frame.f_back:
                frame = frame.f_back
            self.places[f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"] += 1
        return func(*args, **(kwargs or {}))


def reading(engine: Engine, run: ResolvedRun) -> Iterator[dict[str, Any]]:
    """Where a step reads the value of a tensor, besides the loop's `tolist`."""
    for step in range(run.total_steps):
        with Reads() as reads:
            result = engine.train_step(step, micro_batches(engine, run, step), LEARNING_RATE)
        yield {**numbers(result), "reads": reads.places}


def paged(engine: Engine, run: ResolvedRun) -> Iterator[dict[str, Any]]:
    """How many pages of memory the system gives for a step."""
    for step in range(run.total_steps):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        result = engine.train_step(step, micro_batches(engine, run, step), LEARNING_RATE)
        yield {**numbers(result), "page_faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before}


def tracked(engine: Engine, run: ResolvedRun) -> Iterator[dict[str, Any]]:
    """Where the memory of the last step goes; in the ones before, buckets and gathered parameters find their sizes."""
    for step in range(run.total_steps):
        tracker = MemoryTracker(engine.held_tensors, run.model.vocab_size, engine.device.type)
        batches = micro_batches(engine, run, step)
        with tracker if step == run.total_steps - 1 else nullcontext():
            result = engine.train_step(step, batches, LEARNING_RATE)
        yield {**numbers(result), **asdict(tracker.profile())}


def alternating(engine: Engine, run: ResolvedRun) -> Iterator[dict[str, Any]]:
    """Training and evaluation by turns, and what torch.compile did; from the third step on it may do nothing."""
    counters = torch._dynamo.utils.counters
    for step in range(run.total_steps):
        torch._dynamo.config.error_on_recompile = step >= 2
        began = time.perf_counter()
        result = engine.train_step(step, micro_batches(engine, run, step), LEARNING_RATE)
        seconds = time.perf_counter() - began
        batch = run.val.micro_batch(
            step, engine.data_rank, engine.data_world_size, run.config.train_micro_batch_size_per_gpu
        )
        nll, tokens = engine.sum_over_processes(engine.eval_step(batch)).tolist()
        yield {
            **numbers(result),
            "val_loss": nll / tokens,
            "seconds": seconds,
            "compilations": counters["stats"]["unique_graphs"],
            "graph_breaks": list(counters["graph_break"]),
        }


SCENARIOS = {
    "plain": plain,
    "in_packs": in_packs,
    "interrupted": interrupted,
    "watched": watched,
    "counted": counted,
    "reading": reading,
    "paged": paged,
    "tracked": tracked,
    "alternating": alternating,
}


def main(scenario: str, out: str, *flags: str) -> None:
    torch.set_num_threads(1)
    run = resolve(parse(list(flags)))
    engine = build(run)
    lines = list(SCENARIOS[scenario](engine, run))
    weights = {name: tensor["weight"] for name, tensor in engine.tensors() if engine.is_main}
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    if engine.data_rank == 0:
        (folder / f"{engine.rank}.json").write_text(json.dumps(lines))
    if engine.is_main:
        save_file(weights, folder / "weights.safetensors")
    engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
