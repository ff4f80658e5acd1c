"""The C++ compiler that torch.compile needs on a CPU."""

import os
import shutil
import sys

from train.utils.errors import UserError


def check_cpp_compiler(flag: str) -> None:
    """Raise a `UserError` that names `flag` if torch.compile would find no C++ compiler.

    The rule is `torch._inductor.config.cpp.cxx`, without the seconds that importing Inductor takes.
    """
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"{flag}: needs a C++ compiler on the CPU, and {compiler} is not there; install it, name another in the "
            "environment variable CXX, or drop the flag"
        )
