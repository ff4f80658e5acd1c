from pathlib import Path

import pytest

from tests.conftest import ROOT
from train.config import packaged
from train.utils.errors import UserError


def test_everything_in_the_repositorys_folders_is_shipped() -> None:
    ours = [
        file.resolve()
        for folder in ("accelerate_configs", "ds_configs", "recipes")
        for file in sorted((ROOT / folder).iterdir())
    ]
    assert [file.resolve() for file in packaged.configurations()] == ours
    assert len({file.stem for file in ours}) == len(ours), "a name without its ending is one file's"


@pytest.mark.parametrize("name", ["zero2.json", "ds_configs/zero2.json"])
def test_a_json_that_is_not_here_is_the_shipped_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert packaged.here_or_shipped(name, packaged.DEEPSPEED).samefile(ROOT / "ds_configs" / "zero2.json")
    own = tmp_path / name
    own.parent.mkdir(exist_ok=True)
    own.write_text("{}")
    assert packaged.here_or_shipped(name, packaged.DEEPSPEED).samefile(own), "one's own file comes first"


@pytest.mark.parametrize("name", ["my/zero2.json", "../zero2.json", "/zero2.json", "zero9.json", "zero2"])
def test_no_other_name_is_taken_for_a_shipped_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert packaged.here_or_shipped(name, packaged.DEEPSPEED) == Path(name)


def test_a_shipped_configuration_is_found_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    packaged.main(["ddp"])
    assert Path(capsys.readouterr().out.strip()).samefile(ROOT / "accelerate_configs" / "ddp.yaml")
    packaged.main(["zero3.json"])
    assert Path(capsys.readouterr().out.strip()).samefile(ROOT / "ds_configs" / "zero3.json")
    packaged.main([])
    assert capsys.readouterr().out.split() == [str(file) for file in packaged.configurations()]
    with pytest.raises(
        UserError,
        match=r"config zero9: there is no such configuration; did you mean zero3\? choose from ddp, .*, zero3",
    ):
        packaged.main(["zero9"])
