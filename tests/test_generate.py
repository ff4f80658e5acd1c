from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from tests.conftest import python
from train.errors import UserError
from train.generate import main
from train.inference import complete, load_model, load_tokenizer, measure_latency


def test_the_command_writes_prompt_and_continuation(finished: Path, tmp_path: Path) -> None:
    words = ["--checkpoint", finished, "--prompt", "import os", "--max_new_tokens", "5", "--seed", "3"]
    first, second = (python("-m", "train.generate", *words, cwd=tmp_path) for _ in range(2))
    assert first.stdout.startswith("import os")
    assert len(first.stdout) > len("import os\n")
    assert first.stdout == second.stdout, "a seed repeats its text"
    assert first.stderr == ""


def test_greedy_text_is_that_of_stock_gpt2(finished: Path) -> None:
    model = load_model(finished)
    tokenizer = load_tokenizer(finished, model)
    stock = GPT2LMHeadModel.from_pretrained(finished).eval()
    inputs = tokenizer("class A:", return_tensors="pt")
    expected = stock.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert complete(model, tokenizer, "class A:", 20, temperature=0) == tokenizer.batch_decode(
        expected, skip_special_tokens=True
    )


def test_several_texts_from_an_empty_prompt(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--checkpoint", str(finished), "--max_new_tokens", "4", "--num_return_sequences", "3"])
    assert capsys.readouterr().out.count("-" * 80) == 2


def test_a_stock_folder_without_a_tokenizer_works(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--checkpoint", str(small_model), "--prompt", "def", "--max_new_tokens", "2"])
    assert capsys.readouterr().out.startswith("def")


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--checkpoint", "nowhere"], ["nowhere", "no such folder"]),
        (["--checkpoint", "."], [".", "config.json"]),
        (["--checkpoint", "FINISHED", "--max_new_tokens", "0"], ["--max_new_tokens 0", "at least 1"]),
        (["--checkpoint", "FINISHED", "--temperature", "-1"], ["--temperature", "at least 0"]),
        (["--checkpoint", "FINISHED", "--prompt", "a b", "--max_new_tokens", "64"], ["64", "66", "62 or fewer"]),
    ],
)
def test_mistakes_are_sentences(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], names: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        main([str(finished) if word == "FINISHED" else word for word in argv])
    assert all(name in str(error.value) for name in names), str(error.value)


def test_latency_has_both_parts(small_model: Path) -> None:
    latency = measure_latency(load_model(small_model), torch.arange(8)[None], new_tokens=48)
    assert latency.first_token > 0
    assert latency.per_token > 0  # 47 tokens against the noise of one
