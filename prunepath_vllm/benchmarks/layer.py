"""The routed feed-forward layer alone on a CUDA GPU: is it right, and how fast beside the dense one.

Times are medians over CUDA-graph replays (tile_search.py). Inputs route at random, so that T tokens together touch
1 - (1 - share)^T of the experts.
"""

import sys
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from prunepath_vllm.activations import ACTIVATIONS
from prunepath_vllm.benchmarks import shapes
from prunepath_vllm.benchmarks.float32 import layer_output
from prunepath_vllm.benchmarks.published import SHAPES
from prunepath_vllm.benchmarks.report import FLOAT8_TOLERANCE, BenchmarkError
from prunepath_vllm.benchmarks.tile_search import Bench, graph_of
from prunepath_vllm.checkpoint import load_prunepath_config
from prunepath_vllm.config import check_dense_shape
from prunepath_vllm.families import Family
from prunepath_vllm.kernels import reference
from prunepath_vllm.kernels.ffn import Choice
from prunepath_vllm.kernels.layer import LayerSpec
from prunepath_vllm.kernels.quantised import float8_inputs
from prunepath_vllm.kernels.routing import LIBRARY_TOKENS

TOLERANCE = 8e-3
"""Relative RMS error against float32 arithmetic on the same bf16 inputs. Rounding alone reaches 5.2e-3 where each token
has one expert of four neurons: too few for their errors to average out. One of E experts left out makes about E^-0.5:
4e-2 with qwen2-7b's 592, 1.5e-2 with the 4,736 that experts of four would give it."""


def check(bench: Bench, num_tokens: int, share: float, choice: Choice, gate: str = "sigmoid") -> dict[str, Any]:
    """Every token's number of experts, its output, and the same bits from every replay of a graph."""
    xs, taus = bench.inputs(num_tokens, share)
    last = len(xs) - 1
    counts = torch.zeros(num_tokens, dtype=torch.int32, device="cuda")
    bench.run(last, xs[last], taus[last], choice, gate=gate, active_counts=counts)
    out: list[Tensor] = []
    graph = graph_of(
        lambda: out.extend(bench.run(i, x, t, choice, gate=gate) for i, (x, t) in enumerate(zip(xs, taus, strict=True)))
    )
    first = None
    same = True
    for _ in range(20 if num_tokens <= LIBRARY_TOKENS else 3):
        for t in out:
            t.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        outputs = torch.stack(out[-len(xs) :])
        same = same and (first is None or torch.equal(first, outputs))
        first = outputs
    assert first is not None
    error, tolerance, wrong = 0.0, TOLERANCE, 0
    for i in {0, last}:
        logits = F.linear(xs[i].double(), bench.layers[i].router.weight.double()).float()
        gates = reference.expert_weights(logits, taus[i], selection="cumulative_mass", threshold=None, gate=gate)
        if i == last:
            wrong = int((counts != (gates != 0).sum(dim=-1)).sum())
        weights = bench.layers[i].weights
        float8 = float8_inputs(bench.spec, weights, num_tokens, choice.path)
        tolerance = FLOAT8_TOLERANCE if float8.second else TOLERANCE
        y = layer_output(xs[i], gates, weights, bench.spec, float8)
        difference = float((first[i].float() - y).norm() / y.norm())
        error = max(error, difference) if difference == difference else float("inf")
    del graph
    out.clear()
    if num_tokens >= 256:
        torch.cuda.empty_cache()
    # Rounding may move a near-tie in thousands of tokens.
    ok = wrong <= num_tokens // 1000 and error < tolerance and same
    return dict(tokens=num_tokens, share=share, path=choice.path, gate=gate, wrong=wrong, error=error, same=same, ok=ok)


def failed(bench: Bench, num_tokens: int, choice: Choice, what: str) -> None:
    """Say on stderr which choice is wrong."""
    print(f"wrong: {bench.spec}, {num_tokens} tokens, {choice}: {what}", file=sys.stderr, flush=True)


def check_all(
    bench: Bench, choices: dict[str, Choice], num_tokens: int, log: list[dict[str, Any]]
) -> dict[str, Choice]:
    """The choices that pass, by path; the others are named on stderr. `log` gets a record of every check."""
    good = {}
    for path, choice in choices.items():
        cases = [
            (1.0, "sigmoid"),
            (0.2, "sigmoid"),
            (0.2, "none"),
            (1.0, "none"),
            (1 / bench.spec.num_experts, "sigmoid"),
        ]
        if num_tokens > LIBRARY_TOKENS:
            cases = cases[:2]
        try:
            results = [check(bench, num_tokens, share, choice, gate) for share, gate in cases]
        except Exception as error:
            failed(bench, num_tokens, choice, f"{type(error).__name__} {str(error)[:300]}")
            log.append(dict(tokens=num_tokens, path=path, ok=False, exception=str(error)[:500]))
            continue
        log += results
        if all(r["ok"] for r in results):
            good[path] = choice
        else:
            failed(bench, num_tokens, choice, str([r for r in results if not r["ok"]]))
    return good


def copy_bandwidth() -> float:
    """Bytes per microsecond (TB/s * 1e6) of a device-to-device copy, read plus written."""
    source = torch.randint(0, 255, (2**32,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    milliseconds = triton.testing.do_bench(lambda: target.copy_(source), warmup=20, rep=100, return_mode="median")
    return 2 * source.numel() / (milliseconds * 1e3)


def require_gpu() -> None:
    """Refuse to measure the kernels elsewhere.

    Raises:
        BenchmarkError: there is no CUDA GPU.
    """
    if not torch.cuda.is_available():
        raise BenchmarkError("the kernels are measured on a CUDA GPU; expected one, found none")


def spec_of(name: str, expert_size: int = 32, expert_dtype: str | None = None) -> LayerSpec:
    """The layer of a published shape, or of a PrunePath checkpoint's directory; `expert_dtype` None for its own."""
    if name in SHAPES:
        config = shapes.dense_config(name)
        family = shapes.shape_family(name)
        experts = check_dense_shape(family.intermediate_size(config), expert_size)
        return _layer(family, config, experts, expert_size, expert_dtype)
    family, prunepath, config = load_prunepath_config(name)
    stored = expert_dtype or prunepath.expert_dtype
    return _layer(family, config, prunepath.num_experts, prunepath.expert_size, stored)


def _layer(family: Family, config: dict[str, Any], experts: int, size: int, stored: str | None) -> LayerSpec:
    activation = ACTIVATIONS[family.activation(config)]
    hidden, glu = family.hidden_size(config), family.gate is not None
    expert_dtype = None if stored is None else getattr(torch, stored)
    return LayerSpec(hidden, experts, size, torch.bfloat16, activation, glu, expert_dtype=expert_dtype)
