"""What every PrunePath configuration adds to its dense family's."""

from typing import Any, ClassVar, Self

from prunepath_vllm.config import PrunePathConfig
from prunepath_vllm.errors import ConfigError
from prunepath_vllm.families import FAMILIES, Family
from prunepath_vllm.linears import linear_dtype


class PrunePathConfigMixin:
    """Checks and reads the ``prunepath_config`` field that a subclass declares; the dense fields stay as they are.

    The field may be None only because transformers builds a default instance to find what differs from it when
    saving: no checkpoint loads without the block and no model is built without it.
    """

    dense_config_class: ClassVar[type]
    model_type: ClassVar[str]
    prunepath_config: dict[str, Any] | None
    sliding_window: int | None
    # Sharding the feed-forward layer the dense way would cut the router's experts apart; none is supported here.
    base_model_tp_plan = None
    base_model_pp_plan = None
    base_model_ep_plan = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        rope = vars(self).get("rope_parameters")
        if isinstance(rope, dict):
            for one in (rope, *rope.values()):  # Gemma 3 has one for each kind of layer
                if isinstance(one, dict) and isinstance(one.get("factor"), int):
                    one["factor"] = float(one["factor"])  # vLLM's linear scaling takes a whole number for a list
        if vars(self).get("use_sliding_window") and "sliding_attention" not in vars(self).get("layer_types", ()):
            self.sliding_window = None  # vLLM takes it for the window of every layer
        if self.prunepath_config is not None:
            block = PrunePathConfig.parse(self.prunepath_config)
            family = self._family()
            block.check_intermediate_size(family.intermediate_size(vars(self)))
            block.check_layers(family.num_layers(vars(self)))
            block.check_router(family.hidden_size(vars(self)))
            self.prunepath_config = block.to_json()
            for field in ("add_cross_attention", "is_decoder"):
                if vars(self).get(field):
                    raise ConfigError(f"{field}: True; expected False, PrunePath models have no cross-attention")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """Build the configuration from a parsed config.json.

        Raises:
            ConfigError: ``prunepath_config`` is absent or does not describe this model, or ``quantization_config`` is
                not what ``prunepath quantize`` writes.
        """
        block = PrunePathConfig.parse(config_dict.get("prunepath_config"))
        # transformers and vLLM look into it unasked, and would fail in their own words.
        linear_dtype(config_dict, cls._family(), block)
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    @classmethod
    def _family(cls) -> Family:
        return next(family for family in FAMILIES if family.model_type == cls.model_type)

    @property
    def linear_dtype(self) -> str | None:
        """What the attention's linears are stored in, by ``quantization_config``: see :func:`linears.linear_dtype`."""
        return linear_dtype(self.to_dict(), self._family(), self.prunepath)  # type: ignore[attr-defined]

    @property
    def prunepath(self) -> PrunePathConfig:
        """The parsed block; see :func:`prunepath_vllm.modeling.prunepath_config_of`, which this class is below."""
        return PrunePathConfig.parse(self.prunepath_config)
