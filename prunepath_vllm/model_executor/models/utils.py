"""What every family's engine model shares: building routed layers, and loading weights that must all be there."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from vllm.model_executor.models.utils import extract_layer_index

from prunepath_vllm.checkpoint import check_finite
from prunepath_vllm.config import PrunePathConfig
from prunepath_vllm.errors import CheckpointError
from prunepath_vllm.model_executor.compat import VllmConfig, moved
from prunepath_vllm.model_executor.layers.routed_ffn import ExpertRouter, RoutedFFN
from prunepath_vllm.model_executor.tau import TokenTaus

_Model: Any = nn.Module if TYPE_CHECKING else object


class PrunePathModelMixin(_Model):
    """Weight loading and the V2 model state; comes before vLLM's model class in the bases."""

    def get_model_state_cls(self) -> type:
        """The V2 runner asks the model for its state."""
        from prunepath_vllm.model_executor.model_state import PrunePathEncoderModelState, PrunePathModelState

        return PrunePathEncoderModelState if getattr(self, "is_pooling_encoder", False) else PrunePathModelState

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint's tensors by vLLM's own loaders.

        Raises:
            CheckpointError: a tensor is missing or holds NaN or infinity.
        """
        loaded = super().load_weights(_finite(weights))
        router_biases = {name for name, _ in self.named_parameters() if name.endswith(".router.bias")}
        missing = {name for name, _ in self.named_parameters()} - loaded
        missing -= _tied_to(self, loaded)
        if router_biases <= missing:  # a checkpoint without router biases leaves them zero
            missing -= router_biases
            loaded |= router_biases
        if missing:
            raise CheckpointError(f"{min(missing)}: not in the checkpoint ({len(missing)} missing in all)")
        return loaded


def build_routed_ffn(
    vllm_config: VllmConfig, layer: int, *, activation: str, glu: bool
) -> tuple[RoutedFFN, ExpertRouter]:
    """The routed layer and the router of one feed-forward block; `layer` counts through the whole model."""
    config = vllm_config.model_config.hf_config
    prunepath: PrunePathConfig = config.prunepath
    taus = TokenTaus.of(vllm_config)
    active_counts, experts_read = taus.counts.buffers(layer)
    ffn = RoutedFFN(
        prunepath,
        activation=activation,
        glu=glu,
        tau=taus.values,
        dense_step=taus.dense_step,
        active_counts=active_counts,
        experts_read=experts_read,
        dense_runs=taus.counts.dense_runs,
    )
    return ffn, ExpertRouter(config.hidden_size, prunepath)


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


def _finite(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        check_finite(name, tensor)
        yield name, tensor


def _tied_to(model: nn.Module, loaded: set[str]) -> set[str]:
    """Names of parameters that share storage with a loaded one."""
    by_name = dict(model.named_parameters(remove_duplicate=False))
    storages = {by_name[name].data_ptr() for name in loaded if name in by_name}
    return {name for name, parameter in by_name.items() if parameter.data_ptr() in storages}
