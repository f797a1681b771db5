"""From one tau per request to one per token, on the device, without a host synchronisation."""

import torch
from torch import Tensor

from prunepath_vllm.tau import DENSE_TAU

PADDING_TAU = 0.0
"""Padding rows select no expert: what they hold must not move the order in which other rows are summed."""


def expand_taus(
    slot_taus: Tensor,
    slots: Tensor,
    query_start_loc: Tensor,
    positions: Tensor,
    out: Tensor,
    *,
    dense_positions: int,
    prompt_lens: Tensor | None = None,
    prefill_tau: float = DENSE_TAU,
) -> None:
    """Write every token's tau. Plain PyTorch: for CPUs, and what ``expand.expand_taus`` is checked against.

    Args:
        slot_taus: float32 [num_slots], by request slot.
        slots: int32 [num_reqs], the slot of each of the step's requests.
        query_start_loc: int32 [num_reqs + 1]; tokens of request r are [query_start_loc[r], query_start_loc[r + 1]).
        positions: int64 [>= tokens], sequence position of every token.
        out: float32 [padded tokens], written in full: tokens past the last request get PADDING_TAU.
        dense_positions: tokens at sequence positions below it get a tau that selects every expert.
        prompt_lens: int64 [num_reqs]; tokens at sequence positions below their request's get `prefill_tau`. None: no
            token does.
        prefill_tau: see `prompt_lens`.
    """
    tokens = torch.arange(out.shape[0], device=out.device, dtype=query_start_loc.dtype)
    request = torch.searchsorted(query_start_loc[1:].contiguous(), tokens, right=True)
    padded = torch.cat([slot_taus[slots], slot_taus.new_tensor([PADDING_TAU])])
    torch.index_select(padded, 0, request, out=out)
    if prompt_lens is not None:
        prompt_len = torch.nn.functional.pad(prompt_lens, (0, 1))[request]  # padding rows have no prompt
        out.masked_fill_(positions[: out.shape[0]] < prompt_len, prefill_tau)
    if dense_positions:
        dense = (positions[: out.shape[0]] < dense_positions) & (request < slots.shape[0])
        out.masked_fill_(dense, DENSE_TAU)
