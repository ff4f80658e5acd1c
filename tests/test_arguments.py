"""Mistakes on a command line are answered in one line."""

import importlib

import pytest

from tests.conftest import ROOT, python
from train.cli import TOOLS
from train.config.arguments import ArgumentParser
from train.utils.errors import UserError, did_you_mean


@pytest.fixture
def parser() -> ArgumentParser:
    parser = ArgumentParser(prog="prog")
    parser.add_argument("--max_steps", type=int, required=True)
    parser.add_argument("--split", choices=("hash", "nanogpt"))
    return parser


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--max_step 3 --max_steps 3", r"^unknown flag --max_step; did you mean --max_steps\? --help lists all$"),
        ("--max_steps 3 --splt=hash", r"^unknown flag --splt; did you mean --split\?"),
        ("--max_steps 3 --colour", r"^unknown flag --colour; --help lists all$"),
        ("--max_steps 3 hash", r"^unknown argument hash; --help lists all$"),
        ("--max_steps three", r"^--max_steps: invalid int value: 'three'$"),
        ("--max_steps 3 --split even", r"^--split: invalid choice: 'even'"),
        ("", "^the following arguments are required: --max_steps"),
    ],
)
def test_mistakes(parser: ArgumentParser, argv: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        parser.parse_args(argv.split())
    assert "\n" not in str(error.value)


def test_what_is_right(parser: ArgumentParser) -> None:
    assert vars(parser.parse_args(["--max_steps=3"])) == {"max_steps": 3, "split": None}


def test_did_you_mean() -> None:
    assert did_you_mean("learning_rat", ["learning_rate", "epochs"]) == "did you mean learning_rate? "
    assert did_you_mean("xyz", ["learning_rate", "epochs"]) == ""


def test_a_command_exits_with_one_line() -> None:
    done = python("-m", "train.preprocess_data", "--datset", "stdlib", cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: unknown flag --datset; did you mean --dataset? --help lists all\n"


@pytest.mark.parametrize("tool", sorted(set(TOOLS) - {"train"}))
def test_every_command_answers_an_unknown_flag_in_one_line(tool: str) -> None:
    main = importlib.import_module(TOOLS[tool][0]).main
    with pytest.raises(UserError, match=r"^(unknown flag --hlp|the following arguments are required).*$"):
        main(["--hlp"])
