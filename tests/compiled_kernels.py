"""Compiles kernels for a GPU that is not there, and reads registers and spills; run by test_kernels_compiled.py."""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from prunepath_vllm.kernels import decode, ffn
from prunepath_vllm.kernels.ffn import Tuning, heuristic_tuning, load_tuning, routed_ffn
from prunepath_vllm.kernels.weights import Weights

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
    """Print one JSON object per kernel of the shipped and the heuristic choices for Qwen2-7B's shape."""
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
    hidden, experts, size = 3584, 592, 32
    bf16 = torch.bfloat16
    weights = Weights(
        torch.empty(2 * experts * size, hidden, dtype=bf16), None, torch.empty(experts * size, hidden, dtype=bf16),
        None, "silu", True,
    )  # fmt: skip
    router = torch.empty(experts, hidden, dtype=bf16)
    tables = [heuristic_tuning(hidden, size, True)]
    if capability == 90:
        tables = [load_tuning("NVIDIA H200", hidden, experts, size, True)]
    for tuning in tables:
        for limit, choice in tuning.choices:
            if choice.path == "dense":
                continue  # its routing kernels are those of the split path
            num_tokens = min(limit, 256)
            routed_ffn(
                torch.empty(num_tokens, hidden, dtype=bf16), torch.empty(num_tokens), router, None, weights,
                selection="cumulative_mass", threshold=None, gate="sigmoid", tuning=Tuning(((1, choice),)),
            )  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]))
