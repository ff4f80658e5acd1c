"""The model a run trains: a named size freshly initialised, or the weights of a folder, a Hub id or nanoGPT's file."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_gpt2flash import GPT2FlashConfig, GPT2FlashForCausalLM
from train.checkpoints import nanogpt
from train.data.token_file import VOCABULARY_SIZE, gpt2_tokenizer
from train.utils.errors import UserError, first_line

# Layers, heads, width, standard deviation of the initial weights; 1024 positions. The first four are OpenAI's (Radford
# et al. 2019, table 2). `tiny` is for a CPU; its weights start larger, 0.02 x sqrt(768 / 128), for so narrow a model's
# logits to be as large as gpt2's.
SIZES = {
    "gpt2": (12, 12, 768, 0.02),  # 124M parameters
    "gpt2-medium": (24, 16, 1024, 0.02),  # 355M
    "gpt2-large": (36, 20, 1280, 0.02),  # 774M
    "gpt2-xl": (48, 25, 1600, 0.02),  # 1.56B
    "tiny": (4, 4, 128, 0.05),  # 7.4M, of which 6.4M are the vocabulary's
}
FRESH_LEARNING_RATE = 6e-4  # GPT-3's for 124M parameters (arXiv:2005.14165, table 2.1)
TUNING_LEARNING_RATE = 5e-5  # transformers' own default
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")


def model_config(name: str, *, dropout: float, loss_chunk_size: int) -> GPT2FlashConfig:
    """Configuration of a named size, or of the weights that `name` names, with the run's dropout and loss.

    Raises:
        UserError: when `name` is neither a size nor a readable model.
    """
    run: dict[str, Any] = {
        "embd_pdrop": dropout,
        "attn_pdrop": dropout,
        "resid_pdrop": dropout,
        "loss_chunk_size": loss_chunk_size,
        "use_cache": True,
    }
    if name in SIZES:
        n_layer, n_head, n_embd, deviation = SIZES[name]
        return GPT2FlashConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, initializer_range=deviation, **run)
    if nanogpt.is_named(name):
        return nanogpt.read_config(Path(name), **run)
    if "/" not in name and not Path(name).exists():
        raise UserError(
            f"--model {name}: choose from {', '.join(SIZES)}, or name a model folder, an owner/name Hub id or "
            "nanoGPT's ckpt.pt"
        )
    try:
        return GPT2FlashConfig.from_pretrained(**place(name), **run)
    except Exception as error:  # a foreign or damaged folder fails in many ways
        raise UserError(f"--model {name}: not a GPT-2 model that can be read: {first_line(error)}") from None


def build_model(name: str, config: GPT2FlashConfig, attn_implementation: str) -> GPT2FlashForCausalLM:
    """The model in fp32, its weights drawn from the global seed or read from what `name` names."""
    if name in SIZES:
        return GPT2FlashForCausalLM._from_config(config, attn_implementation=attn_implementation)
    source: dict[str, Any] = place(name)
    if nanogpt.is_named(name):
        source = {"pretrained_model_name_or_path": None, "state_dict": nanogpt.read_weights(Path(name), config)}
    check_shards(Path(name))
    try:
        loaded: Any = GPT2FlashForCausalLM.from_pretrained(
            **source,
            config=config,
            attn_implementation=attn_implementation,
            dtype="float32",
            output_loading_info=True,
        )
    except Exception as error:  # as above
        raise UserError(f"--model {name}: its weights cannot be read: {first_line(error)}") from None
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(f"--model {name}: {len(missing)} weights are missing, {missing[0]} first; is it a GPT-2?")
    return model


def check_shards(folder: Path) -> None:
    """Refuse an index that names weights outside of its folder: transformers would go and read them.

    In a repository of the Hub its own client refuses such names.

    Raises:
        UserError: naming the index and the file.
    """
    for index in folder.glob("*.index.json"):
        try:
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            outside = [shard for shard in shards if Path(shard).name != shard]
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue  # transformers says what is wrong with it
        if outside:
            raise UserError(f"{index}: names {outside[0]}, which is not a file beside it; there is no such model")


def own_tokenizer(name: str, n_positions: int) -> PreTrainedTokenizerBase | None:
    """The tokenizer that a folder or Hub id brings with it, able to pad; None where there is none.

    Raises:
        UserError: when it cannot be read.
    """
    if name in SIZES or nanogpt.is_named(name):
        return None
    folder = Path(name)
    if folder.is_dir() and not any((folder / file).exists() for file in TOKENIZER_FILES):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(**place(name), trust_remote_code=False)
    except Exception as error:  # as above
        raise UserError(f"{name}: its tokenizer cannot be read: {first_line(error)}") from None
    if len(tokenizer) < 2:  # what transformers makes up for a repository without one
        return None
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    for template in templates:
        if Path(template).name != template:  # each is saved under its name
            raise UserError(
                f"{name}: its tokenizer has a chat template named {template!r}, which is no name of a file"
            )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = min(tokenizer.model_max_length, n_positions)
    return tokenizer


def gpt2s_tokenizer(config: GPT2FlashConfig) -> PreTrainedTokenizerBase | None:
    """GPT-2's tokenizer, where the model has its vocabulary."""
    return gpt2_tokenizer(model_max_length=config.n_positions) if config.vocab_size >= VOCABULARY_SIZE else None


def default_learning_rate(name: str) -> float:
    return FRESH_LEARNING_RATE if name in SIZES else TUNING_LEARNING_RATE


def place(name: str) -> dict[str, Any]:
    """Where transformers finds `name`, a folder or a Hub id, which may be pinned as owner/name@revision."""
    if Path(name).exists() or "@" not in name:
        return {"pretrained_model_name_or_path": name}
    name, _, revision = name.partition("@")
    return {"pretrained_model_name_or_path": name, "revision": revision}
