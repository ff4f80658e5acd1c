"""GPT-2's tokenizer, built from the vocabulary in this package, without a network."""

import binascii
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str  # GPT-2's pre-tokenization pattern

from train.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import GPT2Tokenizer

END_OF_TEXT = 50256
VOCABULARY_SIZE = 50257
END_OF_TEXT_STRING = "<|endoftext|>"
TOKENIZER_NAME = "gpt2"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


@cache
def gpt2_ranks() -> dict[bytes, int]:
    """The packaged ranks, token bytes to id, their SHA-256 checked (tiktoken's reader would leave a copy in /tmp)."""
    resource = files("train") / "data" / "gpt2.tiktoken"
    content = resource.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != RANKS_SHA256:
        raise UserError(
            f"GPT-2's vocabulary {resource} has SHA-256 {digest}, not {RANKS_SHA256}: the file was changed; "
            "reinstall gpt2flash"
        )
    pairs = (line.split() for line in content.splitlines())
    return {binascii.a2b_base64(token): int(rank) for token, rank in pairs}


@cache
def gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's encoding, equal to `tiktoken.get_encoding("gpt2")`, which needs the network."""
    return tiktoken.Encoding(
        TOKENIZER_NAME,
        explicit_n_vocab=VOCABULARY_SIZE,
        pat_str=r50k_pat_str,
        mergeable_ranks=gpt2_ranks(),
        special_tokens={END_OF_TEXT_STRING: END_OF_TEXT},
    )


def merge_pair(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens whose merge made `token`: apply to its bytes every merge that is older than it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], VOCABULARY_SIZE))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    left, right = parts
    return left, right


@cache
def gpt2_vocab_and_merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """OpenAI's `encoder.json` and `vocab.bpe`, rebuilt from the ranks.

    transformers' `TikTokenConverter` lists every way to split a token as a merge; these are the 50,000 that exist.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    ranks = gpt2_ranks()
    alphabet = bytes_to_unicode()

    def printable(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    vocab = {printable(token): rank for token, rank in ranks.items()} | {END_OF_TEXT_STRING: END_OF_TEXT}
    pairs = (merge_pair(token, ranks) for token in ranks if len(token) > 1)
    return vocab, [(printable(left), printable(right)) for left, right in pairs]


def gpt2_tokenizer(model_max_length: int = 1024) -> "GPT2Tokenizer":
    """transformers' GPT-2 tokenizer, built without the network; `<|endoftext|>` also pads, as GPT-2 has no pad token.

    Its ids equal `gpt2_encoding().encode_ordinary` with two exceptions. The literal text `<|endoftext|>` becomes
    the one id 50256 (transformers' default; `split_special_tokens=True` in the call makes it ordinary text, as it
    is to `encode_ordinary`). And a lone surrogate, which tiktoken reads as U+FFFD, is a TypeError.
    """
    from transformers import GPT2Tokenizer

    vocab, merges = gpt2_vocab_and_merges()
    return GPT2Tokenizer(
        vocab=vocab,
        merges=merges,  # type: ignore[arg-type]  # annotated as strings; what it hands on to wants pairs
        pad_token=END_OF_TEXT_STRING,
        model_max_length=model_max_length,
    )
