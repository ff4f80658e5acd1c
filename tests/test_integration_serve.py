"""`transformers serve` and `transformers chat` on an exported run: real processes, real HTTP."""

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import AutoTokenizer

from modeling_gpt2flash import GPT2FlashForCausalLM
from tests.conftest import command, free_port
from tests.jobs import job
from tests.tiny_gpt2 import save_like_a_run
from train.export import __main__ as export

pytestmark = pytest.mark.integration
PROMPT = "def decode"
# What makes a model that only goes on with a text take part in a chat: the text is what was said so far.
TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"


class Server(NamedTuple):
    """Where it listens, and the folders: a run, its export, and one that has a chat template as well."""

    address: str
    run: Path
    gpt2: Path
    chat: Path

    def client(self) -> Any:
        import openai

        return openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0)

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/health") as answer:
                return answer.status == 200
        except urllib.error.URLError:
            return False


@pytest.fixture(scope="module")
def server(tuned_from: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("served")
    port = free_port()
    served = Server(f"http://127.0.0.1:{port}", root / "run", root / "gpt2", root / "chat")
    save_like_a_run(served.run, tuned_from, initializer_range=0.5)
    export.main([str(served.run), str(served.gpt2)])
    shutil.copytree(served.gpt2, served.chat)
    (served.chat / "chat_template.jinja").write_text(TEMPLATE)
    words = ["transformers", "serve", "--host=127.0.0.1", f"--port={port}", "--trust-remote-code"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("HF_HUB_DISABLE_UPDATE_CHECK", "1")
        with job(*words, cwd=root) as running:
            running.until(served.healthy)
            yield served


def continuation(server: Server, text: str, new: int) -> tuple[str, int]:
    """What our model writes behind a text, and how many tokens that is."""
    tokenizer = AutoTokenizer.from_pretrained(server.run)
    ids = tokenizer(text, return_tensors="pt").input_ids
    ours = GPT2FlashForCausalLM.from_pretrained(server.run).eval()
    written = ours.generate(ids, max_new_tokens=new, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(written, skip_special_tokens=True), len(written)


def test_completions_are_what_our_model_writes(server: Server) -> None:
    expected, count = continuation(server, PROMPT, 12)
    asked = {"model": str(server.gpt2), "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    answer = server.client().completions.create(**asked)
    assert (answer.choices[0].text, answer.usage.completion_tokens) == (expected, count)
    pieces = list(server.client().completions.create(**asked, stream=True))
    assert len(pieces) > 2
    # A character that is not finished when the last token is, is left out of the stream.
    assert "".join(piece.choices[0].text for piece in pieces).rstrip("\ufffd") == expected.rstrip("\ufffd")


def test_a_chat_needs_a_template(server: Server) -> None:
    import openai

    asked = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 12, "temperature": 0}
    with pytest.raises(openai.InternalServerError):
        server.client().chat.completions.create(model=str(server.gpt2), **asked)
    answer = server.client().chat.completions.create(model=str(server.chat), **asked)
    assert answer.choices[0].message.content == continuation(server, f"{PROMPT}\n", 12)[0]


def test_the_chat_in_the_terminal(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # offline, its client asks no server at all, not even this one
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    said = command(
        "transformers", "chat", server.chat, server.address, "do_sample=False", "max_new_tokens=12",
        cwd=tmp_path, stdin=f"{PROMPT}\nn\n!exit\n",
    ).stdout  # fmt: skip
    expected, count = continuation(server, f"{PROMPT}\n", 12)
    assert f"{count} tokens in" in said

    def letters(text: str) -> str:
        return "".join(filter(str.isalnum, text))

    assert letters(expected) in letters(said), "Markdown is rendered, so signs and spaces may go"


def test_a_run_is_exported_first(server: Server) -> None:
    """serve looks classes up in transformers itself. The day it does not, docs/integrations.md has a line too many."""
    body = json.dumps({"model": str(server.run)}).encode()
    request = urllib.request.Request(f"{server.address}/load_model", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        events = [json.loads(line.removeprefix(b"data: ")) for line in answer if line.startswith(b"data: ")]
    assert events[-1]["status"] == "error"
    assert "GPT2FlashForCausalLM" in events[-1]["message"]
