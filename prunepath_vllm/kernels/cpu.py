"""The routed feed-forward layer on a CPU: the native kernel where it was built and pays, or else PyTorch.

PyTorch gathers the touched experts where they are few, and masks a dense product where they are not.

Shapes: T tokens, H hidden size, E experts, D neurons per expert, F = E * D; weights in the layout of ``Weights``.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prunepath_vllm.kernels import native
from prunepath_vllm.kernels.layer import NO_COUNTERS, Counters, LayerSpec, RouterWeights, Weights
from prunepath_vllm.kernels.reference import gate_weights, router_logits, scale_neurons, select_experts
from prunepath_vllm.tau import DENSE_TAU

GATHER_BELOW = 0.35
"""Gather where the step touches less than this share of the experts. Measured on two cores, bf16, SmolLM2's shape: a
dense layer takes as long as gathering 0.4 of it at one token, more at sixteen."""

NATIVE_TOKENS = 16
"""Tokens up to which a step takes the native kernel whatever its taus. Beyond, where the processor multiplies the
dtype fast (:func:`has_fast_product`), :func:`step_tokens` decides."""

DENSE_NATIVE_TOKENS = 64
"""Tokens up to which a step of every expert takes it, too, where it has AVX-512: a library's product first brings
weights in rows into an order of its own. Measured on one Zen 5 core, bfloat16, SmolLM2's and Qwen2.5-1.5B's shapes:
64 tokens .97 and 14.7 ms against 1.10 and 15.8, 128 tokens 2.0 and 29.8 against 1.85 and 26.3."""

QUANTISED_NATIVE_TOKENS = 128
"""NATIVE_TOKENS of quantised experts, which a library's product needs widened. Measured on one Zen 5 core, every expert
of Qwen2.5-1.5B's shape in int8: 128 tokens 65 ms with either in bfloat16, 111 against 116 in float32; 256 tokens 129
against 111 and 220 against 222."""

WIDENED_ROWS = 512
"""Quantised rows that are widened at a time, so that they stay in the processor's cache until they are multiplied. A
copy of a whole layer is mostly the operating system giving out its pages: Qwen2.5-1.5B's takes 130 ms on one Zen 5
core, where the product of 256 tokens with weights in bfloat16 takes 103."""

SIGN_AND_BITS = 0x3F80 - 0x8000
"""As int16: float16's sign, and the bits of its exponent and mantissa that a float8_e4m3fn fills."""


def routed_ffn(
    x: Tensor,
    tau: Tensor,
    router: RouterWeights,
    weights: Weights,
    spec: LayerSpec,
    *,
    router_input: Tensor | None = None,
    gather: bool = True,
    counters: Counters = NO_COUNTERS,
) -> Tensor:
    """Eq. 7-10: route every token, run its experts, add the output bias once.

    Args:
        x: [T, H].
        tau: float32 [T].
        router, weights, spec: the layer.
        router_input: [T, H] in any float dtype; what the router reads, or None for `x`.
        gather: look at the values to skip what they allow; False never reads a value on the host, so that the function
            may be captured in a CUDA graph, and stays in PyTorch.
        counters: what the call adds to.

    Returns:
        [T, H] in the dtype of `x`.

    Raises:
        ConfigError: a tensor that is not this layer's.
    """
    every = takes_every_expert(x.shape[0], spec, quantised=weights.quantised) or (spec.at_least and not gather)
    if gather and x.shape[0] <= step_tokens(tau, spec.dtype, quantised=weights.quantised, at_least=every):
        tau = (tau > 0).float() if every else tau
        return native.ready(router, weights, spec)(x, tau, router_input=router_input, counters=counters)
    spec.check(x, tau, router, weights, router_input)
    spec, kept = spec.routed, spec.num_kept
    scale: Tensor | None = None
    if every:
        present = tau > 0  # not padding
        if counters.active is not None:
            counters.active.add_(present, alpha=spec.num_experts)
        if spec.rule.gate != "none":
            logits = router_logits(x if router_input is None else router_input, router.weight, router.bias, router.down)
            scale = gate_weights(logits[:, :kept], present.unsqueeze(1), gate=spec.rule.gate)
    elif spec.rule.gate != "none" or not gather or not bool((tau >= DENSE_TAU).all()):
        logits = router_logits(x if router_input is None else router_input, router.weight, router.bias, router.down)
        if gather and spec.rule.selection == "cumulative_mass" and not native.unavailable():
            chosen = native.select_cumulative_mass(logits, tau)
        else:
            chosen = select_experts(logits, tau, selection=spec.rule.selection, threshold=spec.rule.threshold)
        scale = gate_weights(logits, chosen, gate=spec.rule.gate)[:, :kept]
        active = scale != 0
        if counters.active is not None:
            counters.active.add_(active.sum(dim=1, dtype=torch.int32))
        if gather:
            touched = active.any(dim=0).nonzero().squeeze(-1)
            if touched.numel() < GATHER_BELOW * spec.num_experts:
                counters.add_reads(touched.numel(), spec.num_experts)
                if touched.numel() == 0:  # threshold selection may choose nothing
                    return _add_bias(torch.zeros_like(x), weights.b_out)
                return _add_bias(_gathered(x, scale, touched, weights, spec), weights.b_out)
    elif counters.active is not None:
        counters.active.add_(spec.num_experts)
    counters.add_reads(spec.num_experts, spec.num_experts)
    h = _neurons(_linear(x, weights.w_in, weights.scale_in, weights.b_in), spec)
    if scale is not None:
        h = scale_neurons(h, scale)
    return _add_bias(_product(h, weights.w_out_t, weights.scale_out), weights.b_out)


@functools.cache
def native_tokens(dtype: torch.dtype, *, quantised: bool = False) -> float:
    """Tokens up to which layers of a dtype take the native kernel here; 0 where it cannot be used."""
    if native.unavailable():
        return 0
    if not has_fast_product(dtype):
        return float("inf")
    return QUANTISED_NATIVE_TOKENS if quantised else NATIVE_TOKENS


def step_tokens(tau: Tensor, dtype: torch.dtype, *, quantised: bool, at_least: bool = False) -> float:
    """Tokens up to which a step of these taus [T] takes the native kernel: :func:`native_tokens`, or more.

    One that leaves experts out takes it at any size: it computes what each token needs, where a dense product computes
    all. Measured on one Zen 5 core at 24 to 512 tokens, tau .75 and .5, both shapes: 1.8 to 5 times faster. With
    `at_least` the taus are the least that tokens get: they take every expert.
    """
    most = native_tokens(dtype, quantised=quantised)
    if len(tau) <= most or not most or not _is_fast(dtype, quantised=quantised):
        return most
    if at_least or bool((tau >= DENSE_TAU).all()):
        return max(most, DENSE_NATIVE_TOKENS) if native.chosen_isa().startswith("avx512") else most
    return float("inf")


@functools.cache
def _is_fast(dtype: torch.dtype, *, quantised: bool) -> bool:
    """Whether the native kernel is known to be as fast as a library's dense product of many tokens.

    Not so beside AMX in bfloat16, and in float16 where the processor multiplies it: nobody has measured them.
    """
    if quantised or dtype == torch.float32:
        return True
    return dtype == torch.bfloat16 and not torch.cpu._is_amx_tile_supported()


def takes_every_expert(num_tokens: int, spec: LayerSpec, *, quantised: bool = False) -> bool:
    """Whether a call leaves no expert out because tau is the least that tokens get, and it has so many.

    Up to NATIVE_TOKENS every token gets its tau exactly, with the native kernel and without. Beyond, no call gathers
    either: so many tokens of real text use most experts between them, and to see whether they do costs the routing.
    """
    return spec.at_least and num_tokens > max(NATIVE_TOKENS, native_tokens(spec.dtype, quantised=quantised))


@functools.cache
def has_fast_product(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of a dtype as fast as float32; several times slower if not."""
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    return supported is None or (torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, supported)())


def _gathered(x: Tensor, scale: Tensor, experts: Tensor, weights: Weights, spec: LayerSpec) -> Tensor:
    """The layer over `experts` (int64 ids) alone: no other expert's weights are read."""

    def gathered(rows: Tensor | None) -> Any:
        """The experts' rows of a tensor, [F, ...] or [2 F, ...]."""
        if rows is None:
            return None
        return rows.view(-1, spec.num_experts, spec.expert_size, *rows.shape[1:])[:, experts].flatten(0, 2)

    pre = _linear(x, gathered(weights.w_in), gathered(weights.scale_in), gathered(weights.b_in))
    h = scale_neurons(_neurons(pre, spec), scale[:, experts])
    return _product(h, gathered(weights.w_out_t), gathered(weights.scale_out))


def _widened(rows: Tensor, scale: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Quantised rows [n, H] times their scales, float32 [n], in `dtype`, some at a time; without gradients.

    NaN in float8, which no checkpoint holds, is read as 480, as the native kernel does.

    Yields:
        which rows, and their values, which the next ones overwrite.
    """
    wide = torch.empty(min(WIDENED_ROWS, len(rows)), rows.shape[1], dtype=torch.float32, device=rows.device)
    values = wide if dtype == wide.dtype else torch.empty_like(wide, dtype=dtype)
    float8 = rows.dtype == torch.float8_e4m3fn
    if float8:
        rows, scale = rows.view(torch.int8), scale * 256
    for start in range(0, len(rows), WIDENED_ROWS):
        part = slice(start, min(start + WIDENED_ROWS, len(rows)))
        size = part.stop - start
        some = rows[part]
        if float8:
            # PyTorch converts float8 one by one. With its bits where float16 has them it is a 256th, exactly.
            bits = some.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(SIGN_AND_BITS)
            some = bits.view(torch.float16)
        wide[:size].copy_(some).mul_(scale[part, None])
        if values is not wide:
            values[:size].copy_(wide[:size])
        yield part, values[:size]


def _linear(x: Tensor, rows: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """x [T, H] times rows [F, H], which `scale` [F] belongs to where they are quantised: [T, F]."""
    if scale is None:
        return F.linear(x, rows, bias)
    y = x.new_empty(len(x), len(rows))
    for part, values in _widened(rows, scale, x.dtype):
        y[:, part] = F.linear(x, values, None if bias is None else bias[part])
    return y


def _product(h: Tensor, rows: Tensor, scale: Tensor | None) -> Tensor:
    """Neurons h [T, F] times rows [F, H], which `scale` [F] belongs to where they are quantised: [T, H]."""
    if scale is None:
        return h @ rows
    y = torch.zeros(len(h), rows.shape[1], dtype=torch.float32, device=h.device)
    for part, values in _widened(rows, scale, h.dtype):
        y += h[:, part] @ values
    return y.to(h.dtype)


def _neurons(pre: Tensor, spec: LayerSpec) -> Tensor:
    if not spec.glu:
        return spec.activate(pre)
    gate, up = pre.chunk(2, dim=-1)
    return spec.activate(gate) * up


def _add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias
