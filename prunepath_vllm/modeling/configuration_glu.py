"""Configurations of the GLU families: a class for each row of families.py, made when its name is first asked for.

PrunePathQwen2Config, say, is an attribute of this module like one that is written out: it can be imported and pickled.
"""

from typing import Any

from huggingface_hub.dataclasses import strict

from prunepath_vllm.families import FAMILIES, Family
from prunepath_vllm.modeling.configuration_utils import PrunePathConfigMixin


def __getattr__(name: str) -> Any:
    for family in FAMILIES:
        if family.config_class == f"{__name__}:{name}":
            return globals().setdefault(name, _config_class(family, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _config_class(family: Family, name: str) -> type:
    import transformers

    dense = getattr(transformers, family.dense_config_class)
    members = {
        "__module__": __name__,
        "__doc__": f"""{dense.__name__} plus the ``prunepath_config`` block of a checkpoint.

    Raises:
        ConfigError: the block does not parse, or num_experts * expert_size is not the feed-forward size.
    """,
        "__annotations__": {"prunepath_config": dict[str, Any] | None},
        "model_type": family.model_type,
        "dense_config_class": dense,
        "prunepath_config": None,
    }
    return strict(type(name, (PrunePathConfigMixin, dense), members))
