"""The command: flags → `PreparationConfig` → files."""

from pathlib import Path

from train.config.arguments import ArgumentParser
from train.data.verify import verify
from train.preprocess_data.convert import STDLIB_VAL_FRACTION, VAL_FRACTION, PreparationConfig, prepare, summary
from train.preprocess_data.sources import FILE_KINDS, HUB_DATASETS, STDLIB
from train.utils.command import outlive_output, run_command

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


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m train.preprocess_data",
        description="Tokenize text with GPT-2's vocabulary: out_dir/train.bin and val.bin (nanoGPT's format), each "
        "with\na .json beside it that describes it.",
        epilog=EXAMPLES,
    )
    for group in PreparationConfig.__bases__[::-1]:
        arguments = parser.add_flags(group)
    arguments.add_argument(
        "--verify", type=Path, help="do not prepare; check the files in this folder (sizes, digests, ids, documents)"
    )
    flags = vars(parser.parse_args(argv))
    folder, dataset = flags.pop("verify"), flags["dataset"]
    if folder is not None:
        verify(folder)
        return
    outlive_output()
    flags["split"] = flags["split"] or (HUB_DATASETS[dataset].split if dataset in HUB_DATASETS else "hash")
    if flags["val_fraction"] is None:
        flags["val_fraction"] = STDLIB_VAL_FRACTION if dataset == STDLIB else VAL_FRACTION
    config = PreparationConfig(**flags)
    prepare(config)
    print(summary(config.out_dir))


if __name__ == "__main__":
    run_command(main)
