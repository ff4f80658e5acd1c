"""Packed documents: several in one row, kept apart by attention.

`position_ids` mark them: within a document they count up one by one, and at the next document they jump. transformers
detects that as well, but silently lets documents attend to each other under FlashAttention with batch sizes above one,
and under every kernel if there is a cache or a mask in addition to the positions.

Shapes: B batch, T positions of this call, S positions including cached ones, D hidden width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_causal_mask, packed_sequence_mask_function
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.import_utils import is_tracing

# What transformers calls a cache, in arguments and outputs: "past_key_values" until 5.23.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def document_bounds(starts: Tensor) -> Tensor:
    """(B, T) bool, True at each document's first token and so in the first column -> (documents + 1,) int32.

    In the flattened rows, document d is tokens bounds[d] ... bounds[d + 1] - 1. Synchronizes with the device.
    """
    begins = starts.flatten().nonzero().flatten()
    return F.pad(begins, (0, 1), value=starts.numel()).int()


def kernel_arguments(bounds: Tensor, length: int) -> dict[str, Tensor | int]:
    """Keyword arguments of transformers' flash attention; no document is longer than a row of `length` tokens."""
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": length, "max_length_k": length}


def attention_arguments(
    config: PreTrainedConfig,
    inputs_embeds: Tensor,
    position_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    past_key_values: Cache | None = None,
    bounds: Tensor | None = None,
) -> dict[str, Any]:
    """Keyword arguments of every layer's attention: the mask and, for flash kernels, the documents' bounds.

    Detecting several documents synchronizes with the device, once a call and not once a layer. It is skipped if the
    caller passes the bounds.

    Args:
        config: names the attention implementation.
        inputs_embeds: (B, T, D).
        position_ids: (B, T) or (1, T), as the caller passed them; None if each row is one document.
        attention_mask: (B, S), 0 for padding; or (B, 1, T, S), which is passed to the kernel unchanged.
        past_key_values: the cache to which this call's keys are added.
        bounds: of the documents, as the caller passed them.

    Raises:
        ValueError: for packed documents with a cache, or bounds alone if the kernel needs positions.
    """
    flash = "flash" in config._attn_implementation
    length = inputs_embeds.shape[1]
    if bounds is not None and flash:
        return {"attention_mask": None, **kernel_arguments(bounds, length)}
    if bounds is not None and position_ids is None:
        raise ValueError(
            f"{config._attn_implementation} attention separates documents by position_ids: pass them as well."
        )

    starts = None
    if position_ids is not None and length > 1 and (attention_mask is None or attention_mask.ndim == 2):
        positions = position_ids.expand(inputs_embeds.shape[0], -1)
        no_cached_keys = past_key_values is None or past_key_values.get_mask_sizes(length, 0)[0] == length
        starts = _find_document_starts(positions, attention_mask, no_cached_keys, known=bounds is not None)
    if starts is not None and flash:
        return {"attention_mask": None, **kernel_arguments(document_bounds(starts), length)}
    cached: dict[str, Any] = {CACHE: past_key_values}
    # None if the mask is purely causal and the kernel applies causality itself.
    mask = create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        **cached,
        and_mask_function=None if starts is None else packed_sequence_mask_function(starts.cumsum(-1)),
    )
    return {"attention_mask": mask}


def _find_document_starts(
    position_ids: Tensor, attention_mask: Tensor | None, no_cached_keys: bool, known: bool
) -> Tensor | None:
    """(B, T) positions -> (B, T) bool, True where a row, a document or padding starts; None if no row has several.

    `no_cached_keys`: this call's keys are the only ones. `known`: the caller knows that there are several documents.
    """
    begins = position_ids.diff(dim=-1) != 1
    padding_borders = torch.zeros_like(begins)
    if attention_mask is not None:
        tokens = attention_mask[:, -position_ids.shape[1] :].to(position_ids.device) != 0
        begins &= tokens[:, 1:] & tokens[:, :-1]
        padding_borders = tokens[:, 1:] != tokens[:, :-1]
    tracing = is_tracing(position_ids)  # a graph cannot branch on data, and the general case is right for one document
    if not (known or tracing) and not bool(begins.any()):
        return None
    if not no_cached_keys and tracing:
        return None
    if not no_cached_keys:
        raise ValueError(
            "position_ids jump within a row, as where one document ends and the next begins, but a cache has other "
            "tokens or room for them: put each document in a row of its own, or use no cache."
        )
    return F.pad(begins | padding_borders, (1, 0), value=True)
