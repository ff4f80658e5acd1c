import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import CompileConfig, GPT2Config, GPT2LMHeadModel

from tests.conftest import SMALL, python
from tests.tiny_gpt2 import TINY, make_ours, pad, tokens
from train.checkpoints.loading import load_for_inference, load_tokenizer
from train.generate.__main__ import SEPARATOR, main
from train.generate.cpu_layers import pack_weights
from train.generate.decoding import Decoding
from train.generate.latency import measure_latency, measure_speed
from train.generate.texts import generate_text, generate_texts
from train.metrics.hardware import versions
from train.utils.errors import UserError

PROMPTS = ["import os", "class A:", "", "def f(self, x):\n    return"]
GREEDY = Decoding(12, temperature=0)


def test_options_of_sampling_are_passed_only_where_tokens_are_sampled() -> None:
    options = {"temperature", "top_k", "top_p"}
    assert options <= Decoding().arguments().keys()
    assert not options & GREEDY.arguments().keys()


@pytest.mark.parametrize("device", ["cpu", "cuda", "hpu"])
def test_compile_does_not_depend_on_transformers_list_of_devices(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr("train.utils.devices.device_type", lambda: device)
    config = Decoding(static_cache=True, compiled=True).arguments()["compile_config"]
    assert config._compile_all_devices
    assert config.mode == ("default" if device == "cpu" else CompileConfig().mode)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tests run side by side, and threads of so small a model would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def printed(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    main([str(word) for word in argv])
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock GPT-2 folder whose random weights are so large that every token depends on all before it."""
    folder = tmp_path_factory.mktemp("writer")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**SMALL, initializer_range=0.5)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def greedy(writer: Path) -> list[str]:
    """What stock GPT-2 writes after each of the prompts, alone."""
    stock = GPT2LMHeadModel.from_pretrained(writer).eval()
    tokenizer = load_tokenizer(writer, stock.config)
    texts = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt or tokenizer.eos_token, return_tensors="pt")
        ids = stock.generate(**inputs, max_new_tokens=12, do_sample=False)
        assert len(ids[0, -12:].unique()) > 4, "texts that repeat a token could not tell the ways apart"
        texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts


def test_the_command_writes_prompt_and_continuation(finished: Path, tmp_path: Path) -> None:
    words = ["--checkpoint", finished, "--prompt", "import os", "--max_new_tokens", "5", "--seed", "3"]
    first, second = (python("-m", "train.generate", *words, cwd=tmp_path) for _ in range(2))
    assert first.stdout.startswith("import os")
    assert len(first.stdout) > len("import os\n")
    assert first.stdout == second.stdout, "a seed repeats its text"
    assert first.stderr == ""


def test_int8_is_quiet_and_writes(finished: Path, tmp_path: Path) -> None:
    words = ["--checkpoint", finished, "--prompt", "import os", "--max_new_tokens", "5", "--quantize", "int8"]
    done = python("-m", "train.generate", *words, cwd=tmp_path)
    assert done.stdout.startswith("import os")
    assert done.stderr == ""


@pytest.mark.parametrize(
    "way",
    [
        "",
        "--cache static",
        "--batch_size 4",
        "--batch_size 3",
        "--batch_size 3 --cache static",
        "--assistant SMALL",
        "--assistant ITSELF",
        "--stream",
        "--stream --assistant SMALL",
    ],
)
def test_every_way_writes_what_stock_gpt2_does(
    writer: Path, small_model: Path, greedy: list[str], way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {"ITSELF": writer, "SMALL": small_model}
    words = [folders.get(word, word) for word in way.split()]
    out = printed(capsys, "--checkpoint", writer, "--temperature", 0, "--max_new_tokens", 12, *words,
                  "--prompt", *PROMPTS)  # fmt: skip
    assert out == f"\n{SEPARATOR}\n".join(greedy) + "\n"


def test_without_a_cache_and_compiled_the_same_tokens_come(tmp_path: Path) -> None:
    ours = make_ours()
    ids, mask = pad(tokens(3), [0, 4, 9], "left")
    settings = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
    expected = ours.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(ours.generate(ids, attention_mask=mask, use_cache=False, **settings), expected)
    # Traced as --compile does, but without the minute that inductor takes.
    compiled = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    static = {"cache_implementation": "static", "compile_config": compiled}
    assert torch.equal(ours.generate(ids, attention_mask=mask, **static, **settings), expected)
    assert ours._compiled_call is not None
    for rows in (1, 3):
        assert torch.equal(pack_weights(ours, rows).generate(ids, attention_mask=mask, **settings), expected)


@pytest.mark.slow
def test_compiled_text_is_the_same(writer: Path, greedy: list[str], tmp_path: Path) -> None:
    words = ["--checkpoint", writer, "--compile", "--temperature", 0, "--max_new_tokens", 12, "--batch_size", 2]
    done = python("-m", "train.generate", *words, "--prompt", *PROMPTS, cwd=tmp_path)
    assert done.stdout == f"\n{SEPARATOR}\n".join(greedy) + "\n"
    assert done.stderr == ""


def test_prompts_from_a_file_and_json(
    writer: Path, greedy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PROMPTS[1]}\n\nimport é  \n")
    out = printed(capsys, "--checkpoint", writer, "--temperature", 0, "--max_new_tokens", 12,
                  "--prompt", PROMPTS[0], "--prompt_file", file, "--json")  # fmt: skip
    found = [json.loads(line) for line in out.splitlines()]
    assert [each["prompt"] for each in found] == [PROMPTS[0], PROMPTS[1], "import é  "]
    assert [each["text"] for each in found[:2]] == greedy[:2]
    assert found[2]["text"].startswith("import é  ")


def test_several_texts_for_each_prompt(writer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--checkpoint", writer, "--max_new_tokens", 6, "--prompt", "def", "if", "--num_return_sequences", 3]
    texts = printed(capsys, *words, "--batch_size", 2, "--temperature", 2).rstrip("\n").split(f"\n{SEPARATOR}\n")
    assert [text.startswith("def") for text in texts] == [True] * 3 + [False] * 3
    assert len(set(texts)) == 6, "each is drawn on its own"
    again = printed(capsys, *words, "--batch_size", 2, "--temperature", 2)
    assert again.rstrip("\n").split(f"\n{SEPARATOR}\n") == texts, "a seed repeats its texts"
    assert printed(capsys, *words, "--batch_size", 2, "--temperature", 2, "--seed", 1) != again


def test_top_p_of_almost_nothing_keeps_the_most_likely_token(
    writer: Path, greedy: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--checkpoint", writer, "--max_new_tokens", 12, "--prompt", PROMPTS[1], "--temperature", 2, "--top_k", 0]
    assert printed(capsys, *words, "--top_p", 1e-6) == greedy[1] + "\n"
    assert printed(capsys, *words) == printed(capsys, *words, "--top_p", 1) != greedy[1] + "\n"


def test_a_drawn_text_is_streamed_as_it_is_printed(writer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--checkpoint", writer, "--max_new_tokens", 30, "--prompt", "def ", "x\ny", "--temperature", 1]
    assert printed(capsys, *words, "--stream") == printed(capsys, *words)


def test_a_stream_arrives_piece_by_piece(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = []
    monkeypatch.setattr("builtins.print", lambda *words, **_: pieces.append(" ".join(words)))
    main(["--checkpoint", str(finished), "--max_new_tokens", "20", "--prompt", "a b c", "--stream"])
    assert len(pieces) > 20, "a piece a token, if only an empty one"


def test_several_texts_from_an_empty_prompt(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "--checkpoint", finished, "--max_new_tokens", 4, "--num_return_sequences", 3)
    assert out.count(SEPARATOR) == 2


def test_a_stock_folder_without_a_tokenizer_works(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--checkpoint", small_model, "--prompt", "def", "--max_new_tokens", 2).startswith("def")


def test_generate_text_continues_one_prompt(writer: Path, greedy: list[str]) -> None:
    model = load_for_inference(writer)
    tokenizer = load_tokenizer(writer, model.config)
    assert generate_text(model, tokenizer, PROMPTS[1], GREEDY) == greedy[1]
    assert list(generate_texts(model, tokenizer, PROMPTS, GREEDY, batch_size=2)) == [[text] for text in greedy]


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        ("--checkpoint nowhere", ["nowhere", "no such folder"]),
        ("--checkpoint .", [".", "config.json"]),
        ("--max_new_tokens 0", ["--max_new_tokens: 0", "at least 1"]),
        ("--temperature -1", ["--temperature", "at least 0"]),
        ("--top_p 1.5", ["--top_p: 1.5", "at most 1"]),
        ("--batch_size 0", ["--batch_size: 0", "at least 1"]),
        ("--prompt a_b --max_new_tokens 64", ["64", "67", "61 or fewer"]),
        ("--prompt LONG --max_new_tokens 1", ["--max_new_tokens 1", "shorten the prompt"]),
        ("--num_return_sequences 2 --temperature 0", ["--num_return_sequences 2", "raise the temperature"]),
        ("--stream --batch_size 2", ["--stream", "--batch_size"]),
        ("--stream --num_return_sequences 2", ["--stream", "one sequence"]),
        ("--stream --json", ["--stream", "--json"]),
        ("--compile --cache dynamic", ["--cache dynamic", "--cache static"]),
        ("--compile --quantize int8", ["--quantize int8", "drop --compile"]),
        ("--assistant SMALL --cache static", ["--assistant", "--cache static"]),
        ("--assistant SMALL --num_return_sequences 2", ["--assistant", "one sequence"]),
        ("--assistant nowhere --max_new_tokens 4", ["--assistant nowhere", "no such folder"]),
        ("--assistant OTHER --max_new_tokens 4", ["--assistant", "61 tokens", "50257"]),
        ("--prompt_file nowhere", ["nowhere cannot be read: No such file"]),
        ("--prompt_file EMPTY", ["--prompt_file", "no prompts"]),
        ("--prompt_file BINARY", ["is not UTF-8"]),
        ("--batch_sizes 1", ["--batch_sizes", "--benchmark"]),
        ("--benchmark --prompt a", ["--prompt", "--benchmark"]),
        ("--benchmark --batch_size 2", ["--benchmark", "--batch_sizes"]),
        ("--benchmark --batch_sizes 1 0", ["--batch_sizes: 0", "at least 1"]),
        ("--benchmark --max_new_tokens 1", ["--max_new_tokens 1", "2 or more"]),
        ("--benchmark --max_new_tokens 40", ["--max_new_tokens 40", "72", "32 or fewer"]),
    ],
)
def test_mistakes_are_sentences(
    finished: Path, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: str, names: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("EMPTY").write_text("\n")
    Path("BINARY").write_bytes(b"\xff\xfe")
    if "OTHER" in argv:
        make_ours().save_pretrained("OTHER")
        assert TINY["vocab_size"] == 61
    words = [{"SMALL": str(small_model), "LONG": "x " * SMALL["n_positions"]}.get(word, word) for word in argv.split()]
    with pytest.raises(UserError) as error:
        main(["--checkpoint", str(finished), *words])
    assert all(name in str(error.value) for name in names), str(error.value)


def test_a_mistake_ends_with_exit_code_2(finished: Path, tmp_path: Path) -> None:
    words = ["--checkpoint", finished, "--stream", "--json"]
    done = python("-m", "train.generate", *words, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --stream")


def test_latency_has_both_parts(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[list[float]] = []
    monkeypatch.setattr("train.generate.latency.percentiles", lambda values, **_: measured.append(values))
    metrics = measure_latency(load_for_inference(small_model), torch.arange(8)[None], new_tokens=48)
    first, further = measured
    assert (len(first), len(further)) == (3 + 20, 3 * 47)
    assert min(first) <= metrics["inference_latency_seconds"] <= max(first)
    assert min(further) <= metrics["inference_seconds_per_token"] <= max(further)
    assert min(first + further) > 0


def test_speed_is_coherent(small_model: Path) -> None:
    ids = torch.arange(16).view(2, 8)
    speed = measure_speed(load_for_inference(small_model), ids, Decoding(24))
    assert speed["batch_size"] == 2
    seconds = 2 * 24 / speed["tokens_per_second"]
    assert 0 < speed["first_token_seconds"] < 1.5 * seconds, "medians of different rounds"
    weights = 4 * load_for_inference(small_model).num_parameters()
    assert weights < speed["memory_bytes"] < 64e9


@pytest.mark.parametrize(
    "way", [pytest.param("", marks=pytest.mark.torch_version), "--quantize int8", "--cache static"]
)
def test_the_benchmark_prints_a_row_for_each_batch_size(
    finished: Path, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--checkpoint", finished, "--benchmark", "--batch_sizes", 1, 3, "--max_new_tokens", 4, *way.split()]
    table = [line for line in printed(capsys, *words).splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in table[2:]] == ["1", "3"]
    figures = json.loads(printed(capsys, *words, "--json"))
    assert [speed["batch_size"] for speed in figures["speeds"]] == [1, 3]
    assert all(value > 0 for speed in figures["speeds"] for value in speed.values())
    assert figures["new_tokens"] == 4
    assert figures["versions"] == versions()


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert out.count("python -m train.generate --checkpoint") == 5
    assert "--prompt_file" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "nan"], r"^--temperature: 'nan' is not a number$"),
        (["--temperature", "1e-30"], r"^--temperature 1e-30: logits divided by so little overflow; write 0"),
        (["--seed", str(2**70)], r"^--seed: 1180591620717411303424 must be at least 0 and below 18,446,744"),
        (["--seed", "9" * 5000], r"^--seed: '9{78}… is not a whole number$"),
        (["--batch_size", str(2**60)], r"^--batch_size: 1152921504606846976 is larger than any count here can be"),
        (["--max_new_tokens", "1e999"], r"^--max_new_tokens: '1e999' is not a whole number$"),
        (["--prompt", "caf\udce9"], r"^an argument: b'caf\\xe9' is not UTF-8; write it in UTF-8$"),
        (["--prompt=caf\udce9"], r"^--prompt: b'caf\\xe9' is not UTF-8; write it in UTF-8$"),
    ],
)
def test_values_that_are_none_are_refused_in_one_line(words: list[str], message: str, writer: Path) -> None:
    with pytest.raises(UserError, match=message):
        main(["--checkpoint", str(writer), *words])


@pytest.mark.parametrize("words", [["--num_return_sequences"], ["--benchmark", "--batch_sizes"]])
def test_more_sequences_than_any_memory_holds(words: list[str], writer: Path) -> None:
    with pytest.raises(UserError, match=r"^2,147,483,648 sequences at once: the logits of one token alone take"):
        main(["--checkpoint", str(writer), "--max_new_tokens", "2", *words, str(2**31)])


@pytest.mark.parametrize("kind", ["latin-1", "pipe", "folder"])
def test_a_file_of_prompts_that_cannot_be_read(kind: str, writer: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    if kind == "latin-1":
        path.write_bytes(b"caf\xe9\n")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    reason = {"latin-1": "is not text: byte 3 is not UTF-8", "pipe": "is a pipe or", "folder": "cannot be read: Is a"}
    with pytest.raises(UserError, match=f"prompts.txt {reason[kind]}"):
        main(["--checkpoint", str(writer), "--prompt_file", str(path)])
