"""Compiles kernels for a GPU that is not there, and reads registers and spills; run by test_kernels_compiled.py."""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from prunepath_vllm.kernels import decode, ffn
from prunepath_vllm.kernels.dense import gated_activation
from prunepath_vllm.kernels.expand import expand_taus
from prunepath_vllm.kernels.ffn import Tuning, heuristic_tuning, load_tuning, routed_ffn
from prunepath_vllm.kernels.routing import route, select_mask
from prunepath_vllm.kernels.tuning import Shape
from prunepath_vllm.kernels.weights import Weights

SHAPES = (
    Shape(3584, 592, 32),  # Qwen2-7B
    Shape(5120, 864, 32),  # Qwen2.5-32B
    Shape(1024, 128, 32, False, "gelu_new", True),  # GPT-2 Medium
    Shape(576, 192, 8),  # SmolLM2-135M; no table
)

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
    run = JITFunction.run

    def compile_only(self, *args, grid=None, warmup=False, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found = resources(kernel.asm["ptx"], capability)
        print(json.dumps({"kernel": self.fn.__name__, "shared": kernel.metadata.shared, **found}), flush=True)
        return kernel

    JITFunction.run = compile_only
    for shape in SHAPES:
        tuning = heuristic_tuning(shape.hidden, shape.size, shape.glu)
        if capability == 90:
            tuning = load_tuning("NVIDIA H200", shape.hidden, shape.experts, shape.size, shape.glu)
        compile_layer(shape, tuning)
    for prompt_lens in (None, torch.empty(5, dtype=torch.int64)):
        expand_taus(
            torch.empty(8), torch.empty(5, dtype=torch.int32), torch.empty(6, dtype=torch.int32),
            torch.empty(64, dtype=torch.int64), torch.empty(64), dense_positions=1, prompt_lens=prompt_lens,
        )  # fmt: skip
    select_mask(torch.empty(64, 592), torch.empty(64))


def compile_layer(shape: Shape, tuning: Tuning) -> None:
    """Every choice of a table, and the gated activation between cuBLAS's products of the dense path."""
    neurons, rows = shape.experts * shape.size, shape.experts * shape.size * (2 if shape.glu else 1)

    def empty(*sizes: int) -> torch.Tensor:
        return torch.empty(*sizes, dtype=torch.bfloat16, device="meta")  # cuBLAS's products cost nothing here

    bias = (empty(rows), empty(shape.hidden)) if shape.bias else (None, None)
    weights = Weights(
        empty(rows, shape.hidden), bias[0], empty(neurons, shape.hidden), bias[1], shape.activation, shape.glu
    )
    router = empty(shape.experts, shape.hidden)
    for limit, choice in tuning.choices:
        num_tokens = min(limit, 256)
        x, tau = empty(num_tokens, shape.hidden), torch.empty(num_tokens, device="meta")
        rule: dict[str, Any] = dict(selection="cumulative_mass", threshold=None)
        if choice.path == "dense":  # the products are cuBLAS's
            for gate in ("none", "sigmoid"):
                route(x, tau, router, None, gate=gate, **rule, config=choice.router, want_flags=False, pdl=0)
        else:
            routed_ffn(x, tau, router, None, weights, gate="sigmoid", **rule, tuning=Tuning(((1, choice),)))
    gated_activation(empty(256, rows), weights)
    gated_activation(empty(256, rows), weights, torch.empty(256, shape.experts, device="meta"))


if __name__ == "__main__":
    main(int(sys.argv[1]))
