"""Router logits and expert selection (eq. 7-9, or LTE's threshold)."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunepath_vllm.kernels.common import (
    count_reads,
    default_pdl,
    flagged,
    launch_options,
    shared_memory,
    stages_that_fit,
    wait_for_previous,
)
from prunepath_vllm.kernels.layer import RouterWeights, RoutingRule
from prunepath_vllm.tau import DENSE_TAU

LIBRARY_TOKENS = 64
"""Above this many tokens the logits are left to cuBLAS, with float32 output."""

THREAD_EXPERTS = 64
"""Probabilities that a thread of the radix selection holds at most. For 128 it has no registers: one warp for 4,096
experts spills 396 bytes a thread, for 8,192 3,728."""


@dataclass(frozen=True)
class RouterConfig:
    """Choices of the two routing kernels.

    Selection is by "radix", one program a token, or "pairwise", each program comparing its few experts of a token with
    all others: O(E^2) in all, but faster for the first few tokens, which cannot fill the GPU.
    """

    block_e: int = 4
    """Experts a router program takes at one token; at several it takes ``tile_e``."""
    split_k: int = 1
    """Programs that share an expert's row, each a slice of the hidden size."""
    num_warps: int = 4
    select_warps: int = 8
    """Radix: at least; thousands of experts take more (``radix_warps``)."""
    select_bits: int = 3
    """Radix: bits of the cut found per pass over the probabilities, 1, 2 or 3: fewer passes, or less work in all."""
    select: str = "radix"
    select_block_e: int = 4
    """Pairwise: experts a program decides."""
    tile_e: int = 16
    """A power of two from 16, the least that tensor cores take. Every program reads all tokens, so that more experts a
    program are fewer reads."""


@dataclass(frozen=True)
class Routing:
    """What the feed-forward kernels need to know about a batch.

    E are those whose weights are there.

    Attributes:
        gates: float32 [T, E]; what each expert's output is multiplied by, 0 where it is not active (eq. 10).
        flags: int32 [E]; 1 where some token uses the expert. None where it was not asked for.
        experts: int32 [E + 1] from :func:`list_experts`, or None where the feed-forward kernels make the list.
    """

    gates: Tensor
    flags: Tensor | None
    experts: Tensor | None = None


@triton.jit
def router_logits_kernel_gemv(
    x, weight, logits, flags, tau, E: tl.constexpr, H: tl.constexpr, DENSE_TAU: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, NEEDED: tl.constexpr, FLAGS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One token: partial logits [SPLIT_K, 1, E]. Also clears the flags that selection sets.

    NEEDED: logits matter at any tau. Otherwise a tau that takes every expert leaves the weights unread.
    """
    pid_e, pid_k = tl.program_id(0), tl.program_id(1)
    experts = pid_e * BLOCK_E + tl.arange(0, BLOCK_E)
    k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    if not NEEDED:
        wait_for_previous(PDL)
        k = tl.where(tl.load(tau) < DENSE_TAU, k, H)
    # Weights do not depend on the previous kernel: their loads are in flight while it finishes.
    w = tl.load(
        weight + experts[:, None].to(tl.int64) * H + k[None, :],
        mask=(experts[:, None] < E) & (k[None, :] < H), other=0.0, eviction_policy="evict_first",
    )  # fmt: skip
    if NEEDED:
        wait_for_previous(PDL)
    xv = tl.load(x + k, mask=k < H, other=0.0).to(tl.float32)
    g = tl.sum(w.to(tl.float32) * xv[None, :], axis=1)
    tl.store(logits + pid_k * E + experts, g, mask=experts < E)
    if FLAGS:
        tl.store(flags + experts, tl.zeros_like(experts), mask=(experts < E) & (pid_k == 0))


@triton.jit(do_not_specialize=["num_tokens"])
def router_logits_kernel_dot(
    x, weight, logits, flags, tau, num_tokens, E: tl.constexpr, H: tl.constexpr, DENSE_TAU: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, SLICE_K: tl.constexpr, NEEDED: tl.constexpr,
    FLAGS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Several tokens: partial logits [splits, T, E], each over a slice of SLICE_K hidden units."""
    pid_e, pid_k = tl.program_id(0), tl.program_id(1)
    experts = pid_e * BLOCK_E + tl.arange(0, BLOCK_E)
    tokens = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    wait_for_previous(PDL)
    end = SLICE_K
    if not NEEDED:
        least = tl.min(tl.load(tau + tokens, mask=tokens < num_tokens, other=DENSE_TAU), axis=0)
        end = tl.where(least < DENSE_TAU, SLICE_K, 0)
    acc = tl.zeros([BLOCK_E, BLOCK_T], dtype=tl.float32)
    for k0 in range(0, end, BLOCK_K):
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
    if FLAGS:
        tl.store(flags + experts, tl.zeros_like(experts), mask=(experts < E) & (pid_k == 0))


@triton.jit
def ranked_prefix(p, t, BITS: tl.constexpr):
    """True where the probabilities ranked at or before this one sum to less than t, and for the first of all (eq. 8-9).

    No sort: non-negative floats order like their bits, so the largest key at or above which the mass still reaches t is
    found BITS bits at a time. Larger keys are in; of the keys that equal it, the first few by index may be.
    """
    key = p.to(tl.int32, bitcast=True)
    cut = 0
    for i in range(30 // BITS):  # p <= 1, whose bits are below 2^30
        shift = 30 - BITS * (i + 1)
        if BITS == 1:
            mass = tl.sum(tl.where(key >= cut + (1 << shift), p, 0.0), axis=0)
            cut += (mass >= t).to(tl.int32) << shift
        else:
            candidates = cut + (tl.arange(0, 1 << BITS) << shift)
            mass = tl.sum(tl.where(key[None, :] >= candidates[:, None], p[None, :], 0.0), axis=1)
            # The first candidate is the cut so far; where even all the mass is below t, it stays at 0.
            cut += tl.maximum(tl.sum((mass >= t).to(tl.int32), axis=0) - 1, 0) << shift
    above = key > cut
    mass = tl.sum(tl.where(above, p, 0.0), axis=0)
    tie = key == cut
    rank = tl.cumsum(tie.to(tl.int32), axis=0)
    value = tl.max(tl.where(tie, p, 0.0), axis=0)
    # With no mass above, the cut is the largest probability, and its first expert is the top one.
    mass = tl.where(rank == 1, tl.where(mass > 0.0, mass + value, 0.0), mass + rank * value)
    return above | (tie & (mass < t))


@triton.jit
def summed_logits(logits, bias, token, num_tokens, e, E: tl.constexpr, SPLIT_K: tl.constexpr, BIAS: tl.constexpr):
    """Logits of one token's experts e: the slices' partial sums, always in this order, and the bias; -inf beyond E."""
    g = tl.load(logits + token * E + e, mask=e < E, other=-float("inf"))
    for s in tl.static_range(1, SPLIT_K):
        g += tl.load(logits + (s * num_tokens + token) * E + e, mask=e < E, other=0.0)
    if BIAS:
        g += tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)
    return g


@triton.jit
def store_gates(gates, flags, token, g, e, active, KEPT: tl.constexpr, GATE: tl.constexpr, FLAGS: tl.constexpr):
    """One token's gates of the experts e with logits g, and the flags of those it uses; none from KEPT on."""
    if GATE:
        gate = tl.where(active, tl.sigmoid(g), 0.0)
    else:
        gate = tl.where(active, 1.0, 0.0)
    tl.store(gates + token * KEPT + e, gate, mask=e < KEPT)
    if FLAGS:
        tl.atomic_or(flags + e, 1, mask=active, sem="relaxed")


@triton.jit(do_not_specialize=["num_tokens"])
def select_radix_kernel(
    logits, bias, tau, gates, flags, active_counts, num_tokens, threshold, E: tl.constexpr, KEPT: tl.constexpr,
    DENSE_TAU: tl.constexpr, SPLIT_K: tl.constexpr, BIAS: tl.constexpr, COUNT: tl.constexpr, THRESHOLD: tl.constexpr,
    GATE: tl.constexpr, FLAGS: tl.constexpr, BLOCK_ALL: tl.constexpr, BITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token: gates [T, KEPT] float32, flags [E] int32."""
    token = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_ALL)
    wait_for_previous(PDL)
    t = tl.load(tau + token)
    g = summed_logits(logits, bias, token, num_tokens, e, E, SPLIT_K, BIAS)
    active = e < tl.where(t > 0.0, E, 0)  # none at a padding row
    if t < DENSE_TAU:
        if THRESHOLD:
            active &= tl.sigmoid(g) > threshold
        else:
            p = tl.exp(g - tl.max(g, axis=0))
            active &= ranked_prefix(p / tl.sum(p, axis=0), t, BITS)
    active &= e < KEPT  # after the selection, which sees all
    store_gates(gates, flags, token, g, e, active, KEPT, GATE, FLAGS)
    if COUNT:
        tl.store(active_counts + token, tl.load(active_counts + token) + tl.sum(active.to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["num_tokens"])
def select_pairwise_kernel(
    logits, bias, tau, gates, flags, active_counts, num_tokens, threshold, E: tl.constexpr, KEPT: tl.constexpr,
    DENSE_TAU: tl.constexpr, SPLIT_K: tl.constexpr, BIAS: tl.constexpr, COUNT: tl.constexpr, THRESHOLD: tl.constexpr,
    GATE: tl.constexpr, FLAGS: tl.constexpr, BLOCK_ALL: tl.constexpr, BLOCK_E: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_E experts of one token: gates [T, KEPT] float32, flags [E] int32."""
    token = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    wait_for_previous(PDL)
    t = tl.load(tau + token)
    g = summed_logits(logits, bias, token, num_tokens, e, E, SPLIT_K, BIAS)
    active = e < tl.where(t > 0.0, E, 0)  # none at a padding row
    if t < DENSE_TAU:
        if THRESHOLD:
            active &= tl.sigmoid(g) > threshold
        else:
            every = tl.arange(0, BLOCK_ALL)
            other = summed_logits(logits, bias, token, num_tokens, every, E, SPLIT_K, BIAS)
            largest = tl.max(other, axis=0)
            mass = tl.exp(other - largest)  # times the softmax's denominator
            # Ranked before: larger, or equal with a lower index. Logits rank as their probabilities do.
            before = (other[None, :] > g[:, None]) | ((other[None, :] == g[:, None]) & (every[None, :] < e[:, None]))
            ahead = tl.sum(tl.where(before, mass[None, :], 0.0), axis=1)
            # Only before the top expert, whose own mass is 1, there is none.
            active &= (ahead + tl.exp(g - largest) < t * tl.sum(mass, axis=0)) | (ahead == 0.0)
    active &= e < KEPT  # after the selection, which sees all
    store_gates(gates, flags, token, g, e, active, KEPT, GATE, FLAGS)
    if COUNT:
        tl.atomic_add(active_counts + token, tl.sum(active.to(tl.int32), axis=0), sem="relaxed")


@triton.jit
def list_experts_kernel(flags, experts, experts_read, E: tl.constexpr, RESIDENT: tl.constexpr, BLOCK_E: tl.constexpr):
    """One program: experts [E + 1] = the flagged ones in ascending order, their number in the last element."""
    index, flag, position, count = flagged(flags, E, BLOCK_E)
    tl.store(experts + position, index, mask=flag != 0)
    tl.store(experts + E, count)
    count_reads(experts_read, index, flag, count, tl.program_id(0) == 0, E, RESIDENT)


def route(
    x: Tensor,
    tau: Tensor,
    router: RouterWeights,
    rule: RoutingRule,
    *,
    config: RouterConfig,
    active_counts: Tensor | None = None,
    want_flags: bool = True,
    every: bool = False,
    kept: int | None = None,
    pdl: int | None = None,
) -> Routing:
    """Router logits and selection: two kernels, no host synchronisation.

    A low-rank router's first product is the library's, and its second factor is read in float32 as the r values are.

    Args:
        x: what the router reads, [T, H] contiguous.
        tau: float32 [T]; 0 at padding rows.
        router: the router's weights.
        rule: the routing rule.
        config: choices of the two kernels.
        active_counts: int32 [T] or None; the number of active experts of each token is added to it.
        want_flags: whether to fill ``Routing.flags``; up to LIBRARY_TOKENS tokens.
        every: whether tokens get every expert whatever their tau, so that there is nothing to select.
        kept: K, the first experts, which alone get gates and flags; None for all.
        pdl: mode of programmatic dependent launch (``common.wait_for_previous``); None for the device's default.
    """
    pdl = default_pdl(x.device) if pdl is None else pdl
    if router.down is not None:
        # No early start: the logits kernel reads weights before it waits, and a weight that is widened here (in the
        # engine it is float32 already) is written by the kernel before.
        x, router = library_logits(x, router.down), RouterWeights(router.weight.float(), router.bias)
        pdl = 0
    num_tokens, hidden = x.shape
    num_experts = router.weight.shape[0]
    flags = torch.empty(num_experts, dtype=torch.int32, device=x.device) if want_flags else None
    needed = rule.gate == "sigmoid"
    split_k = config.split_k
    if num_tokens == 1:
        logits = torch.empty(split_k, 1, num_experts, dtype=torch.float32, device=x.device)
        router_logits_kernel_gemv[(triton.cdiv(num_experts, config.block_e), split_k)](
            x, router.weight, logits, flags, tau, num_experts, hidden, DENSE_TAU, BLOCK_E=config.block_e,
            BLOCK_K=triton.next_power_of_2(triton.cdiv(hidden, split_k)), SPLIT_K=split_k, NEEDED=needed,
            FLAGS=want_flags, PDL=pdl, num_warps=config.num_warps, **launch_options(pdl),
        )  # fmt: skip
    elif num_tokens <= LIBRARY_TOKENS:
        logits = torch.empty(split_k, num_tokens, num_experts, dtype=torch.float32, device=x.device)
        # float32 weights, as a low-rank router's, take twice the room.
        tile_e = config.tile_e if router.weight.dtype.itemsize == 2 else 16
        block_k = 128
        slice_k = triton.cdiv(triton.cdiv(hidden, block_k), split_k) * block_k
        block_t = max(16, triton.next_power_of_2(num_tokens))
        tile_bytes = (tile_e * router.weight.dtype.itemsize + block_t * x.dtype.itemsize) * block_k
        router_logits_kernel_dot[(triton.cdiv(num_experts, tile_e), split_k, triton.cdiv(num_tokens, block_t))](
            x, router.weight, logits, flags, tau, num_tokens, num_experts, hidden, DENSE_TAU,
            BLOCK_T=block_t, BLOCK_E=tile_e, BLOCK_K=block_k, SLICE_K=slice_k, NEEDED=needed, FLAGS=want_flags,
            PDL=pdl, num_warps=config.num_warps, num_stages=stages_that_fit(4, tile_bytes, shared_memory(x.device)),
            **launch_options(pdl),
        )  # fmt: skip
    else:
        assert flags is None
        logits, split_k = library_logits(x, router.weight), 1
    kept = num_experts if kept is None else kept
    gates = torch.empty(num_tokens, kept, dtype=torch.float32, device=x.device)
    arguments = (logits, router.bias, tau, gates, flags, active_counts, num_tokens, rule.threshold or 0.0)
    options: dict[str, Any] = dict(
        E=num_experts, KEPT=kept, DENSE_TAU=0.0 if every else DENSE_TAU, SPLIT_K=split_k, BIAS=router.bias is not None,
        COUNT=active_counts is not None, THRESHOLD=rule.selection == "threshold", GATE=needed, FLAGS=want_flags,
        BLOCK_ALL=triton.next_power_of_2(num_experts), PDL=pdl, **launch_options(pdl),
    )  # fmt: skip
    if config.select == "pairwise":
        grid = (num_tokens, triton.cdiv(num_experts, config.select_block_e))
        select_pairwise_kernel[grid](
            *arguments, **options, BLOCK_E=config.select_block_e, num_warps=config.select_warps
        )
    else:
        assert config.select == "radix", f"unknown selection {config.select!r}; expected pairwise or radix"
        warps = radix_warps(num_experts, config.select_warps)
        select_radix_kernel[(num_tokens,)](*arguments, **options, BITS=config.select_bits, num_warps=warps)
    return Routing(gates, None if flags is None else flags[:kept])


def list_experts(routing: Routing, experts_read: Tensor | None = None, resident: int | None = None) -> Routing:
    """The same with the list of the experts that some token uses, for feed-forward kernels that need not make it.

    Args:
        routing: from :func:`route`, with flags.
        experts_read: int32 or int64, or None; what is listed is counted as ``layer.Counters.read`` says.
        resident: of the layer.
    """
    assert routing.flags is not None
    num_experts = len(routing.flags)
    experts = torch.empty(num_experts + 1, dtype=torch.int32, device=routing.flags.device)
    block = triton.next_power_of_2(num_experts)
    resident = num_experts if resident is None else resident
    list_experts_kernel[(1,)](routing.flags, experts, experts_read, num_experts, resident, BLOCK_E=block, num_warps=8)
    return replace(routing, experts=experts)


def select_mask(logits: Tensor, tau: Tensor) -> Tensor:
    """Eq. 8-9 for many tokens at once, as training needs it: a warp a token, up to 2,048 experts.

    Args:
        logits: float32 [..., E] contiguous, on a GPU.
        tau: float32 [...].

    Returns:
        bool [..., E].
    """
    num_experts = logits.shape[-1]
    num_tokens = logits.numel() // num_experts
    gates = torch.empty_like(logits)
    select_radix_kernel[(num_tokens,)](
        logits, None, tau.contiguous(), gates, None, None, num_tokens, 0.0, E=num_experts, KEPT=num_experts,
        DENSE_TAU=DENSE_TAU, SPLIT_K=1, BIAS=False, COUNT=False, THRESHOLD=False, GATE=False, FLAGS=False,
        BLOCK_ALL=triton.next_power_of_2(num_experts), BITS=1, PDL=0, num_warps=radix_warps(num_experts, 1),
    )  # fmt: skip
    return gates != 0


def radix_warps(num_experts: int, warps: int) -> int:
    """The warps of the radix selection: as many as a configuration has, or what so many experts need."""
    return max(warps, triton.next_power_of_2(num_experts) // (32 * THREAD_EXPERTS))


def library_logits(x: Tensor, router_weight: Tensor) -> Tensor:
    """Float32 [T, E]: half-precision operands, but neither rounded sums nor rounded logits."""
    if x.device.type != "cuda" or router_weight.dtype == torch.float32:
        return x.float() @ router_weight.float().t()
    return torch.mm(x.to(router_weight.dtype), router_weight.t(), out_dtype=torch.float32)
