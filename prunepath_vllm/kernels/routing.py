"""Router logits and expert selection (eq. 7-9, or LTE's threshold), made for one token to a few dozen.

Selection needs no sort: expert e is active when the probabilities ranked at or before it sum to less than tau, and
every expert's sum is found by comparing it with all others.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunepath_vllm.kernels.common import default_pdl, launch_options, wait_for_previous
from prunepath_vllm.tau import DENSE_TAU


@dataclass(frozen=True)
class RouterConfig:
    """Tile choices of the two routing kernels."""

    block_e: int = 4
    """Experts a router program takes at one token; from two tokens on it takes 16 (a tensor-core tile)."""
    split_k: int = 1
    """Programs that share an expert's row, each a slice of the hidden size."""
    num_warps: int = 4
    select_block_e: int = 4
    select_num_warps: int = 4


@dataclass(frozen=True)
class Routing:
    """What the feed-forward kernels need to know about a batch.

    Attributes:
        gates: float32 [T, E]; what each expert's output is multiplied by, 0 where it is not active (eq. 10).
        flags: int32 [E]; 1 where some token uses the expert.
    """

    gates: Tensor
    flags: Tensor


@triton.jit
def router_logits_kernel_gemv(
    x, weight, logits, flags, E: tl.constexpr, H: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token: partial logits [SPLIT_K, 1, E]. Also clears the flags that selection sets."""
    pid_e, pid_k = tl.program_id(0), tl.program_id(1)
    experts = pid_e * BLOCK_E + tl.arange(0, BLOCK_E)
    k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    # Weights do not depend on the previous kernel: their loads are in flight while it finishes.
    w = tl.load(
        weight + experts[:, None].to(tl.int64) * H + k[None, :],
        mask=(experts[:, None] < E) & (k[None, :] < H), other=0.0, eviction_policy="evict_first",
    )  # fmt: skip
    wait_for_previous(PDL)
    xv = tl.load(x + k, mask=k < H, other=0.0).to(tl.float32)
    g = tl.sum(w.to(tl.float32) * xv[None, :], axis=1)
    tl.store(logits + pid_k * E + experts, g, mask=experts < E)
    tl.store(flags + experts, tl.zeros_like(experts), mask=(experts < E) & (pid_k == 0))


@triton.jit
def router_logits_kernel_dot(
    x, weight, logits, flags, num_tokens, E: tl.constexpr, H: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, SLICE_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Several tokens: partial logits [splits, T, E], each over a slice of SLICE_K hidden units."""
    pid_e, pid_k = tl.program_id(0), tl.program_id(1)
    experts = pid_e * BLOCK_E + tl.arange(0, BLOCK_E)
    tokens = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    wait_for_previous(PDL)
    acc = tl.zeros([BLOCK_E, BLOCK_T], dtype=tl.float32)
    for k0 in range(0, SLICE_K, BLOCK_K):
        k = pid_k * SLICE_K + k0 + tl.arange(0, BLOCK_K)
        w = tl.load(
            weight + experts[:, None].to(tl.int64) * H + k[None, :],
            mask=(experts[:, None] < E) & (k[None, :] < H), other=0.0,
        )  # fmt: skip
        xv = tl.load(
            x + tokens[None, :].to(tl.int64) * H + k[:, None],
            mask=(tokens[None, :] < num_tokens) & (k[:, None] < H), other=0.0,
        )  # fmt: skip
        acc = tl.dot(w, xv.to(w.dtype), acc, input_precision="ieee")
    out = logits + (pid_k * num_tokens + tokens[None, :]).to(tl.int64) * E + experts[:, None]
    tl.store(out, acc, mask=(experts[:, None] < E) & (tokens[None, :] < num_tokens))
    tl.store(flags + experts, tl.zeros_like(experts), mask=(experts < E) & (pid_k == 0))


@triton.jit
def summed_logits(logits, bias, token, num_tokens, e, mask, E: tl.constexpr, SPLIT_K: tl.constexpr, BIAS: tl.constexpr):
    """Logits of one token: the slices' partial sums added in order, plus the bias; -inf where masked."""
    g = tl.load(logits + token * E + e, mask=mask, other=-float("inf"))
    for s in tl.static_range(1, SPLIT_K):
        g += tl.load(logits + (s * num_tokens + token) * E + e, mask=mask, other=0.0)
    if BIAS:
        g += tl.load(bias + e, mask=mask, other=0.0).to(tl.float32)
    return g


@triton.jit
def select_kernel(
    logits, bias, tau, gates, flags, active_counts, num_tokens, threshold, E: tl.constexpr, DENSE_TAU: tl.constexpr,
    SPLIT_K: tl.constexpr, BIAS: tl.constexpr, COUNT: tl.constexpr, THRESHOLD: tl.constexpr, GATE: tl.constexpr,
    BLOCK_ALL: tl.constexpr, BLOCK_E: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Decide BLOCK_E experts of one token: gates [T, E] float32, flags [E] int32."""
    token, pid_e = tl.program_id(0).to(tl.int64), tl.program_id(1)
    mine = pid_e * BLOCK_E + tl.arange(0, BLOCK_E)
    wait_for_previous(PDL)
    t = tl.zeros([BLOCK_E], dtype=tl.float32) + tl.load(tau + token)
    g_mine = summed_logits(logits, bias, token, num_tokens, mine, mine < E, E, SPLIT_K, BIAS)
    if THRESHOLD:
        active = tl.sigmoid(g_mine) > threshold
    else:
        every = tl.arange(0, BLOCK_ALL)
        g = summed_logits(logits, bias, token, num_tokens, every, every < E, E, SPLIT_K, BIAS)
        p = tl.exp(g - tl.max(g, axis=0))
        p = p / tl.sum(p, axis=0)
        # Taken from p itself, not recomputed: equal probabilities must compare equal.
        p_mine = tl.sum(tl.where(mine[:, None] == every[None, :], p[None, :], 0.0), axis=1)
        # Ranked at or before: larger, or equal with an index not above.
        before = (p[None, :] > p_mine[:, None]) | ((p[None, :] == p_mine[:, None]) & (every[None, :] <= mine[:, None]))
        mass = tl.sum(tl.where(before, p[None, :], 0.0), axis=1)
        top = tl.sum(before.to(tl.int32), axis=1) == 1
        active = (mass < t) | top
    active = (active | (t >= DENSE_TAU)) & (mine < E)
    if GATE:
        gate = tl.where(active, tl.sigmoid(g_mine), 0.0)
    else:
        gate = tl.where(active, 1.0, 0.0)
    tl.store(gates + token * E + mine, gate, mask=mine < E)
    tl.atomic_or(flags + mine, 1, mask=active, sem="relaxed")
    if COUNT:
        tl.atomic_add(active_counts + token, tl.sum(active.to(tl.int32), axis=0), sem="relaxed")


def route(
    x: Tensor,
    tau: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    *,
    selection: str,
    threshold: float | None,
    gate: str,
    config: RouterConfig,
    active_counts: Tensor | None = None,
    pdl: int | None = None,
) -> Routing:
    """Router logits and selection: two kernels, no host synchronisation.

    Args:
        x: [T, H] contiguous.
        tau: float32 [T].
        router_weight: [E, H] contiguous.
        router_bias: [E] or None.
        selection: "cumulative_mass" or "threshold".
        threshold: LTE's delta, with "threshold".
        gate: "sigmoid" or "none".
        active_counts: int32 [T] or None; the number of active experts of each token is added to it.
        pdl: mode of programmatic dependent launch (``common.wait_for_previous``); None for the device's default.
    """
    num_tokens, hidden = x.shape
    num_experts = router_weight.shape[0]
    pdl = default_pdl(x.device) if pdl is None else pdl
    logits = torch.empty(config.split_k, num_tokens, num_experts, dtype=torch.float32, device=x.device)
    flags = torch.empty(num_experts, dtype=torch.int32, device=x.device)
    gates = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=x.device)
    if num_tokens == 1:
        router_logits_kernel_gemv[(triton.cdiv(num_experts, config.block_e), config.split_k)](
            x, router_weight, logits, flags, num_experts, hidden, BLOCK_E=config.block_e,
            BLOCK_K=triton.next_power_of_2(triton.cdiv(hidden, config.split_k)), SPLIT_K=config.split_k, PDL=pdl,
            num_warps=config.num_warps, **launch_options(pdl),
        )  # fmt: skip
    else:
        block_e, block_k = 16, 128
        slice_k = triton.cdiv(triton.cdiv(hidden, block_k), config.split_k) * block_k
        block_t = min(64, max(16, triton.next_power_of_2(num_tokens)))
        grid = (triton.cdiv(num_experts, block_e), config.split_k, triton.cdiv(num_tokens, block_t))
        router_logits_kernel_dot[grid](
            x, router_weight, logits, flags, num_tokens, num_experts, hidden,
            BLOCK_T=block_t, BLOCK_E=block_e, BLOCK_K=block_k, SLICE_K=slice_k,
            PDL=pdl, num_warps=config.num_warps, num_stages=4, **launch_options(pdl),
        )  # fmt: skip
    select_kernel[(num_tokens, triton.cdiv(num_experts, config.select_block_e))](
        logits, router_bias, tau, gates, flags, active_counts, num_tokens, threshold or 0.0, num_experts, DENSE_TAU,
        SPLIT_K=config.split_k, BIAS=router_bias is not None, COUNT=active_counts is not None,
        THRESHOLD=selection == "threshold", GATE=gate == "sigmoid", BLOCK_ALL=triton.next_power_of_2(num_experts),
        BLOCK_E=config.select_block_e, PDL=pdl, num_warps=config.select_num_warps, **launch_options(pdl),
    )  # fmt: skip
    return Routing(gates, flags)
