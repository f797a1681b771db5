"""Build file: the links `kernels` and `model_executor` in the root are for readers; only prunepath_vllm/ is packaged."""

from setuptools import find_packages, setup

setup(packages=find_packages(include=["prunepath_vllm", "prunepath_vllm.*"]))
