"""The package as it travels to the Hub: files copied beside the weights, and run without the package."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import modeling_gpt2flash
from modeling_gpt2flash import GPT2FlashConfig, GPT2FlashForCausalLM
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
            assert roots <= {"torch", "transformers", "huggingface_hub", "math", "typing"}, ast.unparse(node)
        relative = [line for line in text.splitlines() if line.lstrip().startswith(("from .", "import ."))]
        real = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
        assert len(relative) == len(real), f"{path.name}: prose that looks like an import"
    init = ast.parse((PACKAGE / "__init__.py").read_text())
    assert not any(isinstance(node, ast.ClassDef) for node in ast.walk(init))


def test_as_remote_code_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in (GPT2FlashConfig, GPT2FlashForCausalLM):
        monkeypatch.setattr(cls, "_auto_class", None)  # put back afterwards what the next two lines set
    GPT2FlashConfig.register_for_auto_class()
    GPT2FlashForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    ours = make_ours()
    ours.save_pretrained(tmp_path / "model")
    copied = {path.name for path in (tmp_path / "model").glob("*.py")}
    assert copied == {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "pipeline.py"}
    program = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True).eval()
assert "modeling_gpt2flash" not in sys.modules and type(model).__module__.startswith("transformers_modules")
ids = torch.arange(1, 11)[None]
print(model(ids, labels=ids).loss.item(), model.generate(ids, max_new_tokens=3, do_sample=False).tolist())
"""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ids = torch.arange(1, 11)[None]
    written = ours.generate(ids, max_new_tokens=3, do_sample=False).tolist()
    assert done.stdout.strip() == f"{ours(ids, labels=ids).loss.item()} {written}"
