"""Upload a finished run to the Hugging Face Hub: `python -m train.hub RUN OWNER/NAME`."""

from pathlib import Path

from train.config.arguments import ArgumentParser
from train.hub.upload import check, push
from train.utils.command import run_command


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m train.hub", description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a finished run")
    parser.add_argument("repo", metavar="OWNER/NAME", help="the repository, which is created if it does not exist")
    args = parser.parse_args(argv)
    check(args.repo, "OWNER/NAME")
    print(push(args.run, args.repo, "OWNER/NAME"))


if __name__ == "__main__":
    run_command(main)
