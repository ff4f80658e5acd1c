"""Several documents in one row: where they begin, and what attention is told so that none sees another.

Positions mark them: they count up one by one in a document and jump where the next one begins. transformers looks for
that too, but without a word lets documents see each other under FlashAttention in batches above one, and under every
kernel where there is a cache or a mask beside the positions.

Shapes: B batch, T positions of this call, S positions including cached ones, D hidden width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_causal_mask, packed_sequence_mask_function
from transformers.utils.import_utils import is_tracing


def document_bounds(starts: Tensor) -> Tensor:
    """(B, T) bool, True where a document begins, and so in each first column -> (documents + 1,) int32.

    Of the rows laid end to end, document d is tokens bounds[d] ... bounds[d + 1] - 1. Waits for the device.
    """
    begins = starts.flatten().nonzero().flatten()
    return F.pad(begins, (0, 1), value=starts.numel()).int()


def kernel_arguments(bounds: Tensor, length: int) -> dict[str, Tensor | int]:
    """What transformers' flash attention asks for, under its names; no document is longer than a row of `length`."""
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": length, "max_length_k": length}


def attention_arguments(
    config: PreTrainedConfig,
    inputs_embeds: Tensor,
    position_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    past_key_values: Cache | None = None,
    bounds: Tensor | None = None,
) -> dict[str, Any]:
    """What every layer's attention is told: the mask, and to flash kernels the documents' bounds.

    Asking whether there are several documents waits for the device, once a call and not once a layer. A caller who
    gives bounds is not asked.

    Args:
        config: names the attention implementation.
        inputs_embeds: (B, T, D).
        position_ids: (B, T) or (1, T), as the caller gave them; None: a row is one document.
        attention_mask: (B, S), 0 where there is padding; or (B, 1, T, S), ready for the kernel and taken as it is.
        past_key_values: the cache that this call's keys go into.
        bounds: of the documents, as the caller gave them.

    Raises:
        ValueError: for documents behind a cache, or bounds alone where the kernel needs positions.
    """
    flash = "flash" in config._attn_implementation
    length = inputs_embeds.shape[1]
    if bounds is not None and flash:
        return {"attention_mask": None, **kernel_arguments(bounds, length)}
    if bounds is not None and position_ids is None:
        raise ValueError(f"{config._attn_implementation} attention knows documents by position_ids: give them too.")

    starts = None
    if position_ids is not None and length > 1 and (attention_mask is None or attention_mask.ndim == 2):
        positions = position_ids.expand(inputs_embeds.shape[0], -1)
        no_others = past_key_values is None or past_key_values.get_mask_sizes(length, 0)[0] == length
        starts = _starts_of_several(positions, attention_mask, no_others, known=bounds is not None)
    if starts is not None and flash:
        return {"attention_mask": None, **kernel_arguments(document_bounds(starts), length)}
    # None where plain causality is all there is to say and the kernel knows it by itself.
    mask = create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        and_mask_function=None if starts is None else packed_sequence_mask_function(starts.cumsum(-1)),
    )
    return {"attention_mask": mask}


def _starts_of_several(
    position_ids: Tensor, attention_mask: Tensor | None, no_others: bool, known: bool
) -> Tensor | None:
    """(B, T) positions -> (B, T) bool, where a row, a document or padding begins; None if no row holds several.

    `no_others`: there are no keys but this call's. `known`: that there are several.
    """
    begins = position_ids.diff(dim=-1) != 1
    padding_borders = torch.zeros_like(begins)
    if attention_mask is not None:
        tokens = attention_mask[:, -position_ids.shape[1] :].to(position_ids.device) != 0
        begins &= tokens[:, 1:] & tokens[:, :-1]
        padding_borders = tokens[:, 1:] != tokens[:, :-1]
    tracing = is_tracing(position_ids)  # a graph cannot ask, and what holds for several documents holds for one
    if not (known or tracing) and not bool(begins.any()):
        return None
    if not no_others and tracing:
        return None
    if not no_others:
        raise ValueError(
            "position_ids jump within a row, as where one document ends and the next begins, but a cache has other "
            "tokens or room for them: give each document a row of its own, or no cache."
        )
    return F.pad(begins | padding_borders, (1, 0), value=True)


__all__ = ["attention_arguments", "document_bounds", "kernel_arguments"]
