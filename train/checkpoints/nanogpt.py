"""nanoGPT's `ckpt.pt` (https://github.com/karpathy/nanoGPT), read and written.

A dictionary: `model_args` (sizes), `model` (GPT-2's names, the matrices of the blocks transposed since they are
`nn.Linear`s), `optimizer` (`AdamW.state_dict()`), `iter_num`, `best_val_loss` and `config` (the run's settings).
nanoGPT computes GELU exactly, where GPT-2 approximates it by tanh, and its models may have no biases.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from modeling_gpt2flash import GPT2FlashConfig, GPT2FlashForCausalLM
from train.data.tokenizer import END_OF_TEXT
from train.optim.parameter_groups import ADAMW_MOMENTS, is_hidden_matrix
from train.utils.errors import UserError, first_line
from train.utils.files import atomic_write

# nanoGPT's names of the sizes in `model_args`, and GPT-2's.
SIZES = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
}
NO_LOSS = 1e9  # nanoGPT's `best_val_loss` before the first validation
DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")  # GPT-2's fields of nanoGPT's one `dropout`
COMPILED = "_orig_mod."  # prefix of the names in a compiled model
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
# Fields that nanoGPT's model has no setting for, and the values that it can represent.
FIXED = {
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
    "activation_function": ("gelu", *TANH_GELU),
}


def is_checkpoint(name: str | Path) -> bool:
    """Whether `name` is that of a nanoGPT checkpoint rather than of a folder or a Hub id."""
    return Path(name).suffix == ".pt"


def read_config(path: Path, **fields: Any) -> GPT2FlashConfig:
    """The configuration of a `ckpt.pt`, with `fields` besides its sizes; a `UserError` if nanoGPT did not write it."""
    found = _read(path)["model_args"]
    sizes = {ours: found.get(theirs) for theirs, ours in SIZES.items()}
    wrong = {name: size for name, size in sizes.items() if type(size) is not int}
    if wrong:
        raise UserError(f"{path}: is not a checkpoint of nanoGPT: its model_args are {wrong}")
    end = END_OF_TEXT if found["vocab_size"] > END_OF_TEXT else None
    known = {**sizes, "activation_function": "gelu", "bos_token_id": end, "eos_token_id": end}
    try:
        return GPT2FlashConfig(**{**dict.fromkeys(DROPOUTS, 0.0), **known, **fields})
    except ValueError as error:
        raise UserError(f"{path}: is not a checkpoint of nanoGPT: {error}") from None


def read_weights(path: Path, config: GPT2FlashConfig) -> dict[str, torch.Tensor]:
    """The fp32 weights of a `ckpt.pt` under GPT-2's names and in its layout; missing biases are 0.

    Raises:
        UserError: if a tensor is missing or its shape does not match `config`.
    """
    content = _read(path)
    stored = {name.removeprefix(COMPILED): tensor for name, tensor in content["model"].items()}
    head, embedding = stored.get("lm_head.weight"), stored.get("transformer.wte.weight")
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise UserError(f"{path}: its lm_head is not tied to its embedding; there is no such GPT-2")
    with torch.device("meta"):
        shell = GPT2FlashForCausalLM(config)
    weights = {}
    for name, parameter in shell.named_parameters():
        if name in stored:
            if stored[name].shape != _transposed(name, parameter).shape:
                raise UserError(f"{path}: {name} is {list(stored[name].shape)}, which does not fit its model_args")
            weights[name] = _transposed(name, stored[name].float()).contiguous()
        elif name.endswith(".bias") and not content["model_args"].get("bias", True):
            weights[name] = torch.zeros(parameter.shape)
        else:
            raise UserError(f"{path}: {name} is missing; was it written by nanoGPT?")
    return weights


def _transposed(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in GPT-2's layout converted to nanoGPT's, or in nanoGPT's converted to GPT-2's."""
    return tensor.t() if is_hidden_matrix(name) else tensor


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        # Executes nothing in the file, and reads no tensor before it is used.
        content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # foreign and damaged files fail in many ways
        raise UserError(
            f"{path}: is not a checkpoint of nanoGPT that can be read without running its code: {first_line(error)}"
        ) from None
    if not isinstance(content, dict) or not all(isinstance(content.get(key), dict) for key in ("model", "model_args")):
        raise UserError(f"{path}: is not a checkpoint of nanoGPT: it has no model and model_args")
    return content


def check_writable(config: GPT2FlashConfig) -> None:
    """Refuse a model that nanoGPT's code would compute differently."""
    fields = {**FIXED, "n_inner": (None, 4 * config.n_embd)}
    for name, known in fields.items():
        if getattr(config, name) not in known:
            raise UserError(
                f"--format nanogpt: the model has {name}={getattr(config, name)!r}, nanoGPT only {known[0]!r}"
            )


def write(
    path: Path,
    config: GPT2FlashConfig,
    weights: Mapping[str, torch.Tensor],
    moments: Mapping[str, torch.Tensor] | None,
    *,
    step: int,
    best_val_loss: float,
    settings: Mapping[str, Any],
) -> None:
    """Write a `ckpt.pt` after `step` optimizer steps; `settings` are the flags of the run.

    `weights` has every parameter by name, in GPT-2's layout and in the order of the model. `moments` are AdamW's, as
    `exp_avg.NAME` and `exp_avg_sq.NAME`; None for an optimizer without state.
    """
    stored = {name: _transposed(name, tensor).contiguous() for name, tensor in weights.items()}
    sizes = {theirs: getattr(config, ours) for theirs, ours in SIZES.items()}
    args = {**sizes, "bias": True, "dropout": float(config.resid_pdrop)}
    content = {
        "model": {**stored, "lm_head.weight": stored["transformer.wte.weight"]},
        "optimizer": _optimizer_state(stored, moments, step, settings),
        "model_args": args,
        "iter_num": step,
        "best_val_loss": best_val_loss,
        "config": {**args, **_nanogpt_settings(settings)},
    }
    with atomic_write(path) as temporary:
        torch.save(content, temporary)


def _optimizer_state(
    stored: Mapping[str, torch.Tensor],
    moments: Mapping[str, torch.Tensor] | None,
    step: int,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """AdamW's state dict in nanoGPT's two groups: matrices, which have weight decay, and everything else."""
    parameters = {name: torch.nn.Parameter(tensor.float(), requires_grad=False) for name, tensor in stored.items()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters.values() if p.dim() >= 2], "weight_decay": settings["weight_decay"]},
            {"params": [p for p in parameters.values() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=settings["learning_rate"],
        betas=(settings["adam_beta1"], settings["adam_beta2"]),
    )
    if moments is not None:
        for name, parameter in parameters.items():
            state = {key: _transposed(name, moments[f"{key}.{name}"]).contiguous() for key in ADAMW_MOMENTS}
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), **state}
    return optimizer.state_dict()


def _nanogpt_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that nanoGPT has as well, under its names; None for a setting that was not given."""
    return {
        "batch_size": settings.get("train_micro_batch_size_per_gpu"),
        "gradient_accumulation_steps": settings.get("gradient_accumulation_steps"),
        "learning_rate": settings["learning_rate"],
        "min_lr": settings["learning_rate"] * settings["min_learning_rate_ratio"],
        "warmup_iters": settings.get("warmup_steps"),
        "weight_decay": settings["weight_decay"],
        "beta1": settings["adam_beta1"],
        "beta2": settings["adam_beta2"],
        "grad_clip": settings.get("max_grad_norm"),
    }
