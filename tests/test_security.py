"""Files of others are data: nothing in them is run, and no name in them leads out of their folder."""

import ast
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, GPT2LMHeadModel

from tests.conftest import ROOT
from train.checkpoints import nanogpt, starting
from train.checkpoints.loading import load_for_inference, load_model, model_config, own_tokenizer
from train.config.run_config import parse
from train.utils.errors import UserError

SOURCES = sorted(
    path for folder in ("modeling_gpt2flash", "train", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)
CONFIG = {"dropout": 0.0, "loss_chunk_size": 0}

# Calls that run what they read, or write to a path that the data names.
MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "tarfile", "zipfile"}
CALLS = {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.jit.load",
         "shutil.unpack_archive"}  # fmt: skip
KEYWORDS = {"shell": False, "allow_pickle": False, "trust_remote_code": False, "weights_only": True}


def dangers(source: str) -> list[str]:
    """What in a program could run a file's content."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            found.append(node.module)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            loads_text = (
                name == "yaml.load" and given.get("Loader") == "yaml.BaseLoader"
            )  # strings, lists and mappings
            found += [name] if name in CALLS and not loads_text else []
            found += [name] if name == "torch.load" and "weights_only" not in given else []
            found += [key for key, safe in KEYWORDS.items() if given.get(key, str(safe)) != str(safe)]
    return found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import pickle", ["pickle"]),
        ("from zipfile import ZipFile", ["zipfile"]),
        ("torch.load(file)", ["torch.load"]),
        ("torch.load(file, weights_only=False)", ["weights_only"]),
        ("np.load(file, allow_pickle=True)", ["allow_pickle"]),
        ("AutoModel.from_pretrained(name, trust_remote_code=asked)", ["trust_remote_code"]),
        ("subprocess.run(words, shell=True)", ["shell"]),
        ("yaml.load(text)", ["yaml.load"]),
        ("yaml.load(text, Loader=yaml.BaseLoader); yaml.load(text, Loader=yaml.Loader)", ["yaml.load"]),
        ("eval(text); model.eval(); yaml.safe_load(text); torch.load(file, weights_only=True)", ["eval"]),
    ],
)
def test_the_search_finds_what_it_is_for(source: str, expected: list[str]) -> None:
    assert dangers(source) == expected


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_program_runs_what_it_reads(path: Path) -> None:
    assert dangers(path.read_text()) == []


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def model_folder(small_model: Path, tmp_path: Path) -> Path:
    """A copy of the small model that a test may spoil."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for file in small_model.iterdir():
        (folder / file.name).hardlink_to(file)
    return folder


def replaced(file: Path, content: str) -> None:
    """New content under a name that may be a link to a shared file."""
    file.unlink(missing_ok=True)
    file.write_text(content)


def test_a_pickle_is_not_run(model_folder: Path, tmp_path: Path) -> None:
    bomb = {"transformer.wte.weight": torch.ones(2), "model": Bomb(tmp_path / "run"), "model_args": {}}
    torch.save(bomb, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="without running its code"):
        nanogpt.read_config(tmp_path / "ckpt.pt")
    (model_folder / "model.safetensors").unlink()
    torch.save(bomb, model_folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be read"):
        load_model(str(model_folder), model_config(str(model_folder), **CONFIG))
    with pytest.raises(UserError, match="cannot be read"):
        load_for_inference(model_folder)
    assert not (tmp_path / "run").exists()
    torch.load(tmp_path / "ckpt.pt", weights_only=False)
    assert (tmp_path / "run").exists(), "it does go off where it is run"


def test_code_beside_the_weights_is_not_run(
    model_folder: Path, tuned_from: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever wants it says `trust_remote_code` to transformers; no flag here does."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (model_folder / "theirs.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'run')!r})\n")
    kinds = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    fields = json.loads((model_folder / "config.json").read_text())
    names = dict.fromkeys(kinds, "theirs.Theirs")
    replaced(model_folder / "config.json", json.dumps(fields | {"auto_map": names}))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        replaced(model_folder / file, (tuned_from / file).read_text())
    fields = json.loads((model_folder / "tokenizer_config.json").read_text())
    fields |= {"auto_map": {"AutoTokenizer": ["theirs.Theirs", "theirs.Theirs"]}, "tokenizer_class": "Theirs"}
    replaced(model_folder / "tokenizer_config.json", json.dumps(fields))
    config = model_config(str(model_folder), **CONFIG)
    load_model(str(model_folder), config)
    load_for_inference(model_folder)
    assert own_tokenizer(str(model_folder), 64) is not None
    assert not (tmp_path / "run").exists()
    with pytest.raises(AttributeError):
        AutoConfig.from_pretrained(model_folder, trust_remote_code=True)
    assert (tmp_path / "run").exists(), "it does go off where it is run"


@pytest.mark.parametrize("shard", ["../{}", "/{}", "sub/{}"])
def test_an_index_names_weights_beside_it(model_folder: Path, small_model: Path, shard: str) -> None:
    (model_folder / "model.safetensors").unlink()
    there = os.path.relpath(small_model, model_folder)
    name = {"../{}": f"{there}/model.safetensors", "/{}": f"{small_model}/model.safetensors"}.get(shard, "sub/a.b")
    weights = dict.fromkeys(GPT2LMHeadModel.from_pretrained(small_model).state_dict(), name)
    index = {"metadata": {}, "weight_map": weights}
    replaced(model_folder / "model.safetensors.index.json", json.dumps(index))
    with pytest.raises(UserError, match="is not a file beside it"):
        load_model(str(model_folder), model_config(str(model_folder), **CONFIG))
    with pytest.raises(UserError, match="is not a file beside it"):
        load_for_inference(model_folder)


@pytest.mark.parametrize("name", ["../elsewhere/step-8", "/elsewhere/step-8", ".", "step-8/..", "step-x"])
def test_a_run_names_its_own_steps(tmp_path: Path, name: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest").write_text(f"{name}\n")
    with pytest.raises(UserError, match="write the step-N folder"):
        starting.find("latest", tmp_path / "run")


def test_a_chat_template_has_the_name_of_a_file(tuned_from: Path, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_text((tuned_from / file).read_text())
    fields = json.loads((folder / "tokenizer_config.json").read_text())

    def named(name: str) -> None:
        templates = [{"name": "default", "template": "a"}, {"name": name, "template": "b"}]
        (folder / "tokenizer_config.json").write_text(json.dumps(fields | {"chat_template": templates}))

    named("tools")
    assert own_tokenizer(str(folder), 64) is not None
    named("../../escaped")
    with pytest.raises(UserError, match=r"chat template named '\.\./\.\./escaped'"):
        own_tokenizer(str(folder), 64)


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"model: !!python/object/apply:os.mkdir [{tmp_path / 'run'}]\n")
    with pytest.raises(UserError, match="model: holds a list"):
        parse(["--config", str(tmp_path / "run.yaml")])
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_is_read_from_its_folder(tuned_from: Path, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "theirs", tmp_path / "elsewhere.json"
    folder.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_text((tuned_from / file).read_text())
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    content = json.loads((folder / "tokenizer.json").read_text())
    elsewhere.write_text(json.dumps(content | {"added_tokens": []}))
    fields |= {"tokenizer_file": str(elsewhere), "vocab_file": str(elsewhere)}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    tokenizer = own_tokenizer(str(folder), 64)
    assert tokenizer is not None
    assert tokenizer.encode("<|endoftext|>") == [0]
