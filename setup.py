"""Build file. Only prunepath_vllm/ is packaged: `kernels` and `model_executor` in the root are links for readers."""

from setuptools import find_packages, setup

setup(packages=find_packages(include=["prunepath_vllm", "prunepath_vllm.*"]))
