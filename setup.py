"""Build file. Only prunepath_vllm/ is packaged: `kernels` and `model_executor` in the root are links for readers."""

import importlib.util
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = "prunepath_vllm/kernels/native"


def native_build():
    """prunepath_vllm.kernels.native.build, without importing the package, which needs torch."""
    spec = importlib.util.spec_from_file_location("native_build", Path(__file__).parent / NATIVE / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildNative(build_ext):
    """Builds the CPU kernel; where that fails, says so and goes on: the PyTorch path computes the same."""

    def build_extension(self, ext):
        """Compile with the system's compiler, by no settings of Python's."""
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            built = native_build().build(target, Path(self.build_temp) / "native")
        except RuntimeError as error:
            self.warn(f"the CPU kernel is left out: {error}")
        else:
            self.announce(f"CPU kernel for {', '.join(built)}: {target}", level=2)

    def get_ext_filename(self, ext_name):
        """Path of the library, without Python's version in its name."""
        return str(Path(*ext_name.split(".")[:-1], native_build().LIBRARY))

    def copy_extensions_to_source(self):
        """Nothing to copy into an editable installation where the build failed."""
        if Path(self.build_lib, self.get_ext_filename(self.extensions[0].name)).exists():
            super().copy_extensions_to_source()


class PlatformWheel(bdist_wheel):
    """One wheel for every Python version: the library does not know Python."""

    def get_tag(self):
        """Such as py3-none-linux_x86_64."""
        return ("py3", "none", super().get_tag()[2])


setup(
    packages=find_packages(include=["prunepath_vllm", "prunepath_vllm.*"]),
    ext_modules=[
        Extension(
            "prunepath_vllm.kernels.native.library",
            sources=[f"{NATIVE}/{name}.cpp" for name in ("processor", "routed_ffn", "selection")],
            depends=sorted(map(str, Path(NATIVE).glob("*.h"))),
        )
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
