"""One launch that gives every token of a step its request's tau; see ``tau.expand_taus`` for the plain form."""

import triton
import triton.language as tl
from torch import Tensor

from prunepath_vllm.kernels.tau import PADDING_TAU
from prunepath_vllm.tau import DENSE_TAU


@triton.jit(do_not_specialize=["num_reqs", "num_tokens"])
def expand_taus_kernel(
    slot_taus, slots, query_start_loc, positions, prompt_lens, prefill_tau, out, num_reqs, num_tokens,
    PREFILL: tl.constexpr, DENSE_POSITIONS: tl.constexpr, DENSE_TAU: tl.constexpr, PADDING_TAU: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens: out [T] float32."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    request = tl.zeros([BLOCK_T], dtype=tl.int32)  # requests that end at or before the token
    for r0 in range(0, num_reqs, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        end = tl.load(query_start_loc + 1 + r, mask=r < num_reqs, other=2147483647)
        request += tl.sum((end[None, :] <= token[:, None]).to(tl.int32), axis=1)
    real = (request < num_reqs) & (token < num_tokens)
    slot = tl.load(slots + request, mask=real, other=0)
    tau = tl.load(slot_taus + slot, mask=real, other=PADDING_TAU)
    if PREFILL or DENSE_POSITIONS > 0:
        position = tl.load(positions + token, mask=real, other=9223372036854775807)  # padding: beyond any prompt
    if PREFILL:
        tau = tl.where(position < tl.load(prompt_lens + request, mask=real, other=0), prefill_tau, tau)
    if DENSE_POSITIONS > 0:
        tau = tl.where(position < DENSE_POSITIONS, DENSE_TAU, tau)
    tl.store(out + token, tau, mask=token < num_tokens)


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
    """Write every token's tau; arguments as in ``tau.expand_taus``."""
    num_tokens, block = out.shape[0], 64
    expand_taus_kernel[(triton.cdiv(num_tokens, block),)](
        slot_taus, slots, query_start_loc, positions, prompt_lens, prefill_tau, out, slots.shape[0], num_tokens,
        prompt_lens is not None, dense_positions, DENSE_TAU, PADDING_TAU, BLOCK_T=block, BLOCK_R=64, num_warps=4,
    )  # fmt: skip
