"""Compiles kernels for a GPU that is not there, and reads registers and spills; run by test_kernels_compiled*.py."""

import gc
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from prunepath_vllm.activations import Activation
from prunepath_vllm.kernels import common, decode, ffn, float8, quantised, routing
from prunepath_vllm.kernels.dense import gated_activation
from prunepath_vllm.kernels.expand import expand_taus
from prunepath_vllm.kernels.ffn import Tuning, heuristic_tuning, load_tuning, route_ahead, routed_ffn
from prunepath_vllm.kernels.layer import LayerSpec, RouterWeights, RoutingRule, Weights
from prunepath_vllm.kernels.routing import RouterConfig, route, select_mask

SPECS = (
    LayerSpec(3584, 592, 32, torch.bfloat16),  # Qwen2-7B
    LayerSpec(5120, 864, 32, torch.bfloat16),  # Qwen2.5-32B
    LayerSpec(1024, 128, 32, torch.bfloat16, Activation.GELU_TANH, glu=False),  # GPT-2 Medium
    LayerSpec(576, 192, 8, torch.bfloat16),  # SmolLM2-135M; no table
)

MANY_EXPERTS = (
    LayerSpec(3584, 4736, 4, torch.bfloat16),
    LayerSpec(3584, 2368, 8, torch.bfloat16),
    LayerSpec(3584, 1184, 16, torch.bfloat16),
)
"""Qwen2-7B's smaller experts: the more there are, the more registers routing takes."""

SIZES = {1: 8, 2: 64, 3: 64, 12: 8, 28: 64, 48: 64, 64: 8}
"""Expert sizes besides those of SPECS, compiled for a narrow layer, and the batch of their up and down kernels.

Tiles, not widths, depend on them: by gcd(8, size), by the power of two from the size on, and by whether it is one. What
5 and 20 would give is that of 3 and 28. Each gcd is compiled for 8 tokens and for 64, but 2 for 64, the larger tile.
"""

QUANTISED_SIZES = (1, 28)
"""Those compiled for quantised weights too: a power of two and none, the smallest tiles and of the largest."""

AHEAD_SIZE = 12
"""The one of them whose kernels are also compiled for a list of experts made before: it changes no tile."""

WIDEST = (
    LayerSpec(8192, 512, 64, torch.bfloat16),
    LayerSpec(2048, 256, 32, torch.float32),
    LayerSpec(8192, 864, 32, torch.bfloat16, expert_dtype=torch.int8),
)
"""Layers whose tiles take most shared memory on the fused and grouped paths."""

SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Bytes that a program may have, by compute capability; 8.6 and 12.0 have 8.9's."""

PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"


@dataclass
class NoDevice:
    """Answers what the launcher asks of a driver."""

    capability: int

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


@cache
def resources(ptx: str, capability: int) -> dict[str, int]:
    """Registers and spilled bytes, from ptxas."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        arch = f"sm_{capability}{'a' if capability == 90 else ''}"
        command = [PTXAS, "-v", f"-arch={arch}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert registers is not None
    assert spilled is not None
    return {"registers": int(registers[1]), "spilled": int(spilled[1])}


def main(capability: int) -> None:
    """Print one JSON object per kernel of the shipped choices (Hopper) or the heuristic ones."""
    driver.set_active(NoDevice(capability))
    decode.num_sms = lambda device: 132
    ffn.default_pdl = lambda device: int(capability >= 90)
    common.converts_float8 = float8.converts_float8 = lambda device: capability >= 89
    quantised.num_sms = lambda device: 132
    routing.shared_memory = lambda device: SHARED_MEMORY[capability]
    run = JITFunction.run

    def compile_only(self, *args, grid=None, warmup=False, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found = resources(kernel.asm["cubin"].decode(), capability)
        print(json.dumps({"kernel": self.fn.__name__, "shared": kernel.metadata.shared, **found}), flush=True)
        return kernel

    JITFunction.run = compile_only
    CUDABackend.make_cubin = lambda self, ptx, *rest: ptx.encode()  # ptxas runs once, for its figures
    knobs.compilation.store_binary_only = True  # nobody reads the stages before
    gc.disable()  # a search of everything imported, time and again; kernels leave little
    if capability == 89:
        compile_tight(SHARED_MEMORY[capability])
        return
    for spec in SPECS:
        compile_layer(spec, load_tuning("NVIDIA H200", spec) if capability == 90 else heuristic_tuning(spec))
    for spec in MANY_EXPERTS:
        compile_routing(spec, load_tuning("NVIDIA H200", spec) if capability == 90 else heuristic_tuning(spec))
    for size, batch in SIZES.items():
        compile_sparse_paths(LayerSpec(256, 8, size, torch.bfloat16), batch)
    for stored in (torch.int8, torch.float8_e4m3fn):
        compile_quantised(stored)
    if capability == 90:
        shipped = replace(SPECS[0], expert_dtype=torch.float8_e4m3fn)
        compile_layer(shipped, load_tuning("NVIDIA H200", shipped))
    for prompt_lens in (None, torch.empty(5, dtype=torch.int64)):
        expand_taus(
            torch.empty(8), torch.empty(5, dtype=torch.int32), torch.empty(6, dtype=torch.int32),
            torch.empty(64, dtype=torch.int64), torch.empty(64), dense_positions=1, prompt_lens=prompt_lens,
        )  # fmt: skip
    for num_experts in (592, 8192):
        select_mask(torch.empty(64, num_experts), torch.empty(64))


def compile_tight(room: int) -> None:
    """Where shared memory is short: the choices for so much, of what takes most of it."""
    for stored in (None, torch.float8_e4m3fn):
        spec = replace(SPECS[0], expert_dtype=stored)
        compile_layer(spec, heuristic_tuning(spec, room))
    for spec in WIDEST:
        for _, choice in heuristic_tuning(spec, room).choices:
            if choice.path in ("fused", "grouped"):
                compile_layer(spec, Tuning(((1 if choice.path == "fused" else 5000, choice),)))
    low_rank = RouterWeights(empty(592, 128, dtype=torch.float32), None, empty(128, 3584))
    tau = torch.empty(64, device="meta")
    route(empty(64, 3584), tau, low_rank, RoutingRule(), config=RouterConfig(), want_flags=False, pdl=0)
    exact = replace(SPECS[0], expert_dtype=torch.int8)
    quantised.first_linear(empty(65, exact.hidden), layer_of(exact)[1], exact)
    quantised.second_linear(empty(65, exact.neurons), layer_of(exact)[1], exact)


def empty(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*sizes, dtype=dtype, device="meta")  # cuBLAS's products cost nothing here


def layer_of(spec: LayerSpec) -> tuple[RouterWeights, Weights]:
    bias = (None, None)
    if not spec.glu:
        bias = empty(spec.input_rows, dtype=spec.dtype), empty(spec.hidden, dtype=spec.dtype)
    stored = spec.expert_dtype or spec.dtype
    w_in, w_out_t = (empty(rows, spec.hidden, dtype=stored) for rows in (spec.input_rows, spec.neurons))
    scales = (None, None)
    if spec.expert_dtype:
        scales = tuple(empty(rows, dtype=torch.float32) for rows in (spec.input_rows, spec.neurons))
    weights = Weights(w_in, bias[0], w_out_t, bias[1], *scales)
    return RouterWeights(empty(spec.num_experts, spec.hidden, dtype=spec.dtype)), weights


def compile_layer(spec: LayerSpec, tuning: Tuning) -> None:
    """Every choice of a table, and the gated activation between cuBLAS's products of the dense path."""
    router, weights = layer_of(spec)
    gated = replace(spec, rule=RoutingRule(gate="sigmoid"))
    for limit, choice in tuning.choices:
        num_tokens = min(limit, 256)
        x, tau = empty(num_tokens, spec.hidden, dtype=spec.dtype), torch.empty(num_tokens, device="meta")
        if choice.path == "dense":  # the products are cuBLAS's
            for rule in (spec.rule, gated.rule):
                route(x, tau, router, rule, config=choice.router, want_flags=False, pdl=0)
            route(x, tau, router, gated.rule, config=choice.router, want_flags=False, every=True, pdl=0)
        else:
            routed_ffn(x, tau, router, weights, gated, tuning=Tuning(((1, choice),)))
    gated_activation(empty(256, spec.input_rows), weights, spec)
    counts = torch.empty(256, dtype=torch.int32, device="meta"), torch.empty(1, dtype=torch.int64, device="meta")
    tau = torch.empty(256, device="meta")
    given = dict(experts_read=counts[1], tau=tau, active_counts=counts[0])
    gated_activation(empty(256, spec.input_rows), weights, spec, **given)
    gated_activation(empty(256, spec.input_rows), weights, spec, torch.empty(256, spec.num_experts, device="meta"))


def compile_routing(spec: LayerSpec, tuning: Tuning) -> None:
    """What depends on the number of experts: every choice's routing, and lists of experts, alone or in a kernel."""
    router, weights = layer_of(spec)
    for limit, choice in tuning.choices:
        num_tokens, one = min(limit, 256), Tuning(((1, choice),))
        x, tau = empty(num_tokens, spec.hidden, dtype=spec.dtype), torch.empty(num_tokens, device="meta")
        if choice.path == "dense":
            route(x, tau, router, spec.rule, config=choice.router, want_flags=False, pdl=0)
        else:
            route_ahead(x, tau, router, spec, tuning=one)
            routed_ffn(x, tau, router, weights, spec, tuning=one)


def compile_sparse_paths(spec: LayerSpec, *batches: int) -> None:
    """The kernels whose tiles depend on the expert size, at 1 and 5,000 tokens and in batches of a few."""
    router, weights = layer_of(spec)
    found = heuristic_tuning(spec)
    tokens = {1: found.choice(1), **dict.fromkeys(batches, found.choice(8)), 5000: found.choice(5000)}
    for num_tokens, choice in tokens.items():
        x, tau = empty(num_tokens, spec.hidden, dtype=spec.dtype), torch.empty(num_tokens, device="meta")
        tuning = Tuning(((1, choice),))
        routed_ffn(x, tau, router, weights, spec, tuning=tuning)
        if num_tokens <= 8 and spec.expert_size == AHEAD_SIZE:
            ahead = route_ahead(x, tau, router, spec, tuning=tuning)
            routed_ffn(x, tau, router, weights, spec, tuning=tuning, router_input=x, routing=ahead)
    gated_activation(empty(8, spec.input_rows), weights, spec, torch.empty(8, spec.num_experts, device="meta"))


def compile_quantised(stored: torch.dtype) -> None:
    """The heuristic choices on quantised weights, their dense products of every size, and what W8A8 needs.

    int8 takes the tiles of float8 and is widened in fewer registers: two layers.
    """
    is_float8 = stored == torch.float8_e4m3fn
    for spec in SPECS if is_float8 else (SPECS[0], SPECS[2]):
        spec = replace(spec, expert_dtype=stored)
        compile_layer(spec, heuristic_tuning(spec))
    compile_sparse_paths(LayerSpec(1024, 128, 32, torch.float16, expert_dtype=stored), 8, 64)
    for spec in (replace(spec, expert_dtype=stored) for spec in (SPECS[0], SPECS[2])):
        _, weights = layer_of(spec)
        for num_tokens in (1, 17, 33, 65, 129, 257, 513) if is_float8 and spec.glu else (1, 65, 513):
            exact = replace(spec, quantise_activations=False)
            neurons = gated_activation(empty(num_tokens, spec.input_rows), weights, spec)
            quantised.first_linear(empty(num_tokens, spec.hidden), weights, exact)
            quantised.second_linear(neurons, weights, exact)
    for size in QUANTISED_SIZES:
        compile_sparse_paths(LayerSpec(256, 8, size, torch.bfloat16, expert_dtype=stored), SIZES[size])
    if common.converts_float8(torch.device("cuda")):
        float8.quantise_tokens(empty(8, 18944))
        for spec in (replace(spec, expert_dtype=stored) for spec in (SPECS[0], SPECS[2])):
            x_scale = empty(8, 1, dtype=torch.float32)
            gated_activation(empty(8, spec.input_rows), layer_of(spec)[1], spec, x_scale=x_scale)
    quantised.transposed(empty(18944, 3584, dtype=stored))


if __name__ == "__main__":
    main(int(sys.argv[1]))
