"""Routing and routed feed-forward kernels, each beside a plain PyTorch reference. Imports torch and triton, never vllm."""
