"""The whole routed feed-forward layer of one token in one launch: nothing waits for a kernel to start.

Programs stay on the GPU from the router to the sum of their partial outputs and meet at a barrier in device memory
twice. That needs all of them resident at once: one per multiprocessor.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunepath_vllm.kernels.common import activate, default_pdl, launch_options, num_sms, wait_for_previous, write_share
from prunepath_vllm.kernels.routing import choose
from prunepath_vllm.kernels.weights import Weights
from prunepath_vllm.tau import DENSE_TAU


@dataclass(frozen=True)
class WholeConfig:
    """Tile choices of the one-launch kernel."""

    rows: int = 2
    """Neurons per step; each is a row of gate, of up and of down."""
    num_warps: int = 16
    num_stages: int = 3


# A loop in PTX: behind one of its own (scf.while), Triton 3.7 no longer vectorises or pipelines loads.
WAIT = tl.constexpr("""{
    .reg .pred %below;
again:
    ld.acquire.gpu.global.s32 $0, [$1];
    setp.lt.s32 %below, $0, $2;
    @%below bra again;
}""")


@triton.jit
def meet(arrived, target, PROGRAMS: tl.constexpr):
    """Wait until `arrived` has counted to `target`; what any program wrote before is visible after."""
    tl.debug_barrier()
    tl.atomic_add(arrived, 1, sem="release", scope="gpu")
    if PROGRAMS > 1:
        tl.inline_asm_elementwise(WAIT, "=&r,l,r", [arrived, target], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


@triton.jit
def whole_decode_kernel(
    x, tau, router, router_bias, w_in, b_in, w_out_t, b_out, y, logits, gates, experts, partial, arrived,
    active_counts, threshold, E: tl.constexpr, D: tl.constexpr, H: tl.constexpr, DENSE_TAU: tl.constexpr,
    GLU: tl.constexpr, ROUTER_BIAS: tl.constexpr, BIAS: tl.constexpr, BIAS_OUT: tl.constexpr, COUNT: tl.constexpr,
    ACTIVATION: tl.constexpr, THRESHOLD: tl.constexpr, GATE: tl.constexpr, PROGRAMS: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    ROUTER_ROWS: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token: y [H]. `arrived` is 0 before and after."""
    pid = tl.program_id(0)
    cols = tl.arange(0, BLOCK_H)
    in_h = (cols < H)[None, :]
    wait_for_previous(PDL)
    t = tl.load(tau)
    xv = tl.load(x + cols, mask=cols < H, other=0.0).to(tl.float32)[None, :]

    # Router: every PROGRAMS-th expert. Unread where every expert is taken and no gate needs its logit.
    last = E
    if not GATE:
        last = tl.where(t < DENSE_TAU, E, 0)
    for first in range(pid, last, PROGRAMS * ROUTER_ROWS):
        row = first + PROGRAMS * tl.arange(0, ROUTER_ROWS)
        w = tl.load(router + row[:, None].to(tl.int64) * H + cols[None, :], mask=(row < E)[:, None] & in_h, other=0.0)
        tl.store(logits + row, tl.sum(w.to(tl.float32) * xv, axis=1), mask=row < E)
    meet(arrived, PROGRAMS, PROGRAMS)

    # Selection: the same in every program, each keeping its share of the list.
    e = tl.arange(0, BLOCK_E)
    g = tl.load(logits + e, mask=e < last, other=0.0, cache_modifier=".cg")
    if ROUTER_BIAS:
        g += tl.load(router_bias + e, mask=e < E, other=0.0).to(tl.float32)
    g = tl.where(e < E, g, -float("inf"))
    active = choose(g, e, t, threshold, E, DENSE_TAU, THRESHOLD, 3)
    STEPS: tl.constexpr = D // R
    begin, end, count, mine = write_share(active.to(tl.int32), e, experts, pid, PROGRAMS, STEPS)
    if GATE:
        tl.store(gates + e, tl.sigmoid(g), mask=mine)
    if COUNT:
        tl.store(active_counts, tl.load(active_counts) + count, mask=pid == 0)
    tl.debug_barrier()  # list and gates are read back by other threads of this program

    # Read again: held since the router, it would tie this loop's register layout to that one's.
    xv = tl.load(x + cols, mask=cols < H, other=0.0).to(tl.float32)[None, :]
    acc = tl.zeros([BLOCK_H], dtype=tl.float32)
    for unit in tl.range(begin, end, num_stages=STAGES):
        expert = tl.load(experts + unit // STEPS)
        rows = expert.to(tl.int64) * D + (unit % STEPS) * R + tl.arange(0, R)
        tile = rows[:, None] * H + cols[None, :]
        w1 = tl.load(w_in + tile, mask=in_h, other=0.0, eviction_policy="evict_first")
        if GLU:
            w2 = tl.load(w_in + E * D * H + tile, mask=in_h, other=0.0, eviction_policy="evict_first")
        wd = tl.load(w_out_t + tile, mask=in_h, other=0.0, eviction_policy="evict_first")
        h = tl.sum(w1.to(tl.float32) * xv, axis=1)
        if BIAS:
            h += tl.load(b_in + rows).to(tl.float32)
        h = activate(h, ACTIVATION)
        if GLU:
            u = tl.sum(w2.to(tl.float32) * xv, axis=1)
            if BIAS:
                u += tl.load(b_in + E * D + rows).to(tl.float32)
            h *= u
        if GATE:
            h *= tl.load(gates + expert)
        acc += tl.sum(h[:, None] * wd.to(tl.float32), axis=0)
    tl.store(partial + pid * H + cols, acc, mask=cols < H)
    meet(arrived, 2 * PROGRAMS, PROGRAMS)

    # Sum of the partial outputs, in a fixed order.
    c = pid * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.arange(0, BLOCK_P)
    values = tl.load(
        partial + part[:, None] * H + c[None, :],
        mask=(part < PROGRAMS)[:, None] & (c < H)[None, :], other=0.0, cache_modifier=".cg",
    )  # fmt: skip
    total = tl.sum(values, axis=0)
    if BIAS_OUT:
        total += tl.load(b_out + c, mask=c < H, other=0.0).to(tl.float32)
    tl.store(y + c, total, mask=c < H)
    # The last to leave clears the counter for the next launch.
    left = tl.atomic_add(arrived, 1, sem="relaxed", scope="gpu") + 1
    tl.store(arrived, 0, mask=left == 3 * PROGRAMS)


def whole_ffn(
    x: Tensor,
    tau: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    weights: Weights,
    *,
    selection: str,
    threshold: float | None,
    gate: str,
    config: WholeConfig,
    active_counts: Tensor | None = None,
    pdl: int | None = None,
) -> Tensor:
    """The routed layer of one token, x [1, H]: arguments and result as for ``ffn.routed_ffn``.

    Launches on one device must not overlap each other (one stream): they share a counter.
    """
    hidden = x.shape[1]
    num_experts = router_weight.shape[0]
    expert_size = weights.w_out_t.shape[0] // num_experts
    pdl = default_pdl(x.device) if pdl is None else pdl
    programs = num_sms(x.device)
    scratch = torch.empty(2 * num_experts + programs * hidden, dtype=torch.float32, device=x.device)
    logits, gates, partial = scratch.split([num_experts, num_experts, programs * hidden])
    experts = torch.empty(num_experts, dtype=torch.int32, device=x.device)
    y = torch.empty_like(x)
    whole_decode_kernel[(programs,)](
        x, tau, router_weight, router_bias, weights.w_in, weights.b_in, weights.w_out_t, weights.b_out, y, logits,
        gates, experts, partial, arrival_counter(x.device), active_counts, threshold or 0.0,
        num_experts, expert_size, hidden, DENSE_TAU, GLU=weights.glu, ROUTER_BIAS=router_bias is not None,
        BIAS=weights.b_in is not None, BIAS_OUT=weights.b_out is not None, COUNT=active_counts is not None,
        ACTIVATION=weights.activation, THRESHOLD=selection == "threshold", GATE=gate == "sigmoid", PROGRAMS=programs,
        BLOCK_E=triton.next_power_of_2(num_experts), BLOCK_H=triton.next_power_of_2(hidden),
        BLOCK_P=triton.next_power_of_2(programs),
        BLOCK_C=max(16, triton.next_power_of_2(triton.cdiv(hidden, programs))),
        ROUTER_ROWS=min(8, triton.next_power_of_2(triton.cdiv(num_experts, programs))),
        R=min(config.rows, expert_size), STAGES=config.num_stages, PDL=pdl, num_warps=config.num_warps,
        **launch_options(pdl),
    )  # fmt: skip
    return y


@functools.cache
def arrival_counter(device: torch.device) -> Tensor:
    """The counter that a device's launches share; made on the first call, which must not be under graph capture."""
    return torch.zeros(1, dtype=torch.int32, device=device)
