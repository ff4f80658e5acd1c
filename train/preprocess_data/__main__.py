"""The command: flags → `PreparationConfig` → files."""

import os
from pathlib import Path

from train.data.verify import verify
from train.preprocess_data.convert import PreparationConfig, prepare, summary
from train.preprocess_data.sources import FILE_KINDS, HUB_DATASETS, STDLIB, file_kinds
from train.preprocess_data.tokenization import ENCODERS
from train.utils.arguments import ArgumentParser
from train.utils.command import run_command

VAL_FRACTION = 0.0005  # nanoGPT's
STDLIB_VAL_FRACTION = 0.05  # 0.0005 of its 670 modules would be none

EXAMPLES = "\n".join(
    [
        "examples:",
        "  Python's own standard library, some 5 million tokens in seconds, no network:",
        "    python -m train.preprocess_data --out_dir data",
        "  OpenWebText with nanoGPT's split, some 9 billion tokens, byte for byte nanoGPT's own files:",
        "    python -m train.preprocess_data --dataset openwebtext --out_dir data/openwebtext --order nanogpt",
        *(
            f"  {kind.description}:\n    python -m train.preprocess_data --dataset {name} {kind.example}"
            for name, kind in FILE_KINDS.items()
        ),
        "  the first 100,000 documents of FineWeb-Edu, or of any dataset on the Hub that needs no code of its own:",
        "    python -m train.preprocess_data --dataset fineweb-edu --max_documents 100000",
        "  check the files in a folder:",
        "    python -m train.preprocess_data --verify data",
        "Killed, or out of disk? The same command resumes where it was.",
    ]
)


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m train.preprocess_data",
        description="Tokenize text with GPT-2's vocabulary: out_dir/train.bin and val.bin (nanoGPT's format), each "
        "with\na .json beside it that describes it.",
        epilog=EXAMPLES,
    )
    subsets = "".join(f"; {known.subset} of {name}" for name, known in HUB_DATASETS.items() if known.subset)
    add = parser.add_argument_group("source").add_argument
    add("--dataset", default=STDLIB, metavar="NAME", help=f"{', '.join([*HUB_DATASETS, STDLIB, *FILE_KINDS])}, or a "
        f"dataset on the Hub as owner/name (default: {STDLIB})")  # fmt: skip
    add("--data_files", nargs="+", default=[], metavar="GLOB", help=f"files for {file_kinds('and')} (** crosses "
        "folders); for a dataset on the Hub, which of its files")  # fmt: skip
    add("--text_column", default="text", metavar="NAME", help="the column that holds the text (default: text)")
    add("--subset", metavar="NAME", help=f"configuration of a dataset on the Hub (default: its own{subsets})")
    add("--revision", metavar="REV", help="branch, tag or commit of a dataset on the Hub (default: main, or the Hub's "
        "Parquet conversion where main has only a script)")  # fmt: skip
    add("--max_documents", type=int, metavar="N", help="use the first N documents only (default: all)")

    add = parser.add_argument_group("split and order").add_argument
    add("--val_fraction", type=float, metavar="F", help=f"share of documents for validation (default: {VAL_FRACTION}; "
        f"{STDLIB_VAL_FRACTION} for {STDLIB})")  # fmt: skip
    add("--split", choices=("hash", "nanogpt"), help="hash: by each document's content, independent of order; "
        "nanogpt: by row number, as datasets' train_test_split does (default: nanogpt for openwebtext, else "
        "hash)")  # fmt: skip
    add("--num_rows", type=int, metavar="N", help="documents in the dataset, for --split nanogpt where the Hub does "
        "not say; local files are counted")  # fmt: skip
    add("--seed", type=int, default=2357, metavar="N", help="of the split (default: 2357, nanoGPT's)")
    add("--order", choices=("source", "nanogpt"), default="source", help="of train.bin: the source's, or with --split "
        "nanogpt nanoGPT's, byte for byte, which takes twice the disk while it is made (default: source)")  # fmt: skip

    add = parser.add_argument_group("speed").add_argument
    add("--tokenizer", choices=ENCODERS, default="auto", help="all give the same ids (default: gigatoken where it is "
        "installed and agrees with tiktoken on a sample, else tiktoken)")  # fmt: skip
    add("--num_proc", type=int, default=available_cores(), metavar="N", help="threads that tokenize (default: the "
        "cores of this machine)")  # fmt: skip

    add = parser.add_argument_group("output").add_argument
    add("--out_dir", type=Path, default=Path("data"), metavar="DIR", help="folder of the files; created if missing "
        "(default: data)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace the files in out_dir, and what another command left "
        "unfinished there; without it, the same command resumes where it was killed")  # fmt: skip
    add("--verify", type=Path, metavar="DIR", help="prepare nothing: check the files in a folder (sizes, digests, "
        "ids, documents)")  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> None:
    flags = vars(build_parser().parse_args(argv))
    folder = flags.pop("verify")
    if folder is not None:
        verify(folder)
        return
    dataset = flags["dataset"]
    flags["split"] = flags["split"] or (HUB_DATASETS[dataset].split if dataset in HUB_DATASETS else "hash")
    if flags["val_fraction"] is None:
        flags["val_fraction"] = STDLIB_VAL_FRACTION if dataset == STDLIB else VAL_FRACTION
    config = PreparationConfig(**flags)
    prepare(config)
    print(summary(config.out_dir))


if __name__ == "__main__":
    run_command(main)
