"""The package as it travels to the Hub: files copied beside the weights, and run without the package."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import torch

import modeling_gpt2flash
from tests.tiny_gpt2 import make_ours

PACKAGE = Path(modeling_gpt2flash.__file__).parent


def test_sources_survive_the_copy_to_the_hub() -> None:
    """The copier reads imports with a pattern and flattens folders: only `from .module import name` reaches it."""
    sources = sorted(PACKAGE.rglob("*.py"))
    assert all(path.parent == PACKAGE for path in sources)
    modules = {path.stem for path in sources}
    for path in sources:
        text = path.read_text()
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                roots = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{path.name}: an import from above"
                if node.level == 1:
                    assert node.module in modules, f"{path.name}: not a sibling: {ast.unparse(node)}"
                    continue
                roots = {node.module.split(".")[0]}
            else:
                continue
            assert roots <= {"torch", "transformers", "huggingface_hub", "math", "os", "typing"}, ast.unparse(node)
        relative = [line for line in text.splitlines() if line.lstrip().startswith(("from .", "import ."))]
        real = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
        assert len(relative) == len(real), f"{path.name}: prose that looks like an import"
    init = ast.parse((PACKAGE / "__init__.py").read_text())
    assert not any(isinstance(node, ast.ClassDef) for node in ast.walk(init))


def test_what_is_saved_opens_without_the_package_and_so_does_what_is_saved_of_that(tmp_path: Path) -> None:
    ours = make_ours()
    ours.save_pretrained(tmp_path / "model")
    copied = {path.name for path in (tmp_path / "model").glob("*.py")}
    assert copied == {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "pipeline.py"}
    program = """
import sys, torch
sys.modules["modeling_gpt2flash"] = None  # not installed
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
ids = torch.arange(1, 11)[None]
for folder in ("model", "again", "base"):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    for one in (config, model, base):
        assert type(one).__module__.startswith(f"transformers_modules.{folder}."), type(one)
    assert torch.equal(model.transformer(ids).last_hidden_state, base(ids).last_hidden_state)
    try:
        model(ids, no_such_argument=1)
    except TypeError as error:
        assert "no_such_argument" in str(error)
    else:
        raise AssertionError("an unknown argument was swallowed")
    print(model(ids, labels=ids).loss.item(), model.generate(ids, max_new_tokens=3, do_sample=False).tolist())
    if folder == "model":
        model.save_pretrained("again")
        base.save_pretrained("base")
"""
    environment = os.environ | {
        "HF_MODULES_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "",
        "DS_ACCELERATOR": "cpu",  # or DeepSpeed says between our lines that it has found no GPU
    }
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ids = torch.arange(1, 11)[None]
    written = ours.generate(ids, max_new_tokens=3, do_sample=False).tolist()
    assert done.stdout.splitlines() == [f"{ours(ids, labels=ids).loss.item()} {written}"] * 3
