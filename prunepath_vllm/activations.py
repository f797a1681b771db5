"""The non-linearities that every path computes, and transformers' names of them. Nothing is imported."""

from enum import StrEnum


class Activation(StrEnum):
    """A feed-forward layer's non-linearity: silu, gelu by the error function, gelu's tanh approximation, relu."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"


ACTIVATIONS = {
    "silu": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "relu": Activation.RELU,
}
"""By transformers' name; a configuration with another one is refused (fields.py)."""
