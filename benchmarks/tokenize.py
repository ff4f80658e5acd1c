"""From local Parquet to `train.bin` and `val.bin`: nanoGPT's procedure, the plain loop, and ours, by MB/s and memory.

    python -m benchmarks.tokenize
    python -m benchmarks.tokenize --corpus shards --megabytes 2000

Each measurement is a whole process, its start and its imports included, that begins with an empty cache of `datasets`
and with the Parquet files in the page cache. MB are of UTF-8 text.

1. The corpus is cut into files of one size; a corpus x4 is the first four of them, all documents distinct.
2. How speed grows with workers, on the middle one of the sizes. nanoGPT's best number of processes is taken from here.
3. How speed and memory grow with the corpus, ours with as many workers as there are cores.

Each side first runs once under watch, untimed: its bytes are compared with nanoGPT's, its memory and disk use are
sampled (benchmarks/processes.py says how). Then the sides alternate, round by round, unwatched; the ratio is taken
round by round. Part of the memory are pages of mapped files (Arrow's copies, a memory-mapped train.bin), which the
system may take back; what it may not is given apart as anonymous. Disk is the peak beside the two files asked for.
"""

import argparse
import filecmp
import platform
import random
import re
import statistics
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from benchmarks.processes import Timed, Watched, measure, watch
from train.data.token_file import END_OF_TEXT
from train.preprocess_data.__main__ import available_cores

MB = 1_000_000
DOCUMENT_CHARACTERS = 4_000  # OpenWebText's documents have 4,900 bytes on average
PACKAGES = ("datasets", "pyarrow", "numpy", "tiktoken", "gigatoken")
SUFFIXES = frozenset({".py", ".md", ".rst", ".txt"})

NANOGPT = "nanoGPT's procedure"
ONE_BY_ONE = "tiktoken, one document at a time"
NANOGPTS_ORDER = "ours, gigatoken, nanoGPT's order"
OURS = {
    "ours, tiktoken": ["--tokenizer=tiktoken"],
    "ours, gigatoken": ["--tokenizer=gigatoken"],
    NANOGPTS_ORDER: ["--tokenizer=gigatoken", "--order=nanogpt"],
}

Variant = tuple[str, int | None]  # a side and its number of workers; None: what it takes by itself


@dataclass(frozen=True)
class Corpus:
    """`sizes[i]`: bytes of UTF-8 text in `files[i]`."""

    files: list[Path]
    sizes: list[int]

    def megabytes(self, times: int) -> float:
        return sum(self.sizes[:times]) / MB


def installed_texts() -> list[str]:
    """The standard library and the installed packages, cut at blank lines into pieces of an article's length,
    each once."""
    texts: set[str] = set()
    folders = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    files = {path for folder in folders for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file()}
    for path in files:
        piece = ""
        for paragraph in re.split(r"\n\n(?=\S)", path.read_text(encoding="utf-8", errors="replace")):
            piece += paragraph + "\n\n"
            if len(piece) > DOCUMENT_CHARACTERS:
                texts.add(piece)
                piece = ""
        texts.add(piece)
    distinct = sorted(texts)
    random.Random(0).shuffle(distinct)
    return distinct


def make_corpus(folder: Path, given: Path | None, megabytes: float, parts: int) -> Corpus:
    """`parts` Parquet files of one size, in all at most `megabytes`, from what is installed or the `given` folder."""
    if given:
        shards = sorted(given.glob("*.parquet"))
        if not shards:
            sys.exit(f"--corpus {given} holds no *.parquet file")
        texts = [text for path in shards for text in pyarrow.parquet.read_table(path)["text"].to_pylist()]
    else:
        texts = installed_texts()
    lengths = np.array([len(text.encode()) for text in texts])
    starts = np.cumsum(lengths) - lengths
    size = min(megabytes * MB, lengths.sum()) / parts
    bounds = np.searchsorted(starts, size * np.arange(parts + 1))
    files = [folder / f"{part:03d}.parquet" for part in range(parts)]
    for path, (first, last) in zip(files, pairwise(bounds), strict=True):
        pyarrow.parquet.write_table(pa.table({"text": texts[first:last]}), path, row_group_size=1000)
    sizes = [int(lengths[first:last].sum()) for first, last in pairwise(bounds)]
    return Corpus(files, sizes)


@dataclass(frozen=True)
class Result:
    watched: Watched
    times: list[Timed]

    @property
    def walls(self) -> list[float]:
        return [timed.wall for timed in self.times]


def command(variant: Variant, files: list[Path], out_dir: Path) -> list[str]:
    side, workers = variant
    names = [str(path) for path in files]
    out = ["--out_dir", str(out_dir)]
    number = ["--num_proc", str(workers)] if workers else []
    if side == NANOGPT:
        return [sys.executable, "-m", "benchmarks.nanogpt_procedure", "parquet", *names, *out, *number]
    if side == ONE_BY_ONE:
        return [sys.executable, "-m", "benchmarks.one_by_one", *names, *out]
    ours = [sys.executable, "-m", "train.preprocess_data", "--dataset=parquet", "--data_files", *names, *out, *number]
    return [*ours, "--split=nanogpt", *OURS[side]]


def same_documents(path: Path, reference: Path) -> bool:
    """Whether two token files hold the same documents, in whatever order."""

    def documents(file: Path) -> list[bytes]:
        ids = np.fromfile(file, dtype=np.uint16)
        return sorted(ids.tobytes() for ids in np.split(ids, np.flatnonzero(ids == END_OF_TEXT) + 1))

    return documents(path) == documents(reference)


def check_files(side: str, out_dir: Path, reference: Path) -> None:
    """To the byte where a side promises nanoGPT's order."""
    for name in ("train.bin", "val.bin"):
        path, theirs = out_dir / name, reference / name
        to_the_byte = side == NANOGPTS_ORDER or (side in OURS and name == "val.bin")
        if not (filecmp.cmp(path, theirs, shallow=False) if to_the_byte else same_documents(path, theirs)):
            sys.exit(f"{name} of {side} is not what {NANOGPT} writes")


def compare(variants: list[Variant], files: list[Path], rounds: int, folder: Path) -> dict[Variant, Result]:
    """The first variant is nanoGPT's, whose documents the others have to write."""
    watched = {}
    with tempfile.TemporaryDirectory(dir=folder) as kept:
        reference = Path(kept) / "out"
        for variant in variants:
            with tempfile.TemporaryDirectory(dir=folder) as name:
                scratch = Path(name)
                out_dir = scratch / "out"
                out_dir.mkdir()
                peaks = watch(command(variant, files, out_dir), scratch)
                asked = sum(path.stat().st_size for path in out_dir.glob("*.bin"))
                watched[variant] = replace(peaks, disk=max(0, peaks.disk - asked))
                if variant == variants[0]:
                    out_dir.rename(reference)
                else:
                    check_files(variant[0], out_dir, reference)
    times: dict[Variant, list[Timed]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant in variants:
            with tempfile.TemporaryDirectory(dir=folder) as name:
                out_dir = Path(name) / "out"
                out_dir.mkdir()
                times[variant].append(measure(command(variant, files, out_dir), Path(name)))
    return {variant: Result(watched[variant], times[variant]) for variant in variants}


def spread(values: list[float], form: str) -> str:
    """Median and range."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def speeds(result: Result, megabytes: float) -> list[float]:
    return [megabytes / wall for wall in result.walls]


def ratios(result: Result, baseline: Result) -> list[float]:
    """How many times as fast, round by round."""
    return [theirs / ours for ours, theirs in zip(result.walls, baseline.walls, strict=True)]


def print_table(results: dict[Variant, Result], baseline: Variant, megabytes: float, heading: bool) -> None:
    if heading:
        print("\n| MB | side | workers | MB/s (range) | CPU s | against nanoGPT's | memory MB | anonymous | disk MB |")
        print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for (side, workers), result in results.items():
        cpu = statistics.median(timed.cpu for timed in result.times)
        peaks = [result.watched.memory, result.watched.anonymous, result.watched.disk]
        cells = [
            f"{megabytes:.0f}",
            side,
            str(workers or 1),
            spread(speeds(result, megabytes), ".1f"),
            f"{cpu:.1f}",
            spread(ratios(result, results[baseline]), ".2f"),
            *(f"{peak / MB:,.0f}" for peak in peaks),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, metavar="DIR", help='a folder of *.parquet with a column "text" '
                        "(default: made of the texts of this Python and its packages)")  # fmt: skip
    parser.add_argument("--megabytes", type=float, default=480, help="of text, at most, in the largest size")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 16], help="multiples of the smallest")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--nanogpt_workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    print(f"{platform.machine()}, {available_cores()} cores, Python {platform.python_version()}, "
          f"{', '.join(f'{name} {version(name)}' for name in PACKAGES if find_spec(name))}")  # fmt: skip
    ours = [side for side in OURS if "gigatoken" not in side or find_spec("gigatoken")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = make_corpus(folder, args.corpus, args.megabytes, max(args.sizes))

        middle = sorted(args.sizes)[len(args.sizes) // 2]
        variants: list[Variant] = [(NANOGPT, workers) for workers in args.nanogpt_workers]
        variants += [(side, workers) for side in ours for workers in args.workers]
        results = compare(variants, corpus.files[:middle], args.rounds, folder)
        best = min(
            variants[: len(args.nanogpt_workers)], key=lambda variant: statistics.median(results[variant].walls)
        )
        print_table(results, best, corpus.megabytes(middle), heading=True)

        variants = [best, (ONE_BY_ONE, None), *((side, available_cores()) for side in ours)]
        for size in args.sizes:
            results = compare(variants, corpus.files[:size], args.rounds, folder)
            print_table(results, best, corpus.megabytes(size), heading=size == args.sizes[0])


if __name__ == "__main__":
    main()
