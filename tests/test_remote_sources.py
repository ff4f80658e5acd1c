"""Files behind http: what a server does wrong for a while costs time and nothing else."""

import re
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import command
from tests.preparations import contents, pieces_of_the_standard_library, sentence, write_lines, write_parquet

# What a person would do to wait less: the retries' constants, the time without a byte after which a read is given up.
IMPATIENT = """
import sys
from train.preprocess_data import streams
from train.utils.command import run_command
from train.preprocess_data.__main__ import main
streams.RETRY_SECONDS, streams.RETRIES, streams.SILENCE_SECONDS = 0.01, {retries}, 3.0
run_command(lambda: main(sys.argv[1:]))
"""
RETRIES = 4
FAULTS = ("503", "429", "reset", "truncated", "stall")

# (path, how many bodies of it were asked for before this one) → what goes wrong with it
Plan = Callable[[str, int], str | None]
WELL: Plan = lambda path, number: None  # noqa: E731
# Which of the bodies of the second file come in the middle of reading, before them those of opening both.
IN_MID_STREAM = {"parquet": (3, 5), "jsonl.gz": (1, 2)}


class FaultyServer(ThreadingHTTPServer):
    """Serves a folder's files, whole or in ranges, and fails as it is told to."""

    daemon_threads = True

    def __init__(self, folder: Path, ranges: bool) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.ranges = ranges
        self.plan = WELL
        self.bodies: Counter[str] = Counter()
        self.failed = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()

    def fault(self, path: str) -> str | None:
        with self.lock:
            fault = self.plan(path, self.bodies[path])
            self.bodies[path] += 1
            self.failed += fault is not None
            return fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def do_HEAD(self) -> None:
        self._head()

    def do_GET(self) -> None:
        fault = self.server.fault(self.path)
        if fault in ("503", "429"):
            self.send_error(int(fault))
            return
        body = self._head()
        if fault is None:
            self.wfile.write(body)
            return
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        self.close_connection = True
        if fault == "stall":
            self.server.closing.wait(60)
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def _head(self) -> bytes:
        """Send the headers; return the body that belongs to them."""
        file = self.server.folder / self.path.lstrip("/")
        if not file.is_file():
            self.send_error(404)
            return b""
        content = file.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if self.server.ranges else None
        if asked:
            first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            content = content[first : last + 1]
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes" if self.server.ranges else "none")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return content

    def log_message(self, *_: Any) -> None:
        """The test speaks for itself."""


@contextmanager
def serving(folder: Path, ranges: bool = True) -> Iterator[FaultyServer]:
    server = FaultyServer(folder, ranges)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of each kind, 11 MB of text: more than a reader takes at once."""
    folder = tmp_path_factory.mktemp("served")
    texts = pieces_of_the_standard_library()
    for number, part in enumerate((texts[:3000], texts[3000:])):
        write_parquet(folder / f"{number}.parquet", part, row_group_size=200, compression="none")
        write_lines(folder / f"{number}.jsonl.gz", part)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the same files give when they are local."""
    out = tmp_path_factory.mktemp("whole")
    done = {}
    for kind in ("parquet", "jsonl.gz"):
        files = [str(folder / f"{number}.{kind}") for number in (0, 1)]
        assert fetch(kind, files, out / kind, cwd=out).returncode == 0
        done[kind] = contents(out / kind)
    return done


def fetch(
    kind: str, files: list[str], out: Path, cwd: Path, retries: int = RETRIES
) -> subprocess.CompletedProcess[str]:
    words = [f"--dataset={'parquet' if kind == 'parquet' else 'json'}", "--data_files", *files, f"--out_dir={out}"]
    script = IMPATIENT.format(retries=retries)
    return command(sys.executable, "-c", script, *words, "--val_fraction=0.05", "--num_proc=1", cwd=cwd, check=False)


def urls(server: FaultyServer, kind: str) -> list[str]:
    return [f"http://127.0.0.1:{server.server_port}/{number}.{kind}" for number in (0, 1)]


def check_same(out: Path, local: dict[str, Any]) -> None:
    """Everything but the sidecars' word on what was asked for and where the text came from."""
    local_names = {"source": None, "request": None}
    found = contents(out)
    assert set(found) == set(local)
    for name in found:
        if name.endswith(".json"):
            assert found[name] | local_names == local[name] | local_names
        else:
            assert found[name] == local[name]


def rows_gone_on_at(said: str) -> list[int]:
    return [int(row.replace(",", "")) for row in re.findall(r"row ([\d,]+)", said)]


KINDS = (("parquet", True), ("jsonl.gz", True), ("jsonl.gz", False))
QUICK = {("parquet", True, "503"), ("parquet", True, "reset"), ("jsonl.gz", True, "429"), ("jsonl.gz", False, "reset")}


@pytest.mark.parametrize(
    ("kind", "ranges", "fault"),
    [
        pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
        for case in ((kind, ranges, fault) for kind, ranges in KINDS for fault in FAULTS)
    ],
)
def test_what_passes_costs_nothing(
    folder: Path, whole: dict[str, Any], tmp_path: Path, kind: str, ranges: bool, fault: str
) -> None:
    with serving(folder, ranges) as server:
        server.plan = lambda path, number: fault if path == f"/1.{kind}" and number in IN_MID_STREAM[kind] else None
        done = fetch(kind, urls(server, kind), tmp_path / "out", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert server.failed == 2
    check_same(tmp_path / "out", whole[kind])
    rows = rows_gone_on_at(done.stderr)
    assert len(rows) == 2, done.stderr
    assert 0 < rows[0] <= rows[1]


@pytest.mark.parametrize("fault", ["503", "429"])
def test_a_server_that_is_busy_at_first(folder: Path, whole: dict[str, Any], tmp_path: Path, fault: str) -> None:
    with serving(folder) as server:
        server.plan = lambda path, number: fault if number == 0 else None
        done = fetch("parquet", urls(server, "parquet"), tmp_path / "out", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert server.failed == 2
    check_same(tmp_path / "out", whole["parquet"])


def test_a_server_that_stays_broken_is_a_sentence_and_the_same_command_goes_on_later(
    folder: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with serving(folder) as server:
        server.plan = lambda path, number: "503" if path == "/1.parquet" and number >= 3 else None
        words = ("parquet", urls(server, "parquet"), out, tmp_path)
        said = sentence(broken := fetch(*words))
        assert "503" in said
        assert f"127.0.0.1:{server.server_port}" in said
        assert server.failed >= RETRIES
        rows = rows_gone_on_at(broken.stderr)
        kept = contents(out / ".preparing")["journal.json"]["rows"]
        assert kept > 0
        assert set(rows) == {kept}
        server.plan = WELL
        done = fetch(*words)
        assert done.returncode == 0, done.stderr
        assert kept in rows_gone_on_at(done.stderr)
    check_same(out, whole["parquet"])


def test_a_file_that_is_not_there_is_a_sentence_at_once(folder: Path, tmp_path: Path) -> None:
    with serving(folder) as server:
        for kind in ("parquet", "jsonl.gz"):
            missing = f"http://127.0.0.1:{server.server_port}/missing.{kind}"
            done = fetch(kind, [missing], tmp_path / kind, cwd=tmp_path, retries=1_000_000)
            said = sentence(done)
            assert missing in said or "missing" in said
            assert not rows_gone_on_at(done.stderr)
            assert not list((tmp_path / kind).glob("*"))


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/a.parquet"
        said = sentence(fetch("parquet", [url], tmp_path / "out", cwd=tmp_path))
    assert "127.0.0.1" in said


def test_a_file_that_changed_on_the_server_is_not_mixed_with_what_is_kept(
    folder: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    served = tmp_path / "served"
    served.mkdir()
    for number in (0, 1):
        (served / f"{number}.parquet").symlink_to(folder / f"{number}.parquet")
    out = tmp_path / "out"
    with serving(served) as server:
        server.plan = lambda path, number: "503" if path == "/1.parquet" and number >= 3 else None
        words = ("parquet", urls(server, "parquet"), out, tmp_path)
        sentence(fetch(*words))
        server.plan = WELL
        (served / "1.parquet").unlink()
        write_parquet(served / "1.parquet", ["another text"] * 50)
        done = fetch(*words)
        assert done.returncode == 2, "two states of a source in one preparation"
