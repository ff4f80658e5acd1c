"""GPT2Flash model configuration: GPT-2's fields under GPT-2's names, and `loss_chunk_size`."""

from os import PathLike
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

# The classes in a model folder's own copy of this package (`trust_remote_code`).
AUTO_MAP = {
    "AutoConfig": "configuration_gpt2flash.GPT2FlashConfig",
    "AutoModel": "modeling_gpt2flash.GPT2FlashModel",
    "AutoModelForCausalLM": "modeling_gpt2flash.GPT2FlashForCausalLM",
}
# Fields of GPT-2's configuration that change the result and that this model does not implement.
UNSUPPORTED_FIELDS = {
    "add_cross_attention": "this model has no cross attention",
    "reorder_and_upcast_attn": "the attention kernels choose their own order of operations and precision",
}


def refuse_unsupported(fields: dict[str, Any]) -> None:
    """Raise if a configuration sets a field that this model would silently ignore."""
    for name, reason in UNSUPPORTED_FIELDS.items():
        if fields.get(name):
            raise ValueError(
                f"{name}={fields[name]!r} is not supported: {reason}. Use transformers' own GPT-2 for this "
                f"checkpoint, or set {name} to false if it was trained without."
            )


@strict
class GPT2FlashConfig(PreTrainedConfig):
    """Configuration of a `GPT2FlashModel` or `GPT2FlashForCausalLM`.

    The fields of `GPT2Config` have the same meaning and defaults, and a configuration of stock GPT-2 can be loaded.
    The fields of heads that this package does not have (`summary_*`) are kept but unused, and the fields in
    `UNSUPPORTED_FIELDS` are refused if they are set.

    Args:
        loss_chunk_size: rows of hidden states that are projected onto the vocabulary at a time to compute the
            training loss. It limits memory and changes the result only by rounding; 0 computes and returns all logits.
    """

    model_type = "gpt2flash"
    _auto_class: ClassVar[str] = "AutoConfig"  # makes save_pretrained copy the code; also in the models
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float | int = 0.1
    embd_pdrop: float | int = 0.1
    attn_pdrop: float | int = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True
    loss_chunk_size: int = 512

    def __post_init__(self, **kwargs: Any) -> None:
        # Not in a `validate_…` method: the strict decorator wraps its exceptions in one that is no ValueError.
        refuse_unsupported(kwargs)
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1.")
        if self.n_inner is not None and self.n_inner < 1:
            raise ValueError(f"n_inner is {self.n_inner}, but must be at least 1, or None for 4 * n_embd.")
        if self.n_embd % self.n_head != 0:
            raise ValueError(
                f"n_embd={self.n_embd} cannot be split over n_head={self.n_head} heads: it must be a multiple of it."
            )
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be a probability between 0 and 1.")
        if self.loss_chunk_size < 0:
            raise ValueError(
                f"loss_chunk_size is {self.loss_chunk_size}, but must be a number of rows, or 0 for the plain loss."
            )
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory: str | PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the configuration with all classes in `auto_map`; transformers would add only the saved model's."""
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)


__all__ = ["GPT2FlashConfig"]
