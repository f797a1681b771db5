"""Builds the CPU kernel with the system's C++ compiler. Run by setup.py, so that it imports nothing of the package.

A plain shared library with a C interface: neither torch nor Python is needed to build it, and no version of theirs is
built in.
"""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent
LIBRARY = "libprunepath_cpu.so"
KERNELS = ("routed_ffn", "selection")
"""Sources that are compiled once per instruction set."""

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
X86_FLAGS = {"avx512_bf16": (*_AVX512, "-mavx512bf16"), "avx512": _AVX512, "avx2": _AVX2}
"""Instruction sets that are built beside "plain", which is whatever every processor of the machine's kind has."""

FLAGS = (
    *("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"),
)


def compiler() -> str | None:
    """The C++ compiler: $CXX, or the first that is found; None if there is none."""
    return os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)


def build(target: Path, work: Path, extra_flags: tuple[str, ...] = ()) -> list[str]:
    """Compile and link the kernel.

    Args:
        target: the shared library to write.
        work: a directory for object files.
        extra_flags: further flags of compiler and linker, such as a sanitizer.

    Returns:
        The instruction sets that are in it. One that the compiler does not know is left out.

    Raises:
        RuntimeError: no compiler, or it fails.
    """
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler (g++, c++ or clang++, or the one that CXX names)")
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    flags = {"plain": (), **(X86_FLAGS if is_x86 else {})}
    work.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)

    def run(*arguments: str | Path) -> None:
        command = [cxx, *map(str, arguments), *extra_flags]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise RuntimeError(f"{cxx}: {error}") from error
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")

    def kernel(isa: str) -> list[Path]:
        outputs = [work / f"{name}_{isa}.o" for name in KERNELS]
        try:
            for name, output in zip(KERNELS, outputs, strict=True):
                run(*FLAGS, *flags[isa], f"-DISA={isa}", "-c", SOURCES / f"{name}.cpp", "-o", output)
        except RuntimeError:
            if isa == "plain":
                raise
            return []
        return outputs

    run(*FLAGS, "-c", SOURCES / "processor.cpp", "-o", work / "processor.o")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = dict(zip(flags, pool.map(kernel, flags), strict=True))
    built = [isa for isa, outputs in objects.items() if outputs]
    run("-shared", work / "processor.o", *(output for isa in built for output in objects[isa]), "-lm", "-o", target)
    return built
