"""Where tokens stand: their positions, and the refusal of those that the model has no embedding for.

Shapes: B batch, T positions of this call, S positions including cached ones, D hidden width.
"""

import torch
from torch import Tensor


def count_positions(new: int, past: int | Tensor, attention_mask: Tensor | None, device: torch.device) -> Tensor:
    """Positions of the `new` tokens behind `past` cached ones: (1, T), or (B, T) where a (B, S) mask marks padding.

    Padding takes no position, so a sequence has the same positions whatever it is padded with, and wherever.
    """
    columns_T = past + torch.arange(new, device=device)
    if attention_mask is None or attention_mask.ndim != 2:
        return columns_T[None]
    if isinstance(past, int) and attention_mask.shape[1] < past + new:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[1]} positions, but there are {past + new}: {past} cached "
            f"and {new} new. It has to mark the cached ones too."
        )
    mask_BS = attention_mask.to(device) != 0
    positions_BS = (mask_BS.long().cumsum(-1) - 1).masked_fill(~mask_BS, 0)
    return positions_BS[:, columns_T]


def check_length(past: int | Tensor, new: int, n_positions: int) -> None:
    """Raise if cached and new tokens are more than there are positions for."""
    if isinstance(past, Tensor):
        # A static cache counts in a tensor. Reading it would wait for the GPU or break a graph.
        if torch.compiler.is_compiling() or past.device.type != "cpu":
            past = 0
        past = int(past)
    if past + new > n_positions:
        parts = f" ({past} cached and {new} new)" if past else ""
        raise ValueError(
            f"The sequence is {past + new} tokens long{parts}, but this model has {n_positions} positions "
            "(n_positions): shorten it."
        )


def check_positions(position_ids: Tensor, n_positions: int) -> None:
    """Raise if a position is beyond the last one, where looking costs nothing."""
    if torch.compiler.is_compiling() or position_ids.device.type != "cpu" or position_ids.numel() == 0:
        return
    last = int(position_ids.max())
    if last >= n_positions:
        raise ValueError(
            f"position_ids go up to {last}, a sequence of {last + 1} tokens, but this model has {n_positions} "
            "positions (n_positions)."
        )


def keep_positions(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """(B, T, D) -> (B, n, D): the last `logits_to_keep` positions, the ones that it lists, or for 0 all."""
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.ndim != 1:
            raise ValueError(
                f"logits_to_keep has {logits_to_keep.ndim} dimensions; give a number or a list of positions."
            )
        return hidden_states[:, logits_to_keep]
    return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
