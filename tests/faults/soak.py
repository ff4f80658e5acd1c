"""Random signals against an uninterrupted run: `python -m tests.faults.soak --cycles 200`.

A reference run is left alone. The same command is then started with --resume_from_checkpoint again and again, and each
start is ended at a random moment by SIGKILL, SIGTERM, SIGINT or SIGUSR1, to the launcher or one of the processes. Runs
that come to their end are compared with the reference, bit for bit, and others begin, until all cycles are spent.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.conftest import SMALL, records, small_flags
from tests.faults.starts import SIGNALS, Fork, Launched, tracebacks
from tests.forks import SERVER
from tests.jobs import layout as layout_flags
from train.checkpoints.__main__ import verify
from train.checkpoints.digests import digest_of_file
from train.checkpoints.run_folder import LATEST, latest
from train.checkpoints.starting import look
from train.utils.errors import RUN_AGAIN

LAYOUTS = ("single", "ddp", "zero2", "pipeline")
SAVE_INTERVAL, EVAL_INTERVAL = 7, 10
SAVING, SAVE_SECONDS = 0.25, 0.5  # how many of the starts are ended in a save, and how long one takes
END_SECONDS = 120  # a start is over by then, with all its processes
VALIDATION_BYTES = 6_000  # takes a share of the time, or no signal would meet it
RECORDED = ("epoch", "tokens", "loss", "learning_rate", "grad_norm", "val_loss", "perplexity", "val_tokens")


@dataclass
class Done:
    """What a soak did."""

    cycles: int = 0
    runs: int = 0  # that came to their end, and were equal to the reference
    signals: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)  # steps to compute again, by signal
    most: Counter[str] = field(default_factory=Counter)  # of one cycle

    def __str__(self) -> str:
        def counts(counter: Counter[str]) -> str:
            return ", ".join(f"{name} {count}" for name, count in sorted(counter.items())) or "none"

        return "\n".join(
            [
                f"{self.cycles} starts were ended by a signal; {self.runs} runs came to their end, each equal to the "
                f"uninterrupted one bit for bit",
                f"signals: {counts(self.signals)}",
                f"phases: {counts(self.phases)}",
                f"exit codes: {counts(self.codes)}",
                f"steps computed again: {counts(self.lost)}; at most in one cycle: {counts(self.most)}",
            ]
        )


@dataclass(frozen=True)
class Soak:
    layout: str
    steps: int
    folder: Path
    seed: int

    def start(self, name: str) -> Fork | Launched:
        flags = [flag for flag in small_flags(self.folder, self.folder / "model") if "--max_steps" not in flag]
        flags += [f"--max_steps={self.steps}", f"--checkpoint_path={self.folder / name}", "--resume_from_checkpoint"]
        flags += [f"--save_interval={SAVE_INTERVAL}", f"--eval_interval={EVAL_INTERVAL}", "--save_total_limit=2"]
        flags += ["--timeout=60"]
        if self.layout == "single":
            return Fork([*flags, "--dropout=0.1"], self.folder)
        return Launched([*flags, *layout_flags("baseline" if self.layout == "ddp" else self.layout)], self.folder)

    def run_folder(self, name: str) -> Path:
        return self.folder / name / ("baseline" if self.layout in ("single", "ddp") else "optimized")

    def run(self, cycles: int) -> Done:
        write_model_and_data(self.folder)
        if self.layout == "single":
            warm_up()
        began = time.monotonic()
        code, said = self.finish(self.start("reference"))
        assert code == 0, said
        seconds, rng, done = time.monotonic() - began, random.Random(self.seed), Done()
        if self.layout == "single":
            seconds /= 3  # or most of the starts come to their end; those of a launcher take most of the time to begin
        while True:
            name = f"run-{done.runs}"
            while not self.is_finished(name) and done.cycles < cycles:
                self.cycle(name, seconds, rng, done)
            if not self.is_finished(name):
                code, said = self.finish(self.start(name))
                assert code == 0, said
            assert self.is_finished(name)
            self.compare(name)
            shutil.rmtree(self.folder / name)
            done.runs += 1
            if done.cycles >= cycles:
                return done

    def is_finished(self, name: str) -> bool:
        """Whether a run is, although a signal may have reached its launcher after that."""
        return (self.run_folder(name) / "metrics.json").exists()

    def finish(self, started: Fork | Launched) -> tuple[int | None, str]:
        code = started.wait(10 * END_SECONDS)
        self.check_gone(started)
        return code, started.said()

    def cycle(self, name: str, seconds: float, rng: random.Random, done: Done) -> int | None:
        """Start, wait for a random moment, signal, wait for the end, check; returns the exit code."""
        run, number = self.run_folder(name), rng.choice(SIGNALS)
        before = step_of_latest(run)
        started, reached = self.start(name), moment(run, seconds, rng)
        while started.poll() is None and not reached():
            time.sleep(0.001)
        target, pid = rng.choice(sorted(started.targets().items()))
        phase = phase_of(run, started.said(), self.steps)
        sent = started.poll() is None
        if sent:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        code = started.wait(END_SECONDS)
        self.check_gone(started)
        said = started.said()
        if sent:
            done.cycles += 1
            done.signals[f"{number.name} to {target}"] += 1
            done.phases[phase] += 1
            done.codes[f"{number.name} {code}"] += 1
        what = f"cycle {done.cycles}: {number.name if sent else 'no signal'} to {target} in phase {phase}, code {code}"
        faults = [*self.faults(run, number if sent else None, code, said)]
        saved = step_of_latest(run)
        lost = max(last_record(run) - saved, 0) if code != 0 and phase != "start" else 0
        if lost:
            done.lost[number.name] += lost
            done.most[number.name] = max(done.most[number.name], lost)
        print(f"{what}; step {before} to {saved}, {lost} lost", flush=True)
        assert not faults, "\n".join([what, *faults, f"seed {self.seed}", said])
        if saved < before:
            raise AssertionError(f"{what}: went back from step {before} to {saved}\n{said}")
        return code

    def faults(self, run: Path, number: signal.Signals | None, code: int | None, said: str) -> Iterator[str]:
        """A sentence for each thing that is not as documented after a cycle."""
        yield from (f"traceback: {each}" for each in tracebacks(said))
        allowed = self.documented(run, number, said)
        if code not in allowed:
            yield f"exit code {code}, and {sorted(allowed)} are documented"
        if not run.exists():
            return
        with contextlib.redirect_stdout(io.StringIO()):
            found = [*verify(run)] if any(run.glob("step-*")) else []
        yield from (fault for fault in found if not (number == signal.SIGKILL and f"{LATEST} is missing" in fault))
        if number != signal.SIGKILL and "checkpoints: " in said:  # it has begun to train
            if leftovers := look(run).leftovers:
                yield f"half-written: {', '.join(path.name for path in leftovers)}"
            if step_of_latest(run) != last_record(run):
                yield f"step {step_of_latest(run)} is saved, and {last_record(run)} are done"
        if last_record(run) - step_of_latest(run) > 2 * SAVE_INTERVAL:  # one is being written, and the next waits
            yield f"the steps from {step_of_latest(run)} to {last_record(run)} are lost"
        if last_record(run) < step_of_latest(run):
            yield f"step {step_of_latest(run)} is saved, and the records end at {last_record(run)}"

    def documented(self, run: Path, number: signal.Signals | None, said: str) -> set[int]:
        """The exit codes that a start may have which got a signal, perhaps when it was over."""
        if number is None:
            return {0}
        as_any_program = {-number, 128 + number}
        if self.layout != "single":
            return {0, 1} | as_any_program
        if number == signal.SIGKILL:
            return {0, -number}
        begun = "checkpoints: " in said and not (run / "metrics.json").exists()
        return {0, RUN_AGAIN} if begun else {0, RUN_AGAIN} | as_any_program

    def check_gone(self, started: Fork | Launched) -> None:
        deadline = time.monotonic() + END_SECONDS
        while left := started.left():
            if time.monotonic() > deadline:
                described = [f"{each.pid}: {' '.join(each.cmdline())}" for each in left]
                for each in left:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()
                raise AssertionError("\n".join(["processes are left", *described, started.said()]))
            time.sleep(0.05)

    def compare(self, name: str) -> None:
        """Weights, moments and what is recorded of each step, with the reference."""
        reference, run = self.run_folder("reference"), self.run_folder(name)
        last = f"step-{self.steps}"
        for file in sorted((reference / last).glob("*.safetensors")):
            assert digest_of_file(file) == digest_of_file(run / last / file.name), f"{name}: {file.name} differs"
        for one, other in zip(records(reference), records(run), strict=True):
            for key in RECORDED:
                assert one.get(key) == other.get(key), f"{name}: {key} of step {one['step']} differs"


def write_model_and_data(folder: Path) -> None:
    """A small GPT-2 whose tokens are bytes, for a large vocabulary would take most of the time."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**SMALL, vocab_size=256, bos_token_id=0, eos_token_id=0)).save_pretrained(
        folder / "model"
    )
    ids = np.frombuffer(Path(random.__file__).read_bytes(), dtype=np.uint8).astype(np.uint16)
    ids[:-VALIDATION_BYTES].tofile(folder / "train.bin")
    ids[-VALIDATION_BYTES:].tofile(folder / "val.bin")


def warm_up() -> None:
    """Start the server of forks, which imports the trainer, so that no run's time includes that."""
    first = SERVER.Process(target=int)
    first.start()
    first.join()


def moment(run: Path, seconds: float, rng: random.Random) -> Callable[[], bool]:
    """A condition that comes true at a random moment: some time after the start, or while a checkpoint is written."""
    until = time.monotonic() + rng.uniform(0, seconds)
    if rng.random() > SAVING:
        return lambda: time.monotonic() > until
    saved = step_of_latest(run) // SAVE_INTERVAL + rng.randrange(1, 4)
    inside = rng.uniform(0, SAVE_SECONDS)
    saving_since: list[float] = []

    def reached() -> bool:
        if not saving_since and any(run.glob(f".step-{saved * SAVE_INTERVAL}.*")):
            saving_since.append(time.monotonic())
        return bool(saving_since) and time.monotonic() > saving_since[0] + inside

    return reached


def phase_of(run: Path, said: str, steps: int) -> str:
    """What a run is at, as far as it can be seen from outside."""
    if "checkpoints: " not in said:
        return "start"
    if (run / "metrics.json").exists():
        return "end"
    if any(run.glob(".step-*")):
        return "saving"
    step = last_record(run)
    if (step % EVAL_INTERVAL == 0 or step == steps) and step > 0 and step_of_latest(run) >= step - SAVE_INTERVAL:
        validated = any(record["step"] == step and "val_loss" in record for record in lines(run))
        if not validated:
            return "validation"
        if step == steps:
            return "summary"
    return "steps"


def lines(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, whose last one may be half written at this moment."""
    file = run / "metrics.jsonl"
    found = []
    for line in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def last_record(run: Path) -> int:
    return max((record["step"] for record in lines(run)), default=0)


def step_of_latest(run: Path) -> int:
    """The newest complete checkpoint: that which `latest` names, or one that a kill left before it was named."""
    named = latest(run) if (run / LATEST).exists() else None
    complete = [*look(run).checkpoints, *([named] if named else [])]
    return max((int(folder.name.removeprefix("step-")) for folder in complete), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--cycles", type=int, default=200, help="starts that are ended by a signal")
    parser.add_argument("--layout", choices=LAYOUTS, default="single")
    parser.add_argument("--seed", type=int, default=None, help="of the moments and signals; random by default")
    parser.add_argument("--steps", type=int, default=60, help="of each run")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if given.seed is None else given.seed
    # A shell's background processes ignore Ctrl-C, and so would their children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = f"{folder}/hf"
        print(f"seed {seed}, {given.layout}", flush=True)
        done = Soak(given.layout, given.steps, Path(folder), seed).run(given.cycles)
    print(f"{done}\nseed {seed}, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
