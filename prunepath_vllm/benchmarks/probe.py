"""What a benchmark asks of the engine's workers: vLLM adds this class to the worker's own (``worker_extension_cls``).

Its methods are called by name through ``LLM.collective_rpc``; nothing is pickled.
"""

import resource
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_reduce

from prunepath_vllm.benchmarks.float32 import layer_output
from prunepath_vllm.benchmarks.shapes import randomise
from prunepath_vllm.kernels import reference
from prunepath_vllm.kernels.layer import LayerSpec, Weights, dtype_name
from prunepath_vllm.kernels.split_memory import Grains
from prunepath_vllm.model_executor.layers.routed_ffn import (
    ExpertRouter,
    first_layer,
    takes_every_expert,
    triton_kernels,
)

CHECKED_TOKENS = (1, 4, 16, 64, 256)
CHECKED_TAUS = (0.3, 1.0, 0.7, 0.05)


class BenchmarkProbe:
    """Methods of a worker."""

    get_model: Any

    @torch.inference_mode()
    def prunepath_randomise(self) -> None:
        """Fill the model with random weights, in place."""
        randomise(self.get_model())

    @torch.inference_mode()
    def prunepath_favour(self, bias: float) -> None:
        """Set every router's bias, to this for the first half of its experts and 0 for the others."""
        for module in self.get_model().modules():
            if isinstance(module, ExpertRouter):
                module.bias.zero_()
                module.bias[: len(module.bias) // 2] = bias

    @torch.inference_mode()
    def prunepath_check_layer(self) -> list[list[float | str]] | None:
        """Relative RMS errors of the first routed layer against float32 arithmetic, the worst of several batch sizes.

        Returns:
            [error, dtype] pairs, what neurons are in at these sizes being the layer's dtype or float8; None where the
            model has no routed layer.
        """
        return check_first_layer(self.get_model())  # lists: what goes over HTTP as it is

    def prunepath_peak_gib(self) -> float:
        """Most memory this worker has held so far, GiB: reserved on its GPU, or resident where it runs on a CPU."""
        if torch.cuda.is_available():
            return (torch.cuda.max_memory_reserved() + Grains.held(on_host=False)) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def check_first_layer(model: nn.Module) -> list[list[float | str]] | None:
    """See :meth:`BenchmarkProbe.prunepath_check_layer`. Tokens of one batch have taus of their own."""
    layer = first_layer(model)
    if not layer:
        return None
    ffn, router, inputs, outputs = layer
    saved, weight = ffn.tau.clone(), inputs.weight
    weights = Weights(weight, inputs.bias, outputs.weight, outputs.bias, inputs.weight_scale, outputs.weight_scale)
    generator = torch.Generator(weight.device).manual_seed(0)
    worst: dict[str, float] = {}
    for tokens in sorted({min(tokens, len(ffn.tau)) for tokens in CHECKED_TOKENS}):
        x = torch.randn(tokens, weight.shape[1], generator=generator, device=weight.device).to(ffn.spec.dtype)
        taus = torch.tensor(CHECKED_TAUS, device=weight.device).repeat(1 + tokens // len(CHECKED_TAUS))[:tokens]
        ffn.tau[:tokens] = taus
        ffn.dense_step.fill_(False)
        logits = reference.router_logits(x, router.weight, router.bias, router.down and router.down.weight)
        least = torch.ones_like(taus) if takes_every_expert(tokens, ffn.spec, on_gpu=x.is_cuda) else taus
        gates = reference.expert_weights(logits, least, **asdict(ffn.spec.rule))
        float8 = _float8_inputs(ffn.spec, weights, tokens)
        expected = layer_output(x, gates, weights, ffn.spec, float8)
        kind = "float8" if float8[1] else dtype_name(ffn.spec.dtype)
        if ffn.world > 1:
            expected = tensor_model_parallel_all_reduce(expected)
        for is_ahead in {False, router.routes_by_attention}:
            ahead = ffn.route_ahead(x, router) if is_ahead else None
            y = ffn(x, router, inputs, outputs, ahead).float()
            error = ((y - expected).norm() / expected.norm().clamp(min=1e-30)).item()
            worst[kind] = max(worst.get(kind, 0.0), error if error == error else float("inf"))
    ffn.tau.copy_(saved)
    return [[error, kind] for kind, error in worst.items()]


def _float8_inputs(spec: LayerSpec, weights: Weights, num_tokens: int) -> tuple[bool, bool, bool]:
    """See ``kernels.quantised.float8_inputs``; on a CPU, or without Triton, there are none."""
    kernels = triton_kernels()
    if kernels is None or not weights.w_in.is_cuda:
        return False, False, False
    choice = kernels.tuning_for(weights.w_in.device, spec).choice(num_tokens)
    return kernels.float8_inputs(spec, weights, num_tokens, choice.path)
