"""The routed feed-forward layer as vLLM sees it: expert-aware parameters, and one opaque custom op for all families.

Shapes: T tokens, H hidden size, E experts of which K have weights, D neurons per expert on this rank, F = K * D.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.library import Library
from vllm.config import CUDAGraphMode
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.utils import set_weight_attrs
from vllm.utils.torch_utils import direct_register_custom_op

from prunepath_vllm.activations import ACTIVATIONS
from prunepath_vllm.config import PrunePathConfig
from prunepath_vllm.errors import ConfigError, UnsupportedFeatureError
from prunepath_vllm.families import family_of
from prunepath_vllm.kernels import cpu, native
from prunepath_vllm.kernels.host_experts import HostExperts
from prunepath_vllm.kernels.layer import Counters, LayerSpec, RouterWeights, RoutingRule, Weights
from prunepath_vllm.kernels.native import memory
from prunepath_vllm.model_executor.compat import VllmConfig

logger = init_logger("vllm.prunepath")


class _ExpertShard:
    """Which neurons this tensor-parallel rank holds: the same slice of every expert, so ranks stay balanced."""

    def __init__(self, prunepath: PrunePathConfig, layer: int) -> None:
        self.rank = get_tensor_model_parallel_rank()
        self.world = get_tensor_model_parallel_world_size()
        self.num_experts = prunepath.kept(layer)  # those that have weights
        if prunepath.expert_size % self.world:
            raise UnsupportedFeatureError(
                f"tensor_parallel_size {self.world} does not divide expert_size {prunepath.expert_size}; "
                "every rank holds an equal slice of every expert"
            )
        self.expert_size = prunepath.expert_size // self.world
        self.neurons = self.num_experts * self.expert_size
        self.order = prunepath.order_by_use(layer)
        self.stored = prunepath.expert_dtype

    def rows(self, weight: Tensor) -> Tensor:
        """The rank's rows of a [d_ff, ...] tensor, the most used experts first."""
        if self.world == 1 and self.order is None:
            return weight
        experts = weight.unflatten(0, (self.num_experts, -1))
        if self.order is not None:
            experts = experts[self.order[: self.num_experts]]  # those kept come first in it
        return experts.narrow(1, self.rank * self.expert_size, self.expert_size).flatten(0, 1)

    def weight(
        self, hidden_size: int, host: HostExperts | None, *, parts: int = 1, first: Tensor | None = None
    ) -> tuple[nn.Parameter, nn.Parameter | None]:
        """An uninitialised [parts * F, H] weight in the checkpoint's dtype, and its scales where it is quantised.

        Args:
            hidden_size: H.
            host: where some of the model's experts lie, or None.
            parts: of the rows, each of F.
            first: the layer's first weight, for its second.
        """
        stored, rows = self.stored, parts * self.neurons
        dtype = torch.get_default_dtype() if stored is None else getattr(torch, stored)
        if host is not None:
            resident = host.resident(self.num_experts) * self.expert_size
            weight = host.empty((rows, hidden_size), dtype, parts=parts, resident_rows=resident, first=first)
        elif torch.get_default_device().type == "cpu":
            weight = memory.empty(rows, hidden_size, dtype=dtype)
        else:
            weight = torch.empty(rows, hidden_size, dtype=dtype)
        scales = None if stored is None else nn.Parameter(torch.empty(rows, dtype=torch.float32), requires_grad=False)
        return nn.Parameter(weight, requires_grad=False), scales


class ExpertRouter(nn.Module):
    """Router weights, replicated on every rank. A checkpoint without router biases leaves the bias zero.

    A GPU's kernels read the second factor of a low rank in float32: it is kept so there, in this one copy, rather than
    widened at every step. The CPU kernel widens what it reads in registers.

    Attributes:
        routes_by_attention: whether its input is that of the block's self-attention, not the feed-forward layer's.
    """

    def __init__(self, hidden_size: int, prunepath: PrunePathConfig, layer: int) -> None:
        super().__init__()
        self._order = prunepath.order_by_use(layer)
        rank = prunepath.router.rank
        self.routes_by_attention = prunepath.router.input == "attention"
        wide = rank is not None and torch.get_default_device().type != "cpu"
        dtype = torch.float32 if wide else torch.get_default_dtype()
        weight = torch.empty(prunepath.num_experts, rank or hidden_size, dtype=dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.down = None if rank is None else nn.Linear(hidden_size, rank, bias=False).requires_grad_(False)
        self.bias = nn.Parameter(torch.zeros(prunepath.num_experts), requires_grad=False)
        for parameter in (self.weight, self.bias):
            set_weight_attrs(parameter, {"weight_loader": self._load})

    def _load(self, param: nn.Parameter, loaded: Tensor) -> None:
        """Copy the rows of all experts, in the order of their weights."""
        param.data.copy_(loaded if self._order is None else loaded[self._order])

    def tensors(self) -> list[Tensor | None]:
        """The fields of a ``RouterWeights``, in order."""
        return [self.weight, self.bias, None if self.down is None else self.down.weight]


class ExpertInputs(nn.Module):
    """The first linears: rows are neurons. GLU families stack gate rows above up rows, as vLLM's merged linear does."""

    def __init__(
        self,
        hidden_size: int,
        prunepath: PrunePathConfig,
        layer: int,
        *,
        glu: bool,
        bias: bool,
        host: HostExperts | None = None,
    ) -> None:
        super().__init__()
        self._shard = _ExpertShard(prunepath, layer)
        self._glu = glu
        parts = 2 if glu else 1
        rows = self._shard.neurons * parts
        self.weight, self.weight_scale = self._shard.weight(hidden_size, host, parts=parts)
        for parameter in (self.weight, self.weight_scale):
            if parameter is not None:
                set_weight_attrs(parameter, {"weight_loader": self._load})
        self.bias = nn.Parameter(torch.empty(rows), requires_grad=False) if bias else None
        if self.bias is not None:
            set_weight_attrs(self.bias, {"weight_loader": self._load})

    def _load(self, param: nn.Parameter, loaded: Any) -> None:
        """Copy one dense tensor. vLLM's weight mapper marks gate and up with shard_id 0 and 1.

        vLLM binds the parameter of every weight loader by the name ``param`` when it loads weights again.
        """
        start = loaded.shard_id * self._shard.neurons if self._glu else 0
        param.data[start : start + self._shard.neurons].copy_(self._shard.rows(loaded))


class ExpertOutputs(nn.Module):
    """The second linear, kept transposed: row i is what neuron i adds to the output, so experts are contiguous.

    With `host` it takes the layer's `inputs`.
    """

    def __init__(
        self,
        hidden_size: int,
        prunepath: PrunePathConfig,
        layer: int,
        *,
        bias: bool,
        host: HostExperts | None = None,
        inputs: ExpertInputs | None = None,
    ) -> None:
        super().__init__()
        self._shard = _ExpertShard(prunepath, layer)
        first = None if inputs is None else inputs.weight
        self.weight, self.weight_scale = self._shard.weight(hidden_size, host, first=first)
        set_weight_attrs(self.weight, {"weight_loader": self._load_weight})
        if self.weight_scale is not None:
            set_weight_attrs(self.weight_scale, {"weight_loader": self._load_weight})
        self.bias = nn.Parameter(torch.empty(hidden_size), requires_grad=False) if bias else None
        if self.bias is not None:
            set_weight_attrs(self.bias, {"weight_loader": self._load_bias})

    def _load_weight(self, param: nn.Parameter, loaded: Tensor) -> None:
        """Copy the dense [H, d_ff] weight, or its [d_ff] scales."""
        param.data.copy_(self._shard.rows(loaded.t()))

    def _load_bias(self, param: nn.Parameter, loaded: Tensor) -> None:
        """The output bias belongs to no expert: one rank adds it before the all-reduce."""
        param.data.copy_(loaded if self._shard.rank == 0 else torch.zeros_like(loaded))


@dataclass(frozen=True)
class StepState:
    """What one layer reads and counts of an engine step, at fixed addresses that captured graphs may use.

    Attributes:
        tau: float32 [max_num_batched_tokens]; entry t is the tau of the step's token t.
        dense_step: bool scalar on the host, True where every token of the step uses every expert.
        active_counts: int32 [max_num_batched_tokens]; each token's active experts are added to it.
        experts_read: int64 [1], or [2] with experts on the host; a call counts as ``Counters.read`` says.
        dense_runs: int64 scalar on the host; a call that takes the dense product adds 1, on a CPU alone: see
            :func:`dense_products`.
    """

    tau: Tensor
    dense_step: Tensor
    active_counts: Tensor
    experts_read: Tensor
    dense_runs: Tensor


class RoutedAhead(NamedTuple):
    """What a router that reads another input than the feed-forward layer's hands on to it.

    Attributes:
        router_input: [T, H] in the model's dtype; what the router reads.
        routing: on a GPU the routing that was begun, as :func:`_route_ahead_op` returns it; else empty.
    """

    router_input: Tensor
    routing: list[Tensor]


def layer_spec(vllm_config: VllmConfig) -> LayerSpec:
    """The routed layers of a model, as this tensor-parallel rank holds them, each with all of its experts."""
    config = vllm_config.model_config.hf_config
    family, prunepath = family_of(config.to_dict(), converted=True), config.prunepath
    return LayerSpec(
        hidden=config.hidden_size,
        num_experts=prunepath.num_experts,
        expert_size=_ExpertShard(prunepath, 0).expert_size,
        dtype=vllm_config.model_config.dtype,
        activation=ACTIVATIONS[family.activation(config.to_dict())],
        glu=family.gate is not None,
        rule=RoutingRule(prunepath.selection, prunepath.threshold, prunepath.gate),
        expert_dtype=None if prunepath.expert_dtype is None else getattr(torch, prunepath.expert_dtype),
    )


class RoutedFFN(nn.Module):
    """Eq. 7-10 over parameters that live in the family's own modules, under the dense model's names.

    Args:
        spec: the layer, as this rank holds it.
        step: what it reads and counts of a step.
    """

    def __init__(self, spec: LayerSpec, step: StepState) -> None:
        super().__init__()
        self.spec = spec
        self.encoded_spec = spec.encode()
        self.world = get_tensor_model_parallel_world_size()
        for field in fields(step):  # buffers: inputs of a compiled graph, whose addresses stay
            self.register_buffer(field.name, getattr(step, field.name), persistent=False)

    def forward(
        self,
        x: Tensor,
        router: ExpertRouter,
        inputs: ExpertInputs,
        outputs: ExpertOutputs,
        ahead: RoutedAhead | None = None,
    ) -> Tensor:
        """x: [T, H] in the model's dtype; returns the same. The router reads x, or what it was given ahead."""
        y = torch.ops.prunepath.routed_ffn(
            x,
            None if ahead is None else ahead.router_input,
            [] if ahead is None else ahead.routing,
            self._step(),
            router.tensors(),
            [inputs.weight, inputs.bias, outputs.weight, outputs.bias, inputs.weight_scale, outputs.weight_scale],
            self.encoded_spec,
        )
        return tensor_model_parallel_all_reduce(y) if self.world > 1 else y

    def route_ahead(self, router_input: Tensor, router: ExpertRouter) -> RoutedAhead:
        """Begin what :meth:`forward` needs of the router, which reads `router_input`, [T, H] in the model's dtype.

        On a GPU it runs beside what is launched between the two; on a CPU, one thing after the other, it is left.
        """
        routing: list[Tensor] = []
        if self.tau.is_cuda and triton_kernels() is not None:
            arguments = router_input, self._step(), router.tensors(), self.encoded_spec
            routing = torch.ops.prunepath.route_ahead(*arguments)
        return RoutedAhead(router_input, routing)

    def _step(self) -> list[Any]:
        return [self.tau, self.dense_step, self.active_counts, self.experts_read, self.dense_runs]


def _routed_ffn_op(
    x: torch.Tensor,
    router_input: torch.Tensor | None,
    routing: list[torch.Tensor],
    step: list[torch.Tensor],
    router: list[torch.Tensor | None],
    weights: list[torch.Tensor | None],
    spec: str,
) -> torch.Tensor:
    # The counters are not declared as mutated: no graph reads them, and functionalisation would copy them around every
    # layer.
    if x.is_cpu and x.shape[0] <= cpu.native_tokens(x.dtype, quantised=weights[4] is not None):
        return _native_layer(step, router, weights, spec)(x, x if router_input is None else router_input)
    state = StepState(*step)
    counters = Counters(state.active_counts[: x.shape[0]], state.experts_read)
    tau, router_weights = state.tau[: x.shape[0]], RouterWeights(*cast(Any, router))
    layer = x, tau, router_weights, Weights(*cast(Any, weights)), LayerSpec.decode(spec)
    if x.is_cpu:
        return cpu.routed_ffn(*layer, router_input=router_input, counters=replace(counters, full=state.dense_runs))
    kernels = triton_kernels()
    if kernels is None:
        return cpu.routed_ffn(*layer, router_input=router_input, gather=False, counters=counters)
    tuning = kernels.tuning_for(x.device, layer[-1])
    every = _host_dense(state) or tuning.choice(x.shape[0]).reads_every_expert
    if every and (host := HostExperts.of(layer[3].w_in)) is not None:
        brought = host.bring(layer[3], ahead=_pieces_are_joined())
        layer = *layer[:3], brought, layer[4]
    return kernels.routed_ffn(
        *layer,
        tuning=tuning,
        router_input=router_input,
        routing=kernels.Routing(routing[0], None, routing[1]) if routing and _pieces_are_joined() else None,
        counters=counters,
        host_dense=_host_dense(state),
    )


def _host_dense(state: StepState) -> bool:
    """Whether the host knows that every token takes every expert.

    A captured graph is replayed for any taus: there the flag of the moment means nothing.
    """
    return bool(state.dense_step) and not torch.cuda.is_current_stream_capturing()


def _pieces_are_joined() -> bool:
    """Whether a second stream may run from one op to another.

    Not where vLLM captures a graph of each piece between two attentions: such a graph ends before the attention.
    """
    if not torch.cuda.is_current_stream_capturing():
        return True
    return get_forward_context().cudagraph_runtime_mode != CUDAGraphMode.PIECEWISE


def _route_ahead_op(
    router_input: torch.Tensor,
    step: list[torch.Tensor],
    router: list[torch.Tensor | None],
    spec: str,
) -> list[torch.Tensor]:
    """Gates, float32 [T, K], and the list of experts, int32 [K + 1]; unwritten where the layer does not read them."""
    kernels, layer, state = cast(Any, triton_kernels()), LayerSpec.decode(spec), StepState(*step)
    routing = None
    if _pieces_are_joined():
        tokens = router_input.shape[0]
        routing = kernels.route_ahead(
            router_input,
            state.tau[:tokens],
            RouterWeights(*cast(Any, router)),
            layer,
            tuning=kernels.tuning_for(router_input.device, layer),
            counters=Counters(state.active_counts[:tokens], state.experts_read),
            host_dense=_host_dense(state),
        )
    if routing is None:
        return _route_ahead_fake(router_input, step, router, spec)
    return [routing.gates, routing.experts]


def _route_ahead_fake(router_input: torch.Tensor, step: Any, router: Any, spec: str) -> list[torch.Tensor]:
    kept = LayerSpec.decode(spec).num_kept
    gates = router_input.new_empty((router_input.shape[0], kept), dtype=torch.float32)
    return [gates, router_input.new_empty((kept + 1,), dtype=torch.int32)]


_native_layers: dict[tuple, Callable[[Tensor, Tensor], Tensor]] = {}


def _native_layer(
    step: list[Tensor], router: list[Tensor | None], weights: list[Tensor | None], spec: str
) -> Callable[[Tensor, Tensor], Tensor]:
    """The CPU kernel on one layer's tensors. It is found by where they lie: a compiled graph hands over tensors alone.

    Making it anew, with its checks, would take as long as a small model's layer.
    """
    rank = cast(Tensor, router[0]).shape[1]  # with the buffers' length the one size that the spec does not tell
    key = (spec, len(step[0]), rank, *[0 if one is None else one.data_ptr() for one in (*step, *router, *weights)])
    if (call := _native_layers.get(key)) is None:
        state = StepState(*step)
        tensors = RouterWeights(*cast(Any, router)), Weights(*cast(Any, weights))
        layer = native.RoutedFFN(*tensors, LayerSpec.decode(spec))
        counters = Counters(state.active_counts, state.experts_read, state.dense_runs)
        call = _native_layers[key] = layer.on_buffers(state.tau, counters)
    return call


@functools.cache
def triton_kernels() -> Any | None:
    """The kernels' module, or None, said once and loudly, where Triton is missing."""
    try:
        from prunepath_vllm.kernels import ffn
    except ImportError as error:
        logger.error("Triton is missing (%s): PrunePath computes every expert in PyTorch. Expect no speed-up.", error)
        return None
    return ffn


@functools.cache
def dense_products(num_tokens: int, spec: LayerSpec) -> bool:
    """Whether the layers of a GPU take every expert for a batch of `num_tokens`, whatever its tokens chose.

    There the size of a batch decides, for all layers alike, and captured graphs run no code that could count.
    """
    kernels = triton_kernels()
    return kernels is None or kernels.tuning_for(torch.device("cuda"), spec).choice(num_tokens).path == "dense"


def takes_every_expert(num_tokens: int, spec: LayerSpec, *, on_gpu: bool) -> bool:
    """Whether a forward of so many tokens gives each every expert, because its tau is the least that it gets."""
    if on_gpu:
        return spec.at_least and dense_products(num_tokens, spec)
    return cpu.takes_every_expert(num_tokens, spec, quantised=spec.expert_dtype is not None)


def first_layer(model: nn.Module) -> list[Any]:
    """The first routed layer on this rank: its RoutedFFN, then what :meth:`RoutedFFN.forward` takes besides x.

    Empty where there is none.
    """
    found: dict[type, Any] = {}
    for module in model.modules():
        found.setdefault(type(module), module)
    kinds = (RoutedFFN, ExpertRouter, ExpertInputs, ExpertOutputs)
    return [found[kind] for kind in kinds] if set(kinds) <= set(found) else []


@torch.inference_mode()
def compile_kernels(model: nn.Module, max_tokens: int) -> None:
    """Run a GPU's layer once at every batch size from which on other kernels are compiled, up to `max_tokens`.

    Graph capture and profiling see some sizes only; without this the first request of another would wait for Triton.

    Raises:
        ConfigError: a table of choices was made for a GPU with more shared memory.
    """
    layer, kernels = first_layer(model), triton_kernels()
    if not layer or kernels is None or not layer[0].tau.is_cuda:
        return
    ffn, router, *weights = layer
    tuning = kernels.tuning_for(ffn.tau.device, ffn.spec)
    for tokens in kernels.warm_up_tokens(tuning, max_tokens):
        x = torch.zeros(tokens, ffn.spec.hidden, dtype=ffn.spec.dtype, device=ffn.tau.device)
        try:
            for dense_step in (True, False):
                ffn.dense_step.fill_(dense_step)
                ffn(x, router, *weights)
                if router.routes_by_attention:
                    ffn(x, router, *weights, ffn.route_ahead(x, router))
        except kernels.OutOfResources as error:
            path = tuning.choice(tokens).path
            raise ConfigError(
                f"kernels of the {path} path at {tokens} tokens: {error.required} of {error.name}; "
                f"expected at most this GPU's {error.limit}: make its table with `prunepath bench tune`"
            ) from error


def _routed_ffn_fake(x: torch.Tensor, *args: Any, **settings: Any) -> torch.Tensor:
    return torch.empty_like(x)


_library = Library("prunepath", "FRAGMENT")
"""Ours, not vLLM's; it must outlive the op."""

direct_register_custom_op("routed_ffn", _routed_ffn_op, fake_impl=_routed_ffn_fake, target_lib=_library)
direct_register_custom_op("route_ahead", _route_ahead_op, fake_impl=_route_ahead_fake, target_lib=_library)
