"""What a routed layer is: the description that every path takes and checks, and the named groups of its tensors.

Shapes: T tokens, H hidden size, E experts, D neurons per expert, F = E * D, or K * D where the weights of K experts
alone are there. Under tensor parallelism D is what one rank holds of every expert.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from prunepath_vllm.activations import Activation
from prunepath_vllm.errors import ConfigError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of activations and weights."""

QUANTISED_DTYPES = (torch.int8, torch.float8_e4m3fn)
"""Of weights with one float32 scale per neuron."""


_FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.SILU: F.silu,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: functools.partial(F.gelu, approximate="tanh"),
    Activation.RELU: F.relu,
}


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as checkpoints and tables name it: "bfloat16", "int8"."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class RoutingRule:
    """How a token's experts follow from its router logits (eq. 7-10, or LTE's threshold).

    Attributes:
        selection: "cumulative_mass" or "threshold".
        threshold: LTE's delta in (0, 1) with "threshold", else None.
        gate: what an active expert's output is multiplied by: "sigmoid" of its logit, or "none" for 1.
    """

    selection: str = "cumulative_mass"
    threshold: float | None = None
    gate: str = "none"

    def __post_init__(self) -> None:
        if self.selection not in ("cumulative_mass", "threshold"):
            raise ConfigError(f"selection {self.selection!r}; expected cumulative_mass or threshold")
        if self.gate not in ("sigmoid", "none"):
            raise ConfigError(f"gate {self.gate!r}; expected sigmoid or none")
        if (self.threshold is not None) != (self.selection == "threshold"):
            raise ConfigError(
                f"threshold {self.threshold} with selection {self.selection!r}; expected one with the other"
            )


@dataclass(frozen=True)
class LayerSpec:
    """One routed feed-forward layer, or the part of it that one tensor-parallel rank holds.

    Attributes:
        hidden: H.
        num_experts: E.
        expert_size: D, any number from 1 up.
        dtype: of activations, and of weights that are not quantised, one of DTYPES. Logits, gates and sums are float32
            in every path.
        activation: the non-linearity.
        glu: whether the first linear has a gate half, multiplied by its other half.
        rule: the routing rule.
        at_least: whether tau is the least that a token gets: calls that compute every expert anyway, as their number of
            tokens decides, then leave none out and select nothing. Otherwise every token gets its tau exactly.
        expert_dtype: of both linears as they are stored, one of QUANTISED_DTYPES; None for `dtype`. Tables and choices
            of tiles go by it.
        quantise_activations: whether the dense products of float8 weights may take their inputs in float8 too, with a
            scale per token, on GPUs that multiply it: faster, and as coarse as the weights are. Otherwise every path
            widens the weights, and keeps the inputs as they are.
        kept: K, the experts whose weights are there, the first K; None for all E. The others are routed like any, and
            then add nothing and count for nothing.
        resident: of those, the experts whose weights lie on the GPU, the first ones; None for all. The others are read
            from host memory: see ``host_experts``.
    """

    hidden: int
    num_experts: int
    expert_size: int
    dtype: torch.dtype
    activation: Activation = Activation.SILU
    glu: bool = True
    rule: RoutingRule = RoutingRule()
    at_least: bool = False
    expert_dtype: torch.dtype | None = None
    quantise_activations: bool = True
    kept: int | None = None
    resident: int | None = None

    def __post_init__(self) -> None:
        for name in ("hidden", "num_experts", "expert_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)}; expected at least 1")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype}; expected one of {', '.join(map(str, DTYPES))}")
        if self.expert_dtype not in (None, *QUANTISED_DTYPES):
            expected = ", ".join(map(str, QUANTISED_DTYPES))
            raise ConfigError(f"expert_dtype {self.expert_dtype}; expected None or one of {expected}")
        if self.kept is not None and not 1 <= self.kept <= self.num_experts:
            raise ConfigError(f"kept {self.kept}; expected None or 1 to {self.num_experts}, num_experts")
        if self.resident is not None and not 0 <= self.resident <= self.num_kept:
            raise ConfigError(f"resident {self.resident}; expected None or 0 to {self.num_kept}, the experts kept")

    @property
    def num_kept(self) -> int:
        """K, or E where all are kept."""
        return self.num_experts if self.kept is None else self.kept

    @property
    def num_resident(self) -> int:
        """Experts whose weights lie on the GPU."""
        return self.num_kept if self.resident is None else self.resident

    @property
    def routed(self) -> "LayerSpec":
        """What is left to compute behind the routing: a layer of the K experts that are kept."""
        return self if self.kept is None else replace(self, num_experts=self.kept, kept=None)

    @property
    def neurons(self) -> int:
        """F."""
        return self.num_kept * self.expert_size

    @property
    def input_rows(self) -> int:
        """Rows of the first linear: F, or 2 F for a GLU."""
        return self.neurons * (2 if self.glu else 1)

    @property
    def weight_bytes(self) -> int:
        """Bytes of both linears as they are stored, without biases and scales."""
        return (self.input_rows + self.neurons) * self.hidden * (self.expert_dtype or self.dtype).itemsize

    def activate(self, x: Tensor) -> Tensor:
        """The non-linearity in PyTorch, in x's dtype."""
        return _FUNCTIONS[self.activation](x)

    def encode(self) -> str:
        """As a string, which a custom op takes where it takes no object; :meth:`decode` is the inverse."""
        values = {**vars(self), "rule": vars(self.rule)}
        for name in ("dtype", "expert_dtype"):
            values[name] = values[name] and dtype_name(values[name])
        return json.dumps(values)

    @staticmethod
    @functools.cache
    def decode(text: str) -> "LayerSpec":
        """The inverse of :meth:`encode`."""
        values = json.loads(text)
        for name in ("dtype", "expert_dtype"):
            values[name] = values[name] and getattr(torch, values[name])
        values["activation"] = Activation(values["activation"])
        return LayerSpec(**{**values, "rule": RoutingRule(**values["rule"])})

    def check(
        self,
        x: Tensor,
        tau: Tensor,
        router: "RouterWeights",
        weights: "Weights",
        router_input: Tensor | None = None,
    ) -> None:
        """Refuse tensors that are not this layer's: a kernel given others would read beside them.

        Raises:
            ConfigError: names the tensor, its shape or dtype, and what was expected.
        """
        tokens, hidden = x.shape[0], self.hidden
        rank = hidden if router.down is None else router.down.shape[0]
        expected: tuple[tuple[str, Tensor | None, tuple[int, ...]], ...] = (
            ("x", x, (tokens, hidden)),
            ("tau", tau, (tokens,)),
            ("router input", router_input, (tokens, hidden)),
            ("router down weight", router.down, (rank, hidden)),
            ("router weight", router.weight, (self.num_experts, rank)),
            ("router bias", router.bias, (self.num_experts,)),
            ("first linear", weights.w_in, (self.input_rows, hidden)),
            ("bias of the first linear", weights.b_in, (self.input_rows,)),
            ("second linear, transposed", weights.w_out_t, (self.neurons, hidden)),
            ("bias of the second linear", weights.b_out, (hidden,)),
            ("scales of the first linear", weights.scale_in, (self.input_rows,)),
            ("scales of the second linear", weights.scale_out, (self.neurons,)),
        )
        for name, tensor, shape in expected:
            if tensor is not None and tensor.shape != shape:
                raise ConfigError(f"{name}: shape {list(tensor.shape)}; expected {list(shape)}")
        quantised = weights.scale_in is not None and weights.scale_out is not None
        stored = weights.w_in.dtype
        if quantised and stored in QUANTISED_DTYPES:
            expected_dtype = self.expert_dtype or stored
            if x.dtype != self.dtype or not stored == weights.w_out_t.dtype == expected_dtype:
                found = f"{x.dtype}, {stored} and {weights.w_out_t.dtype}"
                wanted = f"{self.dtype}, {expected_dtype} and {expected_dtype}"
                raise ConfigError(f"x and both linears: {found}; expected {wanted}")
        elif quantised or self.expert_dtype is not None or not x.dtype == stored == weights.w_out_t.dtype == self.dtype:
            found = f"{x.dtype}, {stored} and {weights.w_out_t.dtype}"
            raise ConfigError(
                f"x and both linears: {found} {'with' if quantised else 'without'} scales; expected {self.dtype}, or "
                f"linears in {' or '.join(map(str, QUANTISED_DTYPES))} with scales"
            )


@dataclass(frozen=True)
class RouterWeights:
    """What router logits are made of, contiguous.

    Attributes:
        weight: [E, H], or [E, r] with `down`, which a GPU's kernels read in float32: of another dtype every call makes
            a copy.
        bias: [E] or None.
        down: [r, H] or None: logits = (x down^T) weight^T + bias, the r values in float32.
    """

    weight: Tensor
    bias: Tensor | None = None
    down: Tensor | None = None


@dataclass(frozen=True)
class Weights:
    """One layer's feed-forward weights, in the layout every kernel reads, contiguous.

    Attributes:
        w_in: [F, H], or [2 F, H] with the gate rows first for a GLU.
        b_in: [F] or [2 F], or None.
        w_out_t: [F, H], the second linear transposed: expert e is the rows [e D, (e + 1) D).
        b_out: [H], or None. Added once, never gated.
        scale_in: float32, one for each row of w_in, which is multiplied by it: with quantised weights; else None.
        scale_out: float32 [F], likewise for w_out_t.
        w_up: [F, H] where the rows that follow the gate's are a tensor of their own, w_in being the gate's; else None.
            The native kernel alone takes it.
        scale_up: float32 [F] with quantised weights and w_up.
    """

    w_in: Tensor
    b_in: Tensor | None
    w_out_t: Tensor
    b_out: Tensor | None
    scale_in: Tensor | None = None
    scale_out: Tensor | None = None
    w_up: Tensor | None = None
    scale_up: Tensor | None = None

    @property
    def quantised(self) -> bool:
        """Whether both linears are in one of QUANTISED_DTYPES, with scales."""
        return self.scale_in is not None


def dequantise(rows: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows in `dtype`, [n, H], of quantised ones and their scales, float32 [n]; `rows` itself where there are none."""
    return rows if scale is None else rows.to(torch.float32).mul_(scale[:, None]).to(dtype)


@dataclass(frozen=True)
class Counters:
    """Where a call adds what it did; None where nobody counts.

    Attributes:
        active: int32 [T]; each token's number of active experts.
        read: int32 or int64 [1]; the number of experts whose weights were read: those that some token uses, or all
            where a dense product computes them. [2] where the layer has ``resident``: the second entry counts those of
            them that lie in host memory.
        full: int64 scalar or [1]; calls on a CPU that read every expert.
    """

    active: Tensor | None = None
    read: Tensor | None = None
    full: Tensor | None = None

    def add_reads(self, experts: int, num_experts: int) -> None:
        """Count a call that read the weights of `experts` of E."""
        if self.read is not None:
            self.read.add_(experts)
        if self.full is not None and experts == num_experts:
            self.full.add_(1)


NO_COUNTERS = Counters()
