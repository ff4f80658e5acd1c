"""Models and tokenizers by name: a size, a model folder, a Hub id, or nanoGPT's `ckpt.pt`."""

import json
import sys
from pathlib import Path
from typing import Any

import psutil
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_gpt2flash import GPT2FlashConfig, GPT2FlashForCausalLM
from train.checkpoints import nanogpt
from train.checkpoints.run_folder import model_folder
from train.data.tokenizer import VOCABULARY_SIZE, gpt2_tokenizer
from train.engines.pipeline.partition import parameter_count
from train.utils import processes
from train.utils.devices import accelerators, device_type
from train.utils.errors import UserError, first_line
from train.utils.units import in_unit

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
# Peak learning rates of new models: those of GPT-3's 125M, 350M, 760M and 1.3B (arXiv:2005.14165, table 2.1).
LEARNING_RATES = {"gpt2": 6e-4, "gpt2-medium": 3e-4, "gpt2-large": 2.5e-4, "gpt2-xl": 2e-4, "tiny": 6e-4}
TUNING_LEARNING_RATE = 5e-5  # transformers' own default
BF16_BYTES = 2
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")


def model_config(name: str, *, dropout: float, loss_chunk_size: int) -> GPT2FlashConfig:
    """`load_config` with the dropout and the loss of a run."""
    dropouts: dict[str, Any] = dict.fromkeys(nanogpt.DROPOUTS, dropout)
    return load_config(name, **dropouts, loss_chunk_size=loss_chunk_size, use_cache=True)


def load_config(name: str, *, flag: str = "--model", **overrides: Any) -> GPT2FlashConfig:
    """Configuration of the model called `name`, with `overrides` of its fields. `flag` is for error messages.

    Raises:
        UserError: if `name` is neither a size nor a model that can be read.
    """
    if name in SIZES:
        n_layer, n_head, n_embd, deviation = SIZES[name]
        return GPT2FlashConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, initializer_range=deviation, **overrides)
    if nanogpt.is_checkpoint(name):
        return nanogpt.read_config(Path(name), **overrides)
    if "/" not in name and not Path(name).exists():
        raise UserError(
            f"{flag} {name}: choose from {', '.join(SIZES)}, or name a model folder, an owner/name Hub id or "
            "nanoGPT's ckpt.pt"
        )
    if Path(name).is_dir() and not (model_folder(Path(name)) / "config.json").exists():
        raise UserError(f"{flag} {name}: has no config.json; name a step-N folder or a finished run's folder")
    try:
        return GPT2FlashConfig.from_pretrained(**pretrained_arguments(name), **overrides)
    except Exception as error:  # a foreign or damaged folder fails in many ways
        raise UserError(f"{flag} {name}: not a GPT-2 model that can be read: {first_line(error)}") from None


def load_model(
    name: str,
    config: GPT2FlashConfig,
    *,
    attn_implementation: str = "sdpa",
    dtype: str = "float32",
    flag: str = "--model",
) -> GPT2FlashForCausalLM:
    """Model called `name` with this configuration: weights drawn from the global seed for a size, otherwise loaded.

    `dtype` is that of loaded weights; "auto" keeps the dtype of the file. `flag` is for error messages.

    Raises:
        UserError: if the weights cannot be read, or if some are missing.
    """
    if name in SIZES:
        return GPT2FlashForCausalLM._from_config(config, attn_implementation=attn_implementation)
    source = pretrained_arguments(name)
    if nanogpt.is_checkpoint(name):
        source = {"pretrained_model_name_or_path": None, "state_dict": nanogpt.read_weights(Path(name), config)}
    check_shards(model_folder(Path(name)))
    try:
        loaded: Any = GPT2FlashForCausalLM.from_pretrained(
            **source,
            config=config,
            attn_implementation=attn_implementation,
            dtype=dtype,
            output_loading_info=True,
        )
    except Exception as error:  # a foreign or damaged folder fails in many ways
        raise UserError(f"{flag} {name}: its weights cannot be read: {first_line(error)}") from None
    model, report = loaded
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing:
        raise UserError(f"{flag} {name}: {len(missing)} weights are missing, {missing[0]} first; is it a GPT-2?")
    if unexpected and processes.rank() == 0:
        print(f"{flag} {name}: ignoring {len(unexpected)} tensors that GPT-2 does not have, {unexpected[0]} first",
              file=sys.stderr)  # fmt: skip
    return model


def check_finite(name: str, model: GPT2FlashForCausalLM, *, flag: str = "--model") -> None:
    """Refuse loaded weights that are not finite: nothing can be trained from them."""
    if name in SIZES:
        return
    for key, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise UserError(
                f"{flag} {name}: {key} holds NaN or infinity, so nothing can be trained from it; take another model, "
                "or an earlier checkpoint of the run that it is from"
            )


def load_for_inference(
    path: str | Path, dtype: str = "auto", *, device: str | None = None, flag: str = "--checkpoint"
) -> Any:
    """Model of a folder or of nanoGPT's `ckpt.pt` in evaluation mode, on this machine's accelerator if there is one.

    `path` is a run folder, a step folder in it, any other GPT-2 folder, or the file; `dtype` and `flag` are those of
    `load_model`.
    """
    if not nanogpt.is_checkpoint(path) and not Path(path).is_dir():
        raise UserError(f"{flag} {path}: there is no such folder")
    name = str(path)
    config = load_config(name, flag=flag)
    check_size(name, config, flag=flag)
    model: Any = load_model(name, config, dtype=dtype, flag=flag)
    return model.to(device or device_type()).eval()


def check_size(name: str, config: GPT2FlashConfig, *, flag: str = "--model", machines: int = 1) -> None:
    """Refuse a model before it is built if its weights alone, in bf16, are more than all memory there is.

    That is the RAM, swap and devices of `machines` like this one: a layout may distribute the weights over all of it.
    """
    needed = BF16_BYTES * parameter_count(config)
    here = psutil.virtual_memory().total + psutil.swap_memory().total
    there_is = machines * (here + sum(device["memory_bytes"] for device in accelerators()))
    if needed > there_is:
        raise UserError(
            f"{flag} {name}: the weights alone take {in_unit('bytes', needed)} in bf16, and RAM, swap and devices are "
            f"{in_unit('bytes', there_is)}; take fewer layers (n_layer {config.n_layer:,}), a smaller width "
            f"(n_embd {config.n_embd:,}) or vocabulary (vocab_size {config.vocab_size:,})"
        )


def check_shards(folder: Path) -> None:
    """Refuse an index that names weights outside of its folder: transformers would read them.

    For a repository of the Hub, huggingface_hub refuses such names itself.
    """
    for index in folder.glob("*.index.json"):
        try:
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            outside = [shard for shard in shards if Path(shard).name != shard]
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue  # transformers reports what is wrong with it
        if outside:
            raise UserError(f"{index}: names {outside[0]}, which is not a file beside it; there is no such model")


def load_tokenizer(name: str | Path, config: GPT2FlashConfig, *, flag: str = "--model") -> Any:
    """The model's own tokenizer, otherwise GPT-2's if the model has its vocabulary, otherwise None."""
    return own_tokenizer(str(name), config.n_positions, flag=flag) or default_tokenizer(config)


def own_tokenizer(name: str, n_positions: int, *, flag: str = "--model") -> PreTrainedTokenizerBase | None:
    """The tokenizer in a model folder or Hub repository, with a padding token; None if it has none."""
    if name in SIZES or nanogpt.is_checkpoint(name):
        return None
    folder = model_folder(Path(name))
    if folder.is_dir() and not any((folder / file).exists() for file in TOKENIZER_FILES):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(**pretrained_arguments(name), trust_remote_code=False)
    except Exception as error:  # a foreign or damaged folder fails in many ways
        raise UserError(f"{flag} {name}: its tokenizer cannot be read: {first_line(error)}") from None
    if len(tokenizer) < 2:  # what transformers returns for a repository without one
        return None
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    for template in templates:
        if Path(template).name != template:  # each is saved under its name
            raise UserError(
                f"{flag} {name}: its tokenizer has a chat template named {template!r}, which is not a file name"
            )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = min(tokenizer.model_max_length, n_positions)
    return tokenizer


def default_tokenizer(config: GPT2FlashConfig) -> PreTrainedTokenizerBase | None:
    """GPT-2's tokenizer, if the model has its vocabulary."""
    return gpt2_tokenizer(model_max_length=config.n_positions) if config.vocab_size >= VOCABULARY_SIZE else None


def default_learning_rate(name: str) -> float:
    return LEARNING_RATES.get(name, TUNING_LEARNING_RATE)


def pretrained_arguments(name: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a folder or a Hub id, which may be pinned as owner/name@revision.

    Of a run folder, they name the latest step folder.
    """
    if Path(name).exists():
        return {"pretrained_model_name_or_path": str(model_folder(Path(name)))}
    if "@" not in name:
        return {"pretrained_model_name_or_path": name}
    name, _, revision = name.partition("@")
    return {"pretrained_model_name_or_path": name, "revision": revision}
