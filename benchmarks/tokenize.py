"""From local Parquet to `train.bin` and `val.bin`: nanoGPT's procedure, the plain loop, and ours, in MB/s and memory.

    python -m benchmarks.tokenize
    python -m benchmarks.tokenize --corpus shards --megabytes 2000

docs/performance.md describes what is measured. The corpus is split into files of equal size; a corpus x4 is the first
four of them, all documents distinct. The first table is speed by the number of workers, on the middle size; nanoGPT's
best number is taken from it. The second is speed and memory by the size of the corpus, ours with one worker per core.

Each side first runs once untimed: its bytes are compared with nanoGPT's, and its memory and disk use are sampled. Then
the sides alternate within each round, not sampled.
"""

import filecmp
import platform
import random
import re
import statistics
import sys
import sysconfig
import tempfile
from dataclasses import astuple, dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from benchmarks.arguments import make_parser
from benchmarks.processes import Peaks, measure, sample
from benchmarks.rounds import Round, speed_up, spread, take_turns
from train.data.tokenizer import END_OF_TEXT
from train.utils.command import run_command
from train.utils.processes import usable_cores
from train.utils.tables import markdown_table

MB = 1_000_000
DOCUMENT_CHARACTERS = 4_000  # OpenWebText's documents have 4,900 bytes on average
PACKAGES = ("datasets", "pyarrow", "numpy", "tiktoken", "gigatoken")
SUFFIXES = frozenset({".py", ".md", ".rst", ".txt"})
HEADER = ("MB", "side", "workers", "MB/s (range)", "CPU s", "against nanoGPT's", "memory MB", "anonymous", "disk MB")

NANOGPT = "nanoGPT's procedure"
ONE_BY_ONE = "tiktoken, one document at a time"
NANOGPTS_ORDER = "ours, gigatoken, nanoGPT's order"
OURS = {
    "ours, tiktoken": ["--tokenizer=tiktoken"],
    "ours, gigatoken": ["--tokenizer=gigatoken"],
    NANOGPTS_ORDER: ["--tokenizer=gigatoken", "--order=nanogpt"],
}


@dataclass(frozen=True)
class Variant:
    """A side and its number of workers; None is the side's default."""

    side: str
    workers: int | None = None

    def command(self, files: list[Path], out_dir: Path) -> list[str]:
        arguments = [*map(str, files), "--out_dir", str(out_dir)]
        arguments += ["--num_proc", str(self.workers)] if self.workers else []
        if self.side in (NANOGPT, ONE_BY_ONE):
            arguments += ["--one_by_one"] if self.side == ONE_BY_ONE else []
            return [sys.executable, "-m", "benchmarks.nanogpt_procedure", "parquet", *arguments]
        ours = [sys.executable, "-m", "train.preprocess_data", "--dataset=parquet", "--split=nanogpt"]
        return [*ours, *OURS[self.side], "--data_files", *arguments]


@dataclass(frozen=True)
class Result:
    peaks: Peaks
    rounds: list[Round]


def installed_texts() -> list[str]:
    """The distinct documents of the standard library and the installed packages, split at blank lines."""
    texts: set[str] = set()
    folders = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    files = {path for folder in folders for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file()}
    for path in files:
        document = ""
        for paragraph in re.split(r"\n\n(?=\S)", path.read_text(encoding="utf-8", errors="replace")):
            document += paragraph + "\n\n"
            if len(document) > DOCUMENT_CHARACTERS:
                texts.add(document)
                document = ""
        texts.add(document)
    distinct = sorted(texts)
    random.Random(0).shuffle(distinct)
    return distinct


def make_corpus(folder: Path, given: Path | None, megabytes: float, parts: int) -> list[Path]:
    """`parts` Parquet files of equal size, at most `megabytes` in all, of installed texts or of the `given` folder."""
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
    return files


def text_megabytes(files: list[Path]) -> float:
    columns = (pyarrow.parquet.read_table(path)["text"] for path in files)
    return sum(pyarrow.compute.sum(pyarrow.compute.binary_length(column)).as_py() for column in columns) / MB


def same_documents(path: Path, reference: Path) -> bool:
    """Whether two token files have the same documents, in any order."""

    def documents(file: Path) -> list[bytes]:
        ids = np.fromfile(file, dtype=np.uint16)
        return sorted(ids.tobytes() for ids in np.split(ids, np.flatnonzero(ids == END_OF_TEXT) + 1))

    return documents(path) == documents(reference)


def check_files(side: str, out_dir: Path, reference: Path) -> None:
    """Exit with a message unless the files are right: byte for byte where a side promises nanoGPT's order."""
    for name in ("train.bin", "val.bin"):
        path, theirs = out_dir / name, reference / name
        exact = side == NANOGPTS_ORDER or (side in OURS and name == "val.bin")
        if not (filecmp.cmp(path, theirs, shallow=False) if exact else same_documents(path, theirs)):
            sys.exit(f"{name} of {side} is not what {NANOGPT} writes")


def compare(variants: list[Variant], files: list[Path], rounds: int, folder: Path) -> dict[Variant, Result]:
    """The first variant is nanoGPT's, whose documents the others must write."""
    peaks = {}
    with tempfile.TemporaryDirectory(dir=folder) as kept:
        reference = Path(kept) / "out"
        for variant in variants:
            with tempfile.TemporaryDirectory(dir=folder) as name:
                out_dir = Path(name) / "out"
                sampled = sample(variant.command(files, out_dir), Path(name))
                output = sum(path.stat().st_size for path in out_dir.glob("*.bin"))
                peaks[variant] = replace(sampled, disk=max(0, sampled.disk - output))
                if variant == variants[0]:
                    out_dir.rename(reference)
                else:
                    check_files(variant.side, out_dir, reference)

    def timed(variant: Variant) -> Round:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            return measure(variant.command(files, Path(name) / "out"), Path(name))

    taken = take_turns({variant: partial(timed, variant) for variant in variants}, rounds)
    return {variant: Result(peaks[variant], own) for variant, own in taken.items()}


def table_rows(results: dict[Variant, Result], base: Variant, megabytes: float) -> list[list[str]]:
    return [row(variant, result, results[base], megabytes) for variant, result in results.items()]


def row(variant: Variant, result: Result, baseline: Result, megabytes: float) -> list[str]:
    cpu = statistics.median(each.cpu for each in result.rounds)
    speeds = spread([megabytes / each.wall for each in result.rounds], 1)
    cells = [f"{megabytes:.0f}", variant.side, str(variant.workers or 1), speeds, f"{cpu:.1f}"]
    peaks = [f"{peak / MB:,.0f}" for peak in astuple(result.peaks)]
    return [*cells, speed_up(baseline.rounds, result.rounds)[0], *peaks]


def main() -> None:
    parser = make_parser(__doc__, megabytes=480.0, sizes=[1, 4, 16], workers=[1, 2, 4], nanogpt_workers=[1, 2, 4, 8],
                         rounds=3)  # fmt: skip
    parser.add_argument("--corpus", type=Path, metavar="DIR", help='a folder of *.parquet with a column "text" '
                        "(default: made of the texts of this Python and its packages)")  # fmt: skip
    args = parser.parse_args()

    print(f"{platform.machine()}, {usable_cores()} cores, Python {platform.python_version()}, "
          f"{', '.join(f'{name} {version(name)}' for name in PACKAGES if find_spec(name))}")  # fmt: skip
    ours = [side for side in OURS if "gigatoken" not in side or find_spec("gigatoken")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = make_corpus(folder, args.corpus, args.megabytes, max(args.sizes))
        files = {size: corpus[:size] for size in args.sizes}
        megabytes = {size: text_megabytes(files[size]) for size in args.sizes}

        middle = sorted(args.sizes)[len(args.sizes) // 2]
        nanogpts = [Variant(NANOGPT, workers) for workers in args.nanogpt_workers]
        variants = [*nanogpts, *(Variant(side, workers) for side in ours for workers in args.workers)]
        results = compare(variants, files[middle], args.rounds, folder)
        best = min(nanogpts, key=lambda each: statistics.median(taken.wall for taken in results[each].rounds))
        print(f"\n{markdown_table(HEADER, table_rows(results, best, megabytes[middle]))}", flush=True)

        variants = [best, Variant(ONE_BY_ONE), *(Variant(side, usable_cores()) for side in ours)]
        rows = []
        for size in args.sizes:
            rows += table_rows(compare(variants, files[size], args.rounds, folder), best, megabytes[size])
        print(f"\n{markdown_table(HEADER, rows)}")


if __name__ == "__main__":
    run_command(main)
