"""The routed feed-forward layer on a CPU in C++: only the listed experts' weights are read, in place.

Same function as ``kernels.cpu.routed_ffn``. The library is loaded by ctypes; its threads are those of PyTorch's OpenMP.
Shapes: T tokens, H hidden size, E experts, D neurons per expert, F = E * D.
"""

import ctypes
import functools
import os
from typing import NamedTuple

import torch
from torch import Tensor

from prunepath_vllm.kernels.native.build import LIBRARY, SOURCES, X86_FLAGS
from prunepath_vllm.kernels.weights import Weights

ISA_VARIABLE = "PRUNEPATH_CPU_ISA"
"""Environment variable: the instruction set to use, one of :func:`isas`."""

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2, "relu": 3}
_POINTERS = "x router_input tau y router_weight router_down router_bias w_in w_out b_in b_out scale_in scale_out"


class _Arguments(ctypes.Structure):
    """``Arguments`` of interface.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*_POINTERS.split(), "active_counts", "experts_read")),
        *((name, ctypes.c_int64) for name in ("tokens", "hidden", "experts", "expert_size", "rank")),
        *(
            (f"{name}_type", ctypes.c_int32)
            for name in ("x", "router_input", "router_weight", "router_down", "router_bias", "weight", "b_in", "b_out")
        ),
        *(
            (name, ctypes.c_int32)
            for name in ("experts_read_bytes", "activation", "glu", "by_threshold", "sigmoid_gate")
        ),
        ("threshold", ctypes.c_float),
        ("threads", ctypes.c_int32),
    )


class Router(NamedTuple):
    """A layer's router, each tensor in any float dtype.

    Attributes:
        weight: [E, H], or [E, r] with `down`.
        down: [r, H] or None: logits = (x down^T) weight^T + bias.
        bias: [E] or None.
    """

    weight: Tensor
    down: Tensor | None = None
    bias: Tensor | None = None


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The loaded library, or why there is none."""
    path = SOURCES / LIBRARY
    if not path.exists():
        return f"{LIBRARY} was not built: no C++ compiler was found at installation, or it failed"
    try:
        library = ctypes.CDLL(str(path))  # after torch, whose OpenMP runtime it finds
    except OSError as error:
        return f"{LIBRARY} cannot be loaded: {error}"
    library.prunepath_processor_runs.argtypes = [ctypes.c_char_p]
    return library


def unavailable() -> str | None:
    """Why the kernel cannot be used here; None if it can."""
    library = _library()
    return library if isinstance(library, str) else None


@functools.cache
def isas() -> tuple[str, ...]:
    """The instruction sets that were built and that this processor runs, the fastest first; the last is "plain"."""
    library = _library()
    if isinstance(library, str):
        return ()
    return tuple(
        isa
        for isa in (*X86_FLAGS, "plain")
        if hasattr(library, f"prunepath_routed_ffn_{isa}") and library.prunepath_processor_runs(isa.encode())
    )


@functools.cache
def _function(isa: str | None) -> "ctypes._NamedFuncPointer":
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(library)
    name = isa or os.environ.get(ISA_VARIABLE) or isas()[0]
    if name not in isas():
        source = "isa" if isa else ISA_VARIABLE
        raise ValueError(f"{source} is {name!r}, but this installation on this processor has {', '.join(isas())}")
    function = getattr(library, f"prunepath_routed_ffn_{name}")
    function.argtypes = [ctypes.c_void_p]
    return function


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.shape != shape or tensor.dtype not in dtypes or not tensor.is_contiguous() or tensor.device.type != "cpu":
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        dtype = str(tensor.dtype).removeprefix("torch.")
        layout = "" if tensor.is_contiguous() else ", not contiguous"
        raise ValueError(
            f"{name} is {list(tensor.shape)} {dtype} on {tensor.device}{layout}, "
            f"expected {list(shape)} {expected}, contiguous, on a CPU"
        )


class RoutedFFN:
    """A layer made ready: its weights are checked once, and a call passes what differs from step to step.

    Args:
        router: the router.
        weights: the layer's weights in one dtype: float32, float16, bfloat16; or w_in and w_out_t in int8, with scales.
        selection: "cumulative_mass" or "threshold".
        threshold: LTE's delta, with "threshold".
        gate: "sigmoid" or "none".
        scale_in: float32 [F], or [2 F] with a GLU, or None: what each row of w_in is multiplied by.
        scale_out: float32 [F] or None: the same for w_out_t.
        isa: one of :func:`isas`; the default is $PRUNEPATH_CPU_ISA, or the fastest.

    Raises:
        ValueError: a tensor of another shape or dtype, not contiguous or not on a CPU; an unknown name.
        RuntimeError: the kernel is :func:`unavailable`.
    """

    def __init__(
        self,
        router: Router,
        weights: Weights,
        *,
        selection: str,
        threshold: float | None,
        gate: str,
        scale_in: Tensor | None = None,
        scale_out: Tensor | None = None,
        isa: str | None = None,
    ) -> None:
        self._run = _function(isa)
        if selection not in ("cumulative_mass", "threshold") or (selection == "threshold") != (threshold is not None):
            raise ValueError(
                f"selection is {selection!r} with threshold {threshold}, "
                "expected 'cumulative_mass' with None or 'threshold' with a number"
            )
        if gate not in ("sigmoid", "none"):
            raise ValueError(f"gate is {gate!r}, expected 'sigmoid' or 'none'")
        if weights.activation not in _ACTIVATIONS:
            raise ValueError(f"activation is {weights.activation!r}, expected one of {', '.join(_ACTIVATIONS)}")
        neurons, hidden = weights.w_out_t.shape
        experts = router.weight.shape[0]
        if experts == 0 or neurons == 0 or neurons % experts:
            raise ValueError(f"w_out_t has {neurons} rows, expected a multiple of the router's {experts} experts")
        rows = 2 * neurons if weights.glu else neurons
        rank = router.weight.shape[1] if router.down is not None else 0
        stored = (weights.w_out_t.dtype,) if weights.w_out_t.dtype in _TYPES else (*_FLOATS, torch.int8)
        _check("w_out_t", weights.w_out_t, (neurons, hidden), stored)
        _check("w_in", weights.w_in, (rows, hidden), stored)
        _check("router weight", router.weight, (experts, rank or hidden), _FLOATS)
        optional = {
            "router_down": (router.down, (rank, hidden), _FLOATS),
            "router_bias": (router.bias, (experts,), _FLOATS),
            "b_in": (weights.b_in, (rows,), _FLOATS),
            "b_out": (weights.b_out, (hidden,), _FLOATS),
            "scale_in": (scale_in, (rows,), (torch.float32,)),
            "scale_out": (scale_out, (neurons,), (torch.float32,)),
        }
        if stored == (torch.int8,) and (scale_in is None or scale_out is None):
            raise ValueError("weights are int8 without scale_in and scale_out, expected one scale per row")
        self._arguments = _Arguments(
            router_weight=router.weight.data_ptr(),
            router_weight_type=_TYPES[router.weight.dtype],
            w_in=weights.w_in.data_ptr(),
            w_out=weights.w_out_t.data_ptr(),
            weight_type=_TYPES[weights.w_in.dtype],
            hidden=hidden,
            experts=experts,
            expert_size=neurons // experts,
            rank=rank,
            activation=_ACTIVATIONS[weights.activation],
            glu=weights.glu,
            by_threshold=selection == "threshold",
            sigmoid_gate=gate == "sigmoid",
            threshold=threshold or 0.0,
        )
        for name, (tensor, shape, dtypes) in optional.items():
            if tensor is not None:
                _check(name, tensor, shape, dtypes)
                setattr(self._arguments, name, tensor.data_ptr())
                if not name.startswith("scale"):
                    setattr(self._arguments, f"{name}_type", _TYPES[tensor.dtype])
        self._tensors = (router, weights, scale_in, scale_out)  # kept alive: the arguments point into them

    def __call__(
        self,
        x: Tensor,
        tau: Tensor,
        *,
        router_input: Tensor | None = None,
        active_counts: Tensor | None = None,
        experts_read: Tensor | None = None,
        num_threads: int | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The layer on some tokens; see :func:`routed_ffn`. Any number of Python threads may call at once.

        Args:
            out: where to write the result, as `x`; the default is a new tensor.
        """
        arguments = _Arguments.from_buffer_copy(self._arguments)
        shape = (x.shape[0], arguments.hidden)
        _check("x", x, shape, _FLOATS)
        _check("tau", tau, shape[:1], (torch.float32,))
        if router_input is None:
            router_input = x
        else:
            _check("router_input", router_input, shape, _FLOATS)
        if out is None:
            out = torch.empty_like(x)
        else:
            _check("out", out, shape, (x.dtype,))
        arguments.x, arguments.x_type = x.data_ptr(), _TYPES[x.dtype]
        arguments.router_input, arguments.router_input_type = router_input.data_ptr(), _TYPES[router_input.dtype]
        arguments.tau, arguments.y, arguments.tokens = tau.data_ptr(), out.data_ptr(), shape[0]
        if active_counts is not None:
            _check("active_counts", active_counts, shape[:1], (torch.int32,))
            arguments.active_counts = active_counts.data_ptr()
        if experts_read is not None:
            _check("experts_read", experts_read, (1,), (torch.int32, torch.int64))
            arguments.experts_read, arguments.experts_read_bytes = experts_read.data_ptr(), experts_read.element_size()
        arguments.threads = num_threads or 0
        if self._run(ctypes.byref(arguments)):
            raise MemoryError("routed_ffn: no memory for the layer's activations")
        return out


def routed_ffn(
    x: Tensor,
    router_input: Tensor,
    tau: Tensor,
    router: Router,
    weights: Weights,
    *,
    selection: str,
    threshold: float | None,
    gate: str,
    scale_in: Tensor | None = None,
    scale_out: Tensor | None = None,
    active_counts: Tensor | None = None,
    experts_read: Tensor | None = None,
    num_threads: int | None = None,
    isa: str | None = None,
) -> Tensor:
    """Eq. 7-10: route every token, run its experts, add the output bias once. All sums are float32.

    A token's result depends neither on the number of threads nor on the other tokens. Each expert is read once per 16
    tokens.

    Args:
        x: [T, H], float32, float16 or bfloat16.
        router_input: [T, H] in any of these; what the router reads, `x` itself in most models.
        tau: float32 [T]; 0 marks a padding row, which gets the output bias alone.
        router: the router.
        weights: the layer's weights; see :class:`RoutedFFN`, also for the arguments that are not told here.
        active_counts: int32 [T] or None; each token's number of active experts is added to it.
        experts_read: int32 or int64 [1], or None; the number of experts that any token chose is added to it.
        num_threads: at most so many threads compute; the default is OpenMP's own number.

    Returns:
        [T, H] in the dtype of `x`.
    """
    layer = RoutedFFN(
        Router(*router),
        weights,
        selection=selection,
        threshold=threshold,
        gate=gate,
        scale_in=scale_in,
        scale_out=scale_out,
        isa=isa,
    )
    return layer(
        x,
        tau,
        router_input=router_input,
        active_counts=active_counts,
        experts_read=experts_read,
        num_threads=num_threads,
    )
