"""What every family's engine model shares: building routed layers, and loading weights that must all be there."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from prunepath_vllm.checkpoint import check_finite, validate_checkpoint
from prunepath_vllm.config import PrunePathConfig
from prunepath_vllm.errors import CheckpointError, ConfigError, UnsupportedFeatureError
from prunepath_vllm.families import family_of
from prunepath_vllm.kernels.layer import QUANTISED_DTYPES
from prunepath_vllm.model_executor.compat import VllmConfig, current_platform, moved
from prunepath_vllm.model_executor.layers.routed_ffn import (
    ExpertInputs,
    ExpertOutputs,
    ExpertRouter,
    RoutedAhead,
    RoutedFFN,
    StepState,
)
from prunepath_vllm.model_executor.tau import TokenTaus

_Model: Any = nn.Module if TYPE_CHECKING else object

_BUILT_IN = (
    "num_experts",
    "expert_size",
    "selection",
    "threshold",
    "gate",
    "dense_positions",
    "router",
    "expert_dtype",
    "kept_experts",
    "max_tau",
)
"""Fields of ``prunepath_config`` that a model is built from: other weights do not change them."""


class PrunePathModelMixin(_Model):
    """Taus, weight loading and the V2 model state; comes before vLLM's model class in the bases.

    Attributes:
        token_taus: what the model's routed layers read. Not in the engine's ``static_forward_context``, whose values
            vLLM takes for layers of its own.
        linear_dtype: what the attention's linears are stored in, where they are quantised.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        self.token_taus = TokenTaus(vllm_config)  # before the layers; nn.Module's own __init__ leaves it
        self.linear_dtype = vllm_config.model_config.hf_config.linear_dtype
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def get_model_state_cls(self) -> type:
        """The V2 runner asks the model for its state."""
        from prunepath_vllm.model_executor.model_state import PrunePathEncoderModelState, PrunePathModelState

        return PrunePathEncoderModelState if getattr(self, "is_pooling_encoder", False) else PrunePathModelState

    checkpoint_dtypes: Mapping[str, torch.dtype] = {}
    """Of the tensors that the model was first loaded from; none before that."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint's tensors by vLLM's own loaders.

        The first call brings them all. Later ones, into a running engine, may bring a part: trainers send one tensor
        at a time.

        Raises:
            CheckpointError: see :meth:`expect_loadable`; or one is missing from the first call.
            UnsupportedFeatureError: see :meth:`refuse_loading_again`.
        """
        if self.checkpoint_dtypes:
            self.refuse_loading_again()
        dtypes: dict[str, torch.dtype] = {}
        loaded = super().load_weights(self._loadable(weights, dtypes))
        if self.checkpoint_dtypes:
            return loaded
        router_biases = {name for name, _ in self.named_parameters() if name.endswith(".router.bias")}
        missing = {name for name, _ in self.named_parameters()} - loaded
        missing -= _tied_to(self, loaded) | _cache_scales(self)
        if getattr(getattr(self, "config", None), "method", None) is not None:  # --hf-overrides of a reranker
            missing -= {"score.weight"}  # made of rows of the head, after this
        if router_biases <= missing:  # a checkpoint without router biases leaves them zero
            missing -= router_biases
            loaded |= router_biases
        if missing:
            raise CheckpointError(f"{min(missing)}: not in the checkpoint ({len(missing)} missing in all)")
        self.checkpoint_dtypes = dtypes
        return loaded

    def expect_loadable(self, name: str, tensor: Tensor) -> None:
        """Refuse a tensor that would be other numbers in the model.

        Raises:
            CheckpointError: it holds NaN or infinity, or it is quantised and the one that the model was first loaded
                from was not, or not alike.
        """
        check_finite(name, tensor)
        first = self.checkpoint_dtypes.get(name, tensor.dtype)
        if tensor.dtype != first and not {tensor.dtype, first}.isdisjoint(QUANTISED_DTYPES):
            raise CheckpointError(f"{name}: is {tensor.dtype}; expected {first}, which the engine was built for")

    def _loadable(
        self, weights: Iterable[tuple[str, Tensor]], dtypes: dict[str, torch.dtype]
    ) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            self.expect_loadable(name, tensor)
            dtypes[name] = tensor.dtype
            yield name, tensor

    def refuse_loading_again(self) -> None:
        """Refuse to load a second time what vLLM has packed where its reloading does not find it.

        Raises:
            UnsupportedFeatureError: the attention's linears are int8, on a CPU.
        """
        if self.linear_dtype == "int8" and current_platform.device_type == "cpu":
            raise UnsupportedFeatureError(
                "vLLM does not load int8 linears again on a CPU, and would compute with other weights; expected a new "
                "engine, or linears in float8_e4m3fn"
            )

    def pack_head_again(self) -> None:
        """Make vLLM's packed copy of the head, on a CPU, that of its weight.

        A head of its own that shares the embedding's weight: vLLM packs what has been loaded, and it has not.
        """
        head: Any = dict(self.named_modules()).get("lm_head")
        if hasattr(head, "cpu_linear"):
            head.quant_method.process_weights_after_loading(head)

    def expect_reloadable(self, path: str, served: PrunePathConfig) -> None:
        """Refuse a checkpoint that this model cannot become, before any weight is touched.

        Args:
            path: the checkpoint's directory.
            served: the block that the model was built from.

        Raises:
            CheckpointError: names the tensor that is missing or wrong.
            ConfigError: names the field in which the checkpoint differs from the one that is served.
        """
        summary = validate_checkpoint(path, check_values=True)  # a NaN found later would leave half a model
        for name in _BUILT_IN:
            found, expected = getattr(summary.prunepath, name), getattr(served, name)
            if found != expected:
                raise ConfigError(
                    f"{path}: prunepath_config.{name} is {found!r}; the engine was built for {expected!r}"
                )
        if summary.linear_dtype != self.linear_dtype:
            raise ConfigError(
                f"{path}: quantization_config says {summary.linear_dtype!r}; the engine was built for "
                f"{self.linear_dtype!r}"
            )
        biases = {name for name in self.checkpoint_dtypes if name.endswith(".router.bias")}
        if missing := self.checkpoint_dtypes.keys() - biases - set(summary.tensors):
            raise CheckpointError(f"{path}: tensor {min(missing)} is missing ({len(missing)} in all)")

    def forget_router_biases(self) -> None:
        """Zero them, for a checkpoint that may have none."""
        for name, parameter in self.named_parameters():
            if name.endswith(".router.bias"):
                parameter.data.zero_()


def build_routed_ffn(vllm_config: VllmConfig, layer: int) -> tuple[RoutedFFN, ExpertRouter]:
    """The routed layer and the router of one feed-forward block; `layer` counts through the whole model."""
    config = vllm_config.model_config.hf_config
    prunepath: PrunePathConfig = config.prunepath
    taus = TokenTaus.being_built(vllm_config)
    active_counts, experts_read = taus.counts.buffers(layer)
    step = StepState(taus.values, taus.dense_step, active_counts, experts_read, taus.counts.dense_runs)
    kept = None if prunepath.kept_experts is None else prunepath.kept(layer)
    resident = None if taus.host is None else taus.host.resident(prunepath.kept(layer))
    spec = replace(taus.spec, kept=kept, resident=resident)
    return RoutedFFN(spec, step), ExpertRouter(config.hidden_size, prunepath, layer)


def build_expert_linears(
    vllm_config: VllmConfig, layer: int, *, glu: bool, bias: bool
) -> tuple[ExpertInputs, ExpertOutputs]:
    """The first and the second linear of one feed-forward block; `layer` counts through the whole model."""
    config, host = vllm_config.model_config.hf_config, TokenTaus.being_built(vllm_config).host
    inputs = ExpertInputs(config.hidden_size, config.prunepath, layer, glu=glu, bias=bias, host=host)
    return inputs, ExpertOutputs(config.hidden_size, config.prunepath, layer, bias=bias, host=host, inputs=inputs)


class RoutedModule(nn.Module):
    """A feed-forward module that stands in for a dense one, whose router may read what entered the attention.

    Attributes:
        ahead: between the attention and this module what the router was given; otherwise None. Set and taken within
            one forward, so that in a compiled graph its tensors are arguments of the layer's op.
    """

    ffn: RoutedFFN
    router: ExpertRouter
    ahead: RoutedAhead | None = None

    def take_ahead(self) -> RoutedAhead | None:
        """What the router was given instead of the module's input; None where it reads that."""
        taken, self.ahead = self.ahead, None
        return taken


def route_by_attention(model: nn.Module, config: Any) -> None:
    """Route every :class:`RoutedModule` of a model before its block's self-attention, if its routers read that input.

    Raises:
        EngineVersionError: a block has no attention under the name that transformers gives it.
    """
    if config.prunepath.router.input != "attention":
        return
    family = family_of(config.to_dict(), converted=True)
    for name, ffn in [(name, module) for name, module in model.named_modules() if isinstance(module, RoutedModule)]:

        def keep(_: nn.Module, args: tuple, kwargs: dict[str, Any], ffn: RoutedModule = ffn) -> None:
            ffn.ahead = ffn.ffn.route_ahead(kwargs["hidden_states"], ffn.router)

        attention = family.attention.format(extract_layer_index(name))
        try:
            model.get_submodule(attention).register_forward_pre_hook(keep, with_kwargs=True)
        except AttributeError:
            raise moved(f"{type(model).__name__}'s module {attention}") from None


@contextmanager
def built_instead(module: ModuleType, dense_class: str, build: Callable[[int], nn.Module]) -> Iterator[None]:
    """While the block constructs a model of vLLM's, its `module` builds our layer where it would build its dense one.

    Not replaced afterwards: the dense layer would be allocated first, and knows fewer activations than ours.

    Args:
        module: vLLM's, with the model and the class.
        dense_class: name of the feed-forward layer's class, which is given ``prefix``.
        build: takes the number of the layer, which counts through the whole model.

    Raises:
        EngineVersionError: there is no such class, it is not told its layer, or the model did not build any.
    """
    original = getattr(module, dense_class, None)
    if original is None or "prefix" not in inspect.signature(original).parameters:
        raise moved(f"{module.__name__}.{dense_class}(..., prefix)")
    built = 0

    def instead(*_: Any, prefix: str, **__: Any) -> nn.Module:
        nonlocal built
        built += 1
        return build(extract_layer_index(prefix))

    setattr(module, dense_class, instead)
    try:
        yield
    finally:
        setattr(module, dense_class, original)
    if not built:
        raise moved(f"model in {module.__name__} made of {dense_class}")


def _cache_scales(model: nn.Module) -> set[str]:
    """Names of the scales of keys and values, which vLLM makes where linears are quantised, and sets itself."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, Attention)]
    return {f"{layer}.{name}" for layer, module in layers for name, _ in module.named_parameters()}


def _tied_to(model: nn.Module, loaded: set[str]) -> set[str]:
    """Names of parameters that share storage with a loaded one."""
    by_name = dict(model.named_parameters(remove_duplicate=False))
    storages = {by_name[name].data_ptr() for name in loaded if name in by_name}
    return {name for name, parameter in by_name.items() if parameter.data_ptr() in storages}
