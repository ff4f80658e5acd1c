"""The configurations that are part of the package, for Accelerate, DeepSpeed and runs: found from any folder.

`train/accelerate_configs`, `train/ds_configs` and `train/recipes` are links to the repository's folders of these
names; an installed package has copies in their place.
"""

from pathlib import Path

from train.config.arguments import ArgumentParser
from train.utils.command import run_command
from train.utils.errors import UserError, did_you_mean

PACKAGE = Path(__file__).parent.parent
ACCELERATE, DEEPSPEED, RECIPES = "accelerate_configs", "ds_configs", "recipes"


def configurations() -> list[Path]:
    """Every file that is shipped, Accelerate's first."""
    return [file for folder in (ACCELERATE, DEEPSPEED, RECIPES) for file in sorted((PACKAGE / folder).iterdir())]


def here_or_shipped(name: str, folder: str) -> Path:
    """The file of this name, else the shipped one: `zero2.json` and `ds_configs/zero2.json` are in any folder."""
    file = Path(name)
    shipped = PACKAGE / folder / file.name
    return shipped if not file.exists() and file.parent in (Path(), Path(folder)) and shipped.is_file() else file


def find(name: str) -> Path:
    """The shipped file of this name, with or without its ending; a `UserError` if there is none."""
    for file in configurations():
        if name in (file.name, file.stem):
            return file
    names = [file.stem for file in configurations()]
    raise UserError(
        f"gpt2flash config {name}: there is no such configuration; {did_you_mean(name, names)}choose from "
        f"{', '.join(names)}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="gpt2flash config",
        description="Print the path of a configuration that is shipped with this package; without a name, of all.",
        epilog='example:\n  accelerate launch --config_file "$(gpt2flash config ddp)" -m train ...',
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="a configuration, for example ddp, deepspeed or zero2")
    name = parser.parse_args(argv).name
    for file in configurations() if name is None else [find(name)]:
        print(file)


if __name__ == "__main__":
    run_command(main)
