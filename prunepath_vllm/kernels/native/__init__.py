"""The routed feed-forward layer on a CPU in C++: only the listed experts' weights are read, in place.

Same function as ``kernels.cpu.routed_ffn``. The library is loaded by ctypes; its threads are those of PyTorch's OpenMP.
Shapes: T tokens, H hidden size, E experts, D neurons per expert, F = E * D.
"""

import ctypes
import functools
import os
from collections.abc import Callable

import torch
from torch import Tensor

from prunepath_vllm.activations import Activation
from prunepath_vllm.errors import ConfigError
from prunepath_vllm.kernels.layer import (
    DTYPES,
    NO_COUNTERS,
    QUANTISED_DTYPES,
    Counters,
    LayerSpec,
    RouterWeights,
    Weights,
    dtype_name,
)
from prunepath_vllm.kernels.native.build import LIBRARY, SOURCES, X86_FLAGS

ISA_VARIABLE = "PRUNEPATH_CPU_ISA"
"""Environment variable: the instruction set to use, one of :func:`isas`."""

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3, torch.float8_e4m3fn: 4}
_ACTIVATIONS = {Activation.SILU: 0, Activation.GELU: 1, Activation.GELU_TANH: 2, Activation.RELU: 3}
_PARAMETERS = {
    "routed_ffn": [ctypes.c_void_p],
    "select": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p],
}
_POINTERS = (
    "x router_input tau y router_weight router_down router_bias w_in w_up w_out b_in b_out scale_in scale_up scale_out"
)


class _Arguments(ctypes.Structure):
    """``Arguments`` of interface.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*_POINTERS.split(), "active_counts", "experts_read", "full_reads")),
        *((name, ctypes.c_int64) for name in ("tokens", "hidden", "experts", "kept", "expert_size", "rank")),
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


def chosen_isa() -> str:
    """The one of :func:`isas` that layers use unless told otherwise: $PRUNEPATH_CPU_ISA, or the fastest."""
    return os.environ.get(ISA_VARIABLE) or isas()[0]


@functools.cache
def _function(isa: str | None, kernel: str = "routed_ffn") -> "ctypes._NamedFuncPointer":
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(library)
    name = isa or chosen_isa()
    if name not in isas():
        source = "isa" if isa else ISA_VARIABLE
        raise ConfigError(f"{source} is {name!r}; expected one that this processor has, {', '.join(isas())}")
    function = getattr(library, f"prunepath_{kernel}_{name}")
    function.argtypes = _PARAMETERS[kernel]
    return function


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.shape != shape or tensor.dtype not in dtypes or not tensor.is_contiguous() or tensor.device.type != "cpu":
        expected = " or ".join(map(dtype_name, dtypes))
        dtype = dtype_name(tensor.dtype)
        layout = "" if tensor.is_contiguous() else ", not contiguous"
        raise ConfigError(
            f"{name} is {list(tensor.shape)} {dtype} on {tensor.device}{layout}; "
            f"expected {list(shape)} {expected}, contiguous, on a CPU"
        )


class RoutedFFN:
    """A layer made ready: its weights are checked once, and a call passes what differs from step to step.

    It points into the weights and does not keep them alive: that is for who made it.

    Args:
        router: the router, each tensor in any float dtype.
        weights: of `spec`'s dtype; or the linears in one of QUANTISED_DTYPES, with scales.
        spec: the layer.
        isa: one of :func:`isas`; the default is $PRUNEPATH_CPU_ISA, or the fastest.

    Raises:
        ConfigError: a tensor of another shape or dtype, not contiguous or not on a CPU; an instruction set that is not
            there.
        RuntimeError: the kernel is :func:`unavailable`.
    """

    def __init__(
        self,
        router: RouterWeights,
        weights: Weights,
        spec: LayerSpec,
        *,
        isa: str | None = None,
    ) -> None:
        self._run = _function(isa)
        self.spec = spec
        hidden, experts = spec.hidden, spec.num_experts
        rank = router.weight.shape[1] if router.down is not None else 0
        quantised = weights.w_out_t.dtype in QUANTISED_DTYPES
        stored = (weights.w_out_t.dtype if quantised else spec.dtype,)
        input_rows = spec.input_rows if weights.w_up is None else spec.neurons
        _check("second linear, transposed", weights.w_out_t, (spec.neurons, hidden), stored)
        first = "first linear" if weights.w_up is None else "first linear's gate"
        _check(first, weights.w_in, (input_rows, hidden), stored)
        if weights.w_up is not None:
            _check("first linear's other half", weights.w_up, (spec.neurons, hidden), stored)
        _check("router weight", router.weight, (experts, rank or hidden), DTYPES)
        optional = {
            "router_down": (router.down, (rank, hidden), DTYPES),
            "router_bias": (router.bias, (experts,), DTYPES),
            "b_in": (weights.b_in, (spec.input_rows,), DTYPES),
            "b_out": (weights.b_out, (hidden,), DTYPES),
            "scale_in": (weights.scale_in, (input_rows,), (torch.float32,)),
            "scale_up": (weights.scale_up, (spec.neurons,), (torch.float32,)),
            "scale_out": (weights.scale_out, (spec.neurons,), (torch.float32,)),
        }
        scales = [weights.scale_in, weights.scale_out, *([] if weights.w_up is None else [weights.scale_up])]
        if any((scale is not None) != quantised for scale in scales):
            found = f"{str(stored[0]).removeprefix('torch.')} {'without' if quantised else 'with'}"
            raise ConfigError(
                f"weights are {found} scale_in and scale_out; expected one scale per row of quantised weights alone"
            )
        self._arguments = _Arguments(
            router_weight=router.weight.data_ptr(),
            router_weight_type=_TYPES[router.weight.dtype],
            w_in=weights.w_in.data_ptr(),
            w_up=(weights.w_in[spec.neurons :] if weights.w_up is None else weights.w_up).data_ptr(),
            w_out=weights.w_out_t.data_ptr(),
            weight_type=_TYPES[weights.w_in.dtype],
            x_type=_TYPES[spec.dtype],
            hidden=hidden,
            experts=experts,
            kept=spec.num_kept,
            expert_size=spec.expert_size,
            rank=rank,
            activation=_ACTIVATIONS[spec.activation],
            glu=spec.glu,
            by_threshold=spec.rule.selection == "threshold",
            sigmoid_gate=spec.rule.gate == "sigmoid",
            threshold=spec.rule.threshold or 0.0,
        )
        for name, (tensor, shape, dtypes) in optional.items():
            if tensor is not None:
                _check(name, tensor, shape, dtypes)
                setattr(self._arguments, name, tensor.data_ptr())
                if not name.startswith("scale"):
                    setattr(self._arguments, f"{name}_type", _TYPES[tensor.dtype])
        if weights.scale_in is not None and weights.w_up is None and spec.glu:
            self._arguments.scale_up = weights.scale_in[spec.neurons :].data_ptr()

    def __call__(
        self,
        x: Tensor,
        tau: Tensor,
        *,
        router_input: Tensor | None = None,
        counters: Counters = NO_COUNTERS,
        num_threads: int | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The layer on some tokens; see :func:`routed_ffn`. Any number of Python threads may call at once.

        Args:
            out: where to write the result, as `x`; the default is a new tensor.
        """
        arguments = _Arguments.from_buffer_copy(self._arguments)
        shape = (x.shape[0], self.spec.hidden)
        _check("x", x, shape, (self.spec.dtype,))
        _check("tau", tau, shape[:1], (torch.float32,))
        if router_input is None:
            router_input = x
        else:
            _check("router_input", router_input, shape, DTYPES)
        if out is None:
            out = torch.empty_like(x)
        else:
            _check("out", out, shape, (x.dtype,))
        arguments.router_input, arguments.router_input_type = router_input.data_ptr(), _TYPES[router_input.dtype]
        arguments.threads = num_threads or 0
        _read_and_count(arguments, tau, counters)
        return self._call(arguments, x, out)

    def on_buffers(self, tau: Tensor, counters: Counters) -> Callable[[Tensor, Tensor], Tensor]:
        """The layer as a function of x and the router's input, both [T, H] in the layer's dtype.

        Its calls check and make less than :meth:`__call__` does.

        Args:
            tau: float32 [N], N >= T; token t reads entry t. A buffer that stays where it is.
            counters: likewise; `active` is [N].
        """
        most, hidden, dtype = len(tau), self.spec.hidden, self.spec.dtype
        prepared = _Arguments.from_buffer_copy(self._arguments)
        _check("tau", tau, (most,), (torch.float32,))
        _read_and_count(prepared, tau, counters)
        prepared.router_input_type = _TYPES[self.spec.dtype]

        def call(x: Tensor, router_input: Tensor) -> Tensor:
            for name, one in (("x", x), ("router_input", router_input)):
                if len(one) > most or one.shape != (len(x), hidden) or one.dtype != dtype or not one.is_contiguous():
                    _check(name, one, (min(len(x), most), hidden), (dtype,))
            arguments = _Arguments.from_buffer_copy(prepared)
            arguments.router_input = router_input.data_ptr()
            return self._call(arguments, x, torch.empty_like(x))

        return call

    def _call(self, arguments: _Arguments, x: Tensor, out: Tensor) -> Tensor:
        arguments.x, arguments.y, arguments.tokens = x.data_ptr(), out.data_ptr(), len(x)
        if self._run(ctypes.byref(arguments)):
            raise MemoryError("routed_ffn: no memory for the layer's activations")
        return out


def _read_and_count(arguments: _Arguments, tau: Tensor, counters: Counters) -> None:
    """Point `arguments` at what a call reads besides x, and at what it adds to."""
    arguments.tau = tau.data_ptr()
    if counters.active is not None:
        _check("active counts", counters.active, tau.shape, (torch.int32,))
        arguments.active_counts = counters.active.data_ptr()
    if (read := counters.read) is not None:
        _check("experts read", read, (1,), (torch.int32, torch.int64))
        arguments.experts_read, arguments.experts_read_bytes = read.data_ptr(), read.element_size()
    if (full := counters.full) is not None:
        _check("full reads", full.view(-1), (1,), (torch.int64,))
        arguments.full_reads = full.data_ptr()


_made: dict[tuple, RoutedFFN] = {}


def ready(router: RouterWeights, weights: Weights, spec: LayerSpec) -> RoutedFFN:
    """The :class:`RoutedFFN` of these tensors, made at the first call.

    It is found again by where the tensors lie and what they are, which is all that it knows of them.
    """
    tensors = (router.weight, router.bias, router.down, *vars(weights).values())
    rank = router.weight.shape[1]  # the one size that the spec does not tell
    key = (spec, rank, *(None if one is None else (one.data_ptr(), one.dtype) for one in tensors))
    layer = _made.get(key)
    if layer is None:
        layer = _made[key] = RoutedFFN(router, weights, spec)
    return layer


def select_cumulative_mass(logits: Tensor, tau: Tensor, *, isa: str | None = None) -> Tensor:
    """Eq. 8-9 as the kernel selects, without a sort: the same experts that it takes of equal logits.

    Args:
        logits: float32 [T, E], contiguous.
        tau: float32 [T]; 0 marks a padding row, which has no active expert.
        isa: as for :class:`RoutedFFN`.

    Returns:
        bool [T, E].
    """
    tokens, experts = logits.shape
    _check("logits", logits, (tokens, experts), (torch.float32,))
    _check("tau", tau, (tokens,), (torch.float32,))
    active = torch.empty(tokens, experts, dtype=torch.bool)
    if _function(isa, "select")(logits.data_ptr(), tau.data_ptr(), tokens, experts, active.data_ptr()):
        raise MemoryError("select_cumulative_mass: no memory for a row of logits per thread")
    return active


def routed_ffn(
    x: Tensor,
    tau: Tensor,
    router: RouterWeights,
    weights: Weights,
    spec: LayerSpec,
    *,
    router_input: Tensor | None = None,
    counters: Counters = NO_COUNTERS,
    num_threads: int | None = None,
    isa: str | None = None,
) -> Tensor:
    """Eq. 7-10: route every token, run its experts, add the output bias once. All sums are float32.

    A token's result depends neither on the number of threads nor on the other tokens. Each expert is read once per 16
    tokens.

    Args:
        x: [T, H], in the layer's dtype.
        tau: float32 [T]; 0 marks a padding row, which gets the output bias alone.
        router, weights, spec: the layer; see :class:`RoutedFFN`, also for the arguments that are not told here.
        router_input: [T, H] in any float dtype; what the router reads, or None for `x`.
        counters: what the call adds to; experts read are those that any token chose.
        num_threads: at most so many threads compute; the default is OpenMP's own number.

    Returns:
        [T, H] in the dtype of `x`.
    """
    layer = RoutedFFN(router, weights, spec, isa=isa)
    return layer(x, tau, router_input=router_input, counters=counters, num_threads=num_threads)
