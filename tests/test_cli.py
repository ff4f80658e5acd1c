import importlib
import re
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, python
from train import cli


def test_help_names_every_tool_and_imports_none(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom train import cli\nsys.argv = ['gpt2flash', '--help']\ncli.run()\nprint(sorted(sys.modules))"
    )
    said, _, modules = python("-c", code, cwd=tmp_path).stdout.rpartition("\n[")
    assert re.findall(r"^  (\w+)  ", said, re.MULTILINE) == list(cli.TOOLS)
    assert not set(re.findall(r"'(\w+)'", modules)) & {"torch", "transformers", "numpy", "accelerate", "deepspeed"}


def test_every_command_of_the_package_is_a_tool() -> None:
    commands = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "train").rglob("*.py")
        if "\n    run_command(main)\n" in path.read_text()
    }
    assert commands == {module for module, _ in cli.TOOLS.values()}
    assert all(callable(importlib.import_module(module).main) for module in commands)


@pytest.mark.parametrize(
    ("words", "sentence"), [([], "name a tool, one of"), (["tain"], "gpt2flash tain: there is no")]
)
def test_what_is_no_tool_is_answered_in_a_sentence(
    words: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpt2flash", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    error = capsys.readouterr().err
    assert (end.value.code, error.count("\n")) == (2, 1)
    assert sentence in error
    assert "train, generate, compare" in error


def test_a_tool_reads_what_follows_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpt2flash", "preprocess", "--verify", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert str(tmp_path / "nothing") in capsys.readouterr().err
