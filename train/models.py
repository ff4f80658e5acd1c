"""The model a run trains: a named size freshly initialised, or the weights of a folder or Hub id."""

from pathlib import Path
from typing import Any

from modeling_gpt2flash import GPT2FlashConfig, GPT2FlashForCausalLM
from train.errors import UserError

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


def model_config(name: str, *, dropout: float, loss_chunk_size: int) -> GPT2FlashConfig:
    """Configuration of a named size, or of the folder or Hub id `name`, with the run's dropout and loss.

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
    if "/" not in name and not Path(name).exists():
        raise UserError(
            f"--model {name}: choose from {', '.join(SIZES)}, or name a model folder or an owner/name Hub id"
        )
    try:
        return GPT2FlashConfig.from_pretrained(name, **run)
    except Exception as error:  # a foreign or damaged folder fails in many ways
        raise UserError(f"--model {name}: not a GPT-2 model that can be read: {_first_line(error)}") from None


def build_model(name: str, config: GPT2FlashConfig, attn_implementation: str) -> GPT2FlashForCausalLM:
    """The model in fp32, its weights drawn from the global seed or read from the folder or Hub id `name`."""
    if name in SIZES:
        return GPT2FlashForCausalLM._from_config(config, attn_implementation=attn_implementation)
    try:
        loaded: Any = GPT2FlashForCausalLM.from_pretrained(
            name,
            config=config,
            attn_implementation=attn_implementation,
            dtype="float32",
            output_loading_info=True,
        )
    except Exception as error:  # as above
        raise UserError(f"--model {name}: its weights cannot be read: {_first_line(error)}") from None
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(f"--model {name}: {len(missing)} weights are missing, {missing[0]} first; is it a GPT-2?")
    return model


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
