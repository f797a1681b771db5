"""Routing and routed feed-forward kernels, each beside a plain PyTorch reference. No vLLM in here."""
