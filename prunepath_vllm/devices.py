"""The device a command computes on."""

import torch

from prunepath_vllm.errors import UsageError


def check_device(device: str) -> None:
    """Refuse a GPU that is not there.

    Raises:
        UsageError: `device` is a CUDA device and none is visible.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device: {device!r}, but no CUDA GPU is visible; expected 'cpu'")
