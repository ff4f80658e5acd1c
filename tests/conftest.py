"""Shared by all tests: a small GPT-2, a small corpus of real tokens, and a way to run the commands as people do."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 64}
LOSS_TOLERANCE = 1e-5  # between layouts that compute the same
# Files that take longest. They are scheduled first, so that the workers of pytest-xdist end together.
LONGEST = ("docs", "compile", "layouts", "pipeline", "exactly_once", "train", "machines", "restarts",
           "full_disk", "package", "parity", "preparation_memory", "profiling", "documents", "processes", "recipes",
           "generate")  # fmt: skip


def pytest_configure() -> None:
    """A shell starts a command in the background with Ctrl-C ignored, which the commands of tests would inherit."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {f"test_{name}": index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session", autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Libraries cache into a folder of this session, ask no network, and use one thread (tests run side by side)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)  # `tests.torch_builds` may have its folder there
        yield


def command(
    *words: object, cwd: Path, check: bool = True, timeout: float = 300, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command with this environment's programs first on the path; its output is shown when it fails."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        input=stdin,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check:
        assert done.returncode == 0, f"{' '.join(map(str, words))}\n{done.stdout}\n{done.stderr}"
    return done


def python(*words: object, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    return command(sys.executable, *words, cwd=cwd, check=check)


def accelerate(
    *words: object,
    cwd: Path,
    processes: int = 2,
    layout: str = "deepspeed",
    check: bool = True,
    module: str = "train",
) -> subprocess.CompletedProcess[str]:
    """Train under `accelerate launch` with a shipped configuration."""
    config = ROOT / "accelerate_configs" / f"{layout}.yaml"
    launch = ["accelerate", "launch", "--config_file", config, "--num_processes", processes, "--main_process_port", 0]
    return command(*launch, "-m", module, *words, cwd=cwd, check=check)


def torchrun(*words: object, cwd: Path, processes: int = 2, check: bool = True) -> subprocess.CompletedProcess[str]:
    launch = ["torchrun", "--nproc_per_node", processes, "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    return command(*launch, *words, cwd=cwd, check=check)


def train(*flags: object, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """`python -m train` in a fork, for tests that do not depend on the start of the process."""
    from tests.forks import run_module

    return run_module("train", [str(flag) for flag in flags], cwd, check)


def ranks(
    *flags: object, cwd: Path, processes: int = 2, fsdp2: bool = False, check: bool = True, module: str = "train"
) -> subprocess.CompletedProcess[str]:
    """What torchrun starts, in forks, for tests that do not depend on the launcher; all output is in stdout."""
    from tests.forks import fsdp2_environment, run_ranks

    own = fsdp2_environment() if fsdp2 else {}
    return run_ranks(module, [str(flag) for flag in flags], cwd, processes, check, own)


def engine_steps(
    scenario: str, folder: Path, *flags: object, processes: int = 2, layout: str | None = None
) -> list[list[dict[str, Any]]]:
    """The lines that each process writes for each step of a scenario of `tests.engine_steps`; weights are in `folder`.

    The ranks are forked, unless `layout` names a file for `accelerate launch`.
    """
    from tests.forks import run_ranks

    words = [scenario, str(folder), *map(str, flags), f"--checkpoint_path={folder}"]
    if layout is not None:
        accelerate(*words, cwd=folder.parent, processes=processes, layout=layout, module="tests.engine_steps")
    else:
        run_ranks("tests.engine_steps", words, folder, processes, check=True)
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def records(run_folder: Path) -> list[dict[str, Any]]:
    """One of each step: validation is added to a step in a second line, and the later line counts."""
    lines = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    return list({record["step"]: record for record in lines}.values())


def losses(run_folder: Path) -> list[float]:
    return [record["loss"] for record in records(run_folder)]


def check_parity(run: Path, finished: Path) -> None:
    """Another layout has computed what the `finished` run of one process did."""
    import torch
    from safetensors.torch import load_file

    assert losses(run) == pytest.approx(losses(finished), abs=LOSS_TOLERANCE)
    for ours, theirs in zip(records(run), records(finished), strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert theirs["grad_norm"] > 1.0, "clipping, at the default of 1.0, has to bite to be tested"
        assert ours.get("val_loss") == pytest.approx(theirs.get("val_loss"), abs=LOSS_TOLERANCE)
    weights, expected = (load_file(folder / "model.safetensors") for folder in (run, finished))
    assert list(weights) == list(expected)
    # Not the key biases: their gradient is zero but for rounding, which AdamW makes into steps of the learning rate.
    for name in weights:
        if not name.endswith("c_attn.bias"):
            torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=2e-4, msg=name)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.bin (8,000 tokens) and val.bin (1,000) of Python source, bare as nanoGPT writes them."""
    from train.data.tokenizer import gpt2_encoding

    folder = tmp_path_factory.mktemp("corpus")
    text = Path(json.__file__).with_name("decoder.py").read_text() + Path(subprocess.__file__).read_text()
    ids = np.array(gpt2_encoding().encode_ordinary(text), dtype=np.uint16)
    ids[:8000].tofile(folder / "train.bin")
    ids[8000:9000].tofile(folder / "val.bin")
    return folder


@pytest.fixture(scope="session")
def documents(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus with an end of text in place of every eleventh token or so, several in each block."""
    from train.data.tokenizer import END_OF_TEXT

    folder = tmp_path_factory.mktemp("documents")
    for name in ("train.bin", "val.bin"):
        ids = np.fromfile(corpus / name, dtype=np.uint16)
        ids[np.random.default_rng(0).random(len(ids)) < 1 / 11] = END_OF_TEXT
        ids.tofile(folder / name)
    return folder


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock GPT-2 folder with GPT-2's vocabulary and almost nothing else."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**SMALL)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tuned_from(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock GPT-2 folder with a tokenizer of its own, of 300 tokens, and its ids of the corpus in train.bin."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

    from train.data.tokenizer import gpt2_encoding

    folder = tmp_path_factory.mktemp("tuned_from")
    text = gpt2_encoding().decode(np.fromfile(corpus / "train.bin", np.uint16).tolist())
    learnt = ByteLevelBPETokenizer()
    learnt.train_from_iterator([text], vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    learnt.save_model(str(folder))
    tokenizer = GPT2Tokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**SMALL, vocab_size=300, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    np.array(tokenizer(text, verbose=False).input_ids, dtype=np.uint16).tofile(folder / "train.bin")
    return folder


@pytest.fixture(scope="session")
def flags(corpus: Path, small_model: Path) -> list[str]:
    """Flags of a run that takes a second: 8 steps of 4 sequences of 32 tokens."""
    return small_flags(corpus, small_model)


def small_flags(corpus: Path, model: Path) -> list[str]:
    return [
        f"--model={model}",
        f"--train_data_path={corpus}/train.bin",
        f"--val_data_path={corpus}/val.bin",
        "--block_size=32",
        "--max_steps=8",
        "--learning_rate=1e-2",
        "--report_to=none",
        "--max_new_tokens=8",
    ]


def half_finished(finished: Path, folder: Path) -> Path:
    """A copy of the `finished` run in `folder`, as it was after step 4 but for its records and summary."""
    run = folder / finished.name
    shutil.copytree(finished, run)
    shutil.rmtree(run / "step-8")
    (run / "latest").write_text("step-4\n")
    return run


@pytest.fixture(scope="session")
def finished(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished baseline run, with checkpoints after steps 4 and 8. Read it, do not write to it."""
    folder = tmp_path_factory.mktemp("finished")
    python("-m", "train", *flags, "--save_interval=4", "--eval_interval=4", f"--checkpoint_path={folder}", cwd=folder)
    return folder / "baseline"
