"""The feed-forward layer with every expert computed: two dense products around one elementwise kernel.

The path for tau >= 1 and for batches whose tokens together use most experts; gates make it exact for any mix.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from prunepath_vllm.kernels.common import ACTIVATIONS, activate, launch_options, wait_for_previous
from prunepath_vllm.kernels.routing import RouterConfig, select_options, select_token
from prunepath_vllm.kernels.weights import Weights

ROUTING = ("first", "last", "serial")
"""When a dense step routes: on a second stream, launched before or after the first linear; or on the same stream."""


@dataclass(frozen=True)
class DenseConfig:
    """How a dense step routes."""

    routing: str = "first"
    """One of ROUTING."""
    fused: bool = False
    """Whether the gated activation selects, every program anew for its token, rather than a kernel before it."""


@triton.jit
def store_neurons(
    pre, gates, out, token, block, F: tl.constexpr, E: tl.constexpr, GLU: tl.constexpr, GATED: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK of a token's neurons: gate of the neuron's expert * act(pre[:, :F]) (* pre[:, F:] for a GLU)."""
    i = block * BLOCK + tl.arange(0, BLOCK)
    mask = i < F
    row = pre + token * (2 * F if GLU else F)
    h = activate(tl.load(row + i, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    if GLU:
        h *= tl.load(row + F + i, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.load(gates + token * E + i // (F // E), mask=mask, other=0.0)
        h = tl.where(gate != 0.0, h * gate, 0.0)
    tl.store(out + token * F + i, h, mask=mask)


@triton.jit
def gated_activation_kernel(
    pre, gates, out, experts_read, F: tl.constexpr, E: tl.constexpr, GLU: tl.constexpr, GATED: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [T, F]: see store_neurons."""
    wait_for_previous(PDL)
    store_neurons(pre, gates, out, tl.program_id(0).to(tl.int64), tl.program_id(1), F, E, GLU, GATED, ACTIVATION, BLOCK)
    if experts_read is not None:
        tl.atomic_add(experts_read, E, mask=(tl.program_id(0) == 0) & (tl.program_id(1) == 0), sem="relaxed")


@triton.jit(do_not_specialize=["num_tokens"])
def selected_activation_kernel(
    pre, logits, bias, tau, gates, out, active_counts, experts_read, num_tokens, threshold, F: tl.constexpr,
    E: tl.constexpr, GLU: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, DENSE_TAU: tl.constexpr,
    SPLIT_K: tl.constexpr, BIAS: tl.constexpr, COUNT: tl.constexpr, THRESHOLD: tl.constexpr, GATE: tl.constexpr,
    BLOCK_ALL: tl.constexpr, BITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [T, F] as of gated_activation_kernel, from logits. Every program of a token writes the same gates [T, E]."""
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    wait_for_previous(PDL)
    count = select_token(
        logits, bias, tau, gates, None, token, num_tokens, threshold, E, DENSE_TAU, SPLIT_K, BIAS, THRESHOLD, GATE,
        False, BLOCK_ALL, BITS,
    )  # fmt: skip
    if COUNT:
        tl.atomic_add(active_counts + token, count, mask=block == 0, sem="relaxed")
    tl.debug_barrier()  # the gates are read back by other threads of this program
    store_neurons(pre, gates, out, token, block, F, E, GLU, True, ACTIVATION, BLOCK)
    if experts_read is not None:
        tl.atomic_add(experts_read, E, mask=(tl.program_id(0) == 0) & (block == 0), sem="relaxed")


def gated_activation(
    pre: Tensor, weights: Weights, gates: Tensor | None = None, experts_read: Tensor | None = None, pdl: int = 0
) -> Tensor:
    """Neurons [T, F] of the first linear's output `pre` [T, F or 2 F], multiplied by their experts' gates [T, E].

    experts_read: int32 [1] or None, with gates; E is added to it.
    """
    num_tokens, num_neurons = pre.shape[0], weights.w_out_t.shape[0]
    neurons = torch.empty(num_tokens, num_neurons, dtype=pre.dtype, device=pre.device)
    block = 1024
    gated_activation_kernel[(num_tokens, triton.cdiv(num_neurons, block))](
        pre, gates, neurons, experts_read, num_neurons, 1 if gates is None else gates.shape[1], GLU=weights.glu,
        GATED=gates is not None, ACTIVATION=ACTIVATIONS[weights.activation], BLOCK=block, PDL=pdl, num_warps=4,
        **launch_options(pdl),
    )  # fmt: skip
    return neurons


def selected_activation(
    pre: Tensor,
    weights: Weights,
    logits: Tensor,
    router_bias: Tensor | None,
    tau: Tensor,
    *,
    selection: str,
    threshold: float | None,
    gate: str,
    config: RouterConfig,
    active_counts: Tensor | None = None,
    experts_read: Tensor | None = None,
    pdl: int = 0,
) -> Tensor:
    """:func:`gated_activation` with the gates of float32 `logits` [slices, T, E] (``routing.partial_logits``)."""
    slices, num_tokens, num_experts = logits.shape
    num_neurons = weights.w_out_t.shape[0]
    neurons = torch.empty(num_tokens, num_neurons, dtype=pre.dtype, device=pre.device)
    gates = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=pre.device)
    block = min(4096, triton.next_power_of_2(num_neurons))  # few programs: each repeats the selection
    options = select_options(
        router_bias, num_experts, slices=slices, selection=selection, gate=gate, counting=active_counts is not None,
        pdl=pdl,
    )  # fmt: skip
    selected_activation_kernel[(num_tokens, triton.cdiv(num_neurons, block))](
        pre, logits, router_bias, tau, gates, neurons, active_counts, experts_read, num_tokens, threshold or 0.0,
        num_neurons, GLU=weights.glu, ACTIVATION=ACTIVATIONS[weights.activation], BLOCK=block,
        BITS=config.select_bits, num_warps=config.select_warps, **options,
    )  # fmt: skip
    return neurons


def dense_ffn(x: Tensor, weights: Weights) -> Tensor:
    """Every expert's neurons with gates of 1: x [T, H] to [T, H] in x's dtype."""
    return second_linear(gated_activation(first_linear(x, weights), weights), weights)


def routed_dense_ffn(
    x: Tensor,
    weights: Weights,
    route: Callable[[], Tensor],
    neurons: Callable[[Tensor, Tensor], Tensor],
    config: DenseConfig,
) -> Tensor:
    """Eq. 10 with the sum over all experts.

    Args:
        x: [T, H].
        weights: the layer's weights.
        route: finds gates or logits; on a second stream, unless the config wants it on this one.
        neurons: the first linear's output and what `route` found to gated neurons [T, F].
        config: when to route.

    Returns:
        [T, H] in x's dtype.
    """
    assert config.routing in ROUTING, f"unknown routing {config.routing!r}; expected one of {', '.join(ROUTING)}"
    if config.routing == "serial" or x.device.type != "cuda":
        pre = first_linear(x, weights)
        return second_linear(neurons(pre, route()), weights)
    main, side = torch.cuda.current_stream(x.device), side_stream(x.device)
    # The side stream's memory needs no record_stream: its next user waits for all that the main stream does here.
    side.wait_stream(main)
    if config.routing == "last":
        pre = first_linear(x, weights)
    with torch.cuda.stream(side):
        found = route()
    if config.routing == "first":
        pre = first_linear(x, weights)
    main.wait_stream(side)
    return second_linear(neurons(pre, found), weights)


def first_linear(x: Tensor, weights: Weights) -> Tensor:
    """x @ w_in.T + b_in."""
    return F.linear(x, weights.w_in, weights.b_in)


def second_linear(neurons: Tensor, weights: Weights) -> Tensor:
    """neurons [T, F] @ w_out_t + b_out."""
    if weights.b_out is None:
        return neurons @ weights.w_out_t
    return torch.addmm(weights.b_out, neurons, weights.w_out_t)


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """A device's second stream; of high priority, or its programs would wait for those of a large product."""
    return torch.cuda.Stream(device, priority=-1)
