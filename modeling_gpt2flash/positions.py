"""Position ids, and errors for positions beyond the embedding table.

Shapes: B batch, T positions of this call, S positions including cached ones, D hidden width.
"""

import torch
from torch import Tensor


def count_positions(new: int, past: int | Tensor, attention_mask: Tensor | None, device: torch.device) -> Tensor:
    """Positions of `new` tokens after `past` cached ones: (1, T), or (B, T) with a mask (B, S) that marks padding.

    Padding is not counted, so a sequence has the same positions with any padding on either side.
    """
    columns_T = past + torch.arange(new, device=device)
    if attention_mask is None or attention_mask.ndim != 2:
        return columns_T[None]
    if isinstance(past, int) and attention_mask.shape[1] < past + new:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[1]} positions, but there are {past + new}: {past} cached "
            f"and {new} new. It has to cover the cached ones too."
        )
    mask_BS = attention_mask.to(device) != 0
    positions_BS = (mask_BS.long().cumsum(-1) - 1).masked_fill(~mask_BS, 0)
    return positions_BS[:, columns_T]


def check_length(past: int | Tensor, new: int, n_positions: int) -> None:
    """Raise if cached and new tokens together exceed the model's positions."""
    if isinstance(past, Tensor):
        # A static cache counts in a tensor. Reading it would synchronize with the GPU or break a graph.
        if torch.compiler.is_compiling() or past.device.type != "cpu":
            past = 0
        past = int(past)
    if past + new > n_positions:
        parts = f" ({past} cached and {new} new)" if past else ""
        raise ValueError(
            f"The sequence is {past + new} tokens long{parts}, but this model has {n_positions} positions "
            "(n_positions): shorten it."
        )


def check_generated_length(max_length: int, prompt: int, n_positions: int) -> None:
    """Raise if a text of `max_length` tokens, of which `prompt` are given, exceeds the model's positions."""
    if max_length > n_positions:
        raise ValueError(
            f"Generating up to {max_length} tokens (the prompt has {prompt}) is more than the {n_positions} positions "
            "(n_positions) of this model: shorten the prompt or lower max_new_tokens."
        )


def check_positions(position_ids: Tensor, n_positions: int) -> None:
    """Raise if a position exceeds the last one. Only checked on a CPU, where it needs no synchronization."""
    if torch.compiler.is_compiling() or position_ids.device.type != "cpu" or position_ids.numel() == 0:
        return
    last = int(position_ids.max())
    if last >= n_positions:
        raise ValueError(
            f"position_ids go up to {last}, a sequence of {last + 1} tokens, but this model has {n_positions} "
            "positions (n_positions)."
        )


def keep_positions(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """(B, T, D) -> (B, n, D): the last `logits_to_keep` positions, the positions that it lists, or all if it is 0."""
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.ndim != 1:
            raise ValueError(
                f"logits_to_keep has {logits_to_keep.ndim} dimensions; pass a number or a list of positions."
            )
        return hidden_states[:, logits_to_keep]
    return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
