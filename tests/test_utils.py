"""Small helpers that several packages share."""

import pytest
from torch._inductor import config, cpp_builder

from train.engines.transforms import check_cpp_compiler
from train.utils.errors import UserError, first_line


def test_the_compiler_is_the_one_that_torch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    check_cpp_compiler("--torch_compile")
    assert cpp_builder.get_cpp_compiler() == config.cpp.cxx[-1]
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"^--compile: needs a C\+\+ compiler on the CPU, and no-such-compiler is not"):
        check_cpp_compiler("--compile")


def test_first_line_of_an_error() -> None:
    assert first_line(ValueError("\n  wrong\nin detail")) == "wrong"
    assert first_line(ValueError()) == "ValueError"
