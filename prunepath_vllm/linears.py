"""Attention's linears in int8 or float8, as compressed-tensors stores them, which vLLM's own loaders read.

``quantization_config`` of config.json says it; one form of it is read, the one that ``prunepath quantize`` writes.
"""

from collections.abc import Mapping
from typing import Any

from prunepath_vllm.config import PrunePathConfig, check_quantization_config
from prunepath_vllm.errors import ConfigError
from prunepath_vllm.families import Family
from prunepath_vllm.tau import shown

METHOD = "compressed-tensors"
_TYPES = {"float8_e4m3fn": "float", "int8": "int"}
LINEAR_DTYPES = tuple(_TYPES)
"""What their weights are stored in, as PyTorch names it."""

_WITHOUT_EFFECT = (
    "version",
    "quantization_status",
    "global_compression_ratio",
    "observer",
    "observer_kwargs",
    "total_num_heads",  # vLLM writes these two
    "total_num_kv_heads",
)


def attention_linears(family: Family, layer: int) -> list[str]:
    """A layer's linears that ``--linears`` is about: all of the backbone outside the feed-forward module.

    None for families whose weights are stored [in, out] (GPT-2) or whose attention the engine builds otherwise.
    """
    return [f"{family.attention.format(layer)}.{name}" for name in family.adapted]


def standard_form(family: Family, layers: int, dtype: str) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint whose attention linears are stored in `dtype`.

    A weight has a scale per output channel; activations are quantised while they are multiplied, a token at a time.
    """
    one = {"num_bits": 8, "type": _TYPES[dtype], "symmetric": True}
    plain: list[str] = []
    for layer in range(layers):
        router = family.router(layer)
        plain += [*family.inputs(layer), family.output(layer), router, f"{router}.down"]
    return {
        "quant_method": METHOD,
        "format": f"{_TYPES[dtype]}-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": one | {"strategy": "channel", "dynamic": False},
                "input_activations": one | {"strategy": "token", "dynamic": True},
            }
        },
        # The head of a reranker, which the engine makes of rows of lm_head, is called score.
        "ignore": ["lm_head", "score", *plain],
    }


def linear_dtype(config: Mapping[str, Any], family: Family, prunepath: PrunePathConfig) -> str | None:
    """What the attention linears of a PrunePath checkpoint are stored in; None: as its other tensors.

    Args:
        config: its config.json.
        family: its row.
        prunepath: its block.

    Raises:
        ConfigError: ``quantization_config`` says anything but :func:`standard_form`; names the first field that does.
    """
    check_quantization_config(config)
    found = config.get("quantization_config")
    if found is None:
        return None
    method = found.get("quant_method")
    if not attention_linears(family, 0) or prunepath.expert_dtype is None:
        where = f"for {family.name}" if prunepath.expert_dtype is not None else "without prunepath_config.expert_dtype"
        raise ConfigError(f"quantization_config: {shown(method)}; expected none {where}")
    _expect_same(method, METHOD, "quantization_config.quant_method")
    dtypes = {f"{_TYPES[dtype]}-quantized": dtype for dtype in LINEAR_DTYPES}
    form = found.get("format")
    if not isinstance(form, str) or form not in dtypes:
        raise ConfigError(f"quantization_config.format: {shown(form)}; expected {' or '.join(map(repr, dtypes))}")
    layers, ignored = family.num_layers(config), found.get("ignore")
    if not isinstance(ignored, list) or len(ignored) < layers:  # before anything is made for each layer
        raise ConfigError(f"quantization_config.ignore: {shown(ignored)}; expected names in each of {layers} layers")
    _expect_same(found, standard_form(family, layers, dtypes[form]), "quantization_config")
    return dtypes[form]


def _expect_same(found: Any, expected: Any, where: str) -> None:
    """Refuse anything but `expected`; fields that are null, false or empty say nothing, names have no order.

    Raises:
        ConfigError: names the first difference.
    """
    if isinstance(expected, Mapping):
        if not isinstance(found, Mapping):
            raise ConfigError(f"{where}: {shown(found)}; expected an object")
        for field, value in expected.items():
            if field not in _WITHOUT_EFFECT:
                _expect_same(found.get(field), value, f"{where}.{field}")
        for field, value in found.items():
            if value and field not in expected and field not in _WITHOUT_EFFECT:
                raise ConfigError(f"{where}.{field}: {shown(value)}; expected none, it is not followed")
    elif isinstance(expected, list):
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise ConfigError(f"{where}: {shown(found)}; expected a list of names")
        for names, others, what in ((found, expected, "is there"), (expected, found, "is missing")):
            if alone := set(names) - set(others):
                raise ConfigError(f"{where}: {min(alone)[:100]!r} {what}; expected {shown(expected)}")
    elif found != expected or isinstance(found, bool) != isinstance(expected, bool):
        raise ConfigError(f"{where}: {shown(found)}; expected {shown(expected)}")
