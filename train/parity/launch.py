"""Run a command of the parity test in processes of its own, and stop it if it hangs."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

RUN_LIMIT = 900  # seconds after which a run counts as hanging
STOP_LIMIT = 30  # seconds that a launcher has to stop its processes


def launch(argv: Sequence[str], log: Path) -> str | None:
    """Run a command on the CPU with its output in `log`; None if it succeeded, else its error in a line."""
    environment = {
        "OMP_NUM_THREADS": "1",  # several processes share few cores
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            argv, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(RUN_LIMIT)
        except subprocess.TimeoutExpired:
            return f"it was not done after {RUN_LIMIT} seconds"
        finally:
            _stop(process)
    return None if code == 0 else f"exit code {code}: {error_line(log.read_text(errors='replace'))}"


def _stop(process: subprocess.Popen) -> None:
    """Terminate the launcher, which knows all its processes, and kill its process group if it does not exit."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def error_line(output: str) -> str:
    """The last line that names an error (launchers print more after it), else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"(\[rank\d+\]: ?)?([\w.]*(Error|Exception)|error)\b", line)]
    # The launchers' own errors only say that a process of theirs has failed.
    named = [line for line in named if "ChildFailedError" not in line and "CalledProcessError" not in line] or named
    return (named or lines or ["it printed nothing"])[-1]
