"""What each field of a dense configuration means: followed, of no effect on the result, or refused unless ordinary.

A configuration whose function the engine or the transformers model would not reproduce is refused by name, before a
conversion begins and again when a checkpoint is read. tests/test_fields.py holds the table against transformers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prunepath_vllm.activations import ACTIVATIONS
from prunepath_vllm.errors import ConfigError
from prunepath_vllm.families import Family
from prunepath_vllm.tau import shown

FOLLOWED = "followed"
NO_EFFECT = "no effect"
"""On what an evaluated model computes: training, defaults of arguments, token ids that only end or pad a text."""


@dataclass(frozen=True)
class Only:
    """Refused unless it is one of these values; the first is what an absent field means."""

    values: tuple[Any, ...]
    reason: str


Meaning = str | Only

_ENGINE_IGNORES = "the engine's dense class ignores it"
_ENGINE_ALONE = "the engine follows it, transformers' class does not"

_EVERY_FAMILY: dict[str, Meaning] = {
    "transformers_version": NO_EFFECT,
    "architectures": FOLLOWED,
    "output_hidden_states": NO_EFFECT,
    "return_dict": NO_EFFECT,
    "dtype": FOLLOWED,
    "chunk_size_feed_forward": NO_EFFECT,  # the same values, computed in pieces
    "is_encoder_decoder": Only((False, None), "the family has no encoder-decoder form"),
    "id2label": NO_EFFECT,
    "label2id": NO_EFFECT,
    "problem_type": NO_EFFECT,
    "vocab_size": FOLLOWED,
    "initializer_range": NO_EFFECT,
    "use_cache": NO_EFFECT,
    "bos_token_id": NO_EFFECT,
    "eos_token_id": NO_EFFECT,
    "pad_token_id": NO_EFFECT,
    "tie_word_embeddings": FOLLOWED,
}

_DECODER: dict[str, Meaning] = {
    "hidden_size": FOLLOWED,
    "intermediate_size": FOLLOWED,
    "num_hidden_layers": FOLLOWED,
    "num_attention_heads": FOLLOWED,
    "num_key_value_heads": FOLLOWED,
    "max_position_embeddings": FOLLOWED,
    "rms_norm_eps": FOLLOWED,
    "rope_parameters": FOLLOWED,  # the kinds in ROPE_KINDS
    "attention_dropout": NO_EFFECT,
}
_GLU: dict[str, Meaning] = _DECODER | {"hidden_act": Only(tuple(ACTIVATIONS), "no kernel computes another")}
_GEMMA: dict[str, Meaning] = _DECODER | {
    "hidden_activation": Only(
        tuple(sorted(ACTIVATIONS, key=lambda name: name != "gelu_pytorch_tanh")), "no kernel computes another"
    ),
    "dtype": Only((None, "bfloat16", "float32"), "the family overflows float16"),
    "head_dim": FOLLOWED,
    "attention_bias": FOLLOWED,
    "query_pre_attn_scalar": FOLLOWED,
    "sliding_window": FOLLOWED,
    "layer_types": FOLLOWED,
    "final_logit_softcapping": FOLLOWED,
}
_QWEN_WINDOW: dict[str, Meaning] = {
    # Together: a window on every layer or on none, see _check_window.
    "use_sliding_window": FOLLOWED,
    "sliding_window": FOLLOWED,
    "max_window_layers": FOLLOWED,
    "layer_types": FOLLOWED,
}

FIELDS: dict[str, dict[str, Meaning]] = {
    "llama": _EVERY_FAMILY
    | _GLU
    | {
        "pretraining_tp": NO_EFFECT,  # how products were cut into pieces; neither class does so any more
        "attention_bias": FOLLOWED,
        "mlp_bias": FOLLOWED,
        "head_dim": FOLLOWED,
    },
    "qwen2": _EVERY_FAMILY | _GLU | _QWEN_WINDOW,
    "qwen3": _EVERY_FAMILY
    | _GLU
    | _QWEN_WINDOW
    | {
        "head_dim": FOLLOWED,
        "attention_bias": Only((False, None), "the engine's dense class has none on the output projection"),
    },
    "mistral": _EVERY_FAMILY | _GLU | {"head_dim": FOLLOWED, "sliding_window": FOLLOWED},
    "phi3": _EVERY_FAMILY
    | _GLU
    | {
        "sliding_window": FOLLOWED,
        "resid_pdrop": NO_EFFECT,
        "embd_pdrop": NO_EFFECT,
        "original_max_position_embeddings": FOLLOWED,  # with "longrope"
    },
    "granite": _EVERY_FAMILY
    | _GLU
    | {
        "attention_bias": FOLLOWED,
        "mlp_bias": FOLLOWED,
        "embedding_multiplier": FOLLOWED,
        "logits_scaling": FOLLOWED,
        "residual_multiplier": FOLLOWED,
        "attention_multiplier": FOLLOWED,
    },
    "gemma2": _EVERY_FAMILY
    | _GEMMA
    | {
        "attn_logit_softcapping": FOLLOWED,
        "use_bidirectional_attention": Only((None, False), "the engine's dense class attends to what came before"),
        "tie_word_embeddings": Only((True,), "the engine's dense class has no other output embeddings"),
    },
    "gemma3_text": _EVERY_FAMILY
    | _GEMMA
    | {
        "attn_logit_softcapping": Only((None,), _ENGINE_IGNORES),
        "use_bidirectional_attention": Only((False, None), "the engine's dense class attends to what came before"),
    },
    "gpt2": _EVERY_FAMILY
    | {
        "n_positions": FOLLOWED,
        "n_embd": FOLLOWED,
        "n_layer": FOLLOWED,
        "n_head": FOLLOWED,
        "n_inner": FOLLOWED,
        "activation_function": Only(("gelu_new", *ACTIVATIONS), "no kernel computes another"),
        "resid_pdrop": NO_EFFECT,
        "embd_pdrop": NO_EFFECT,
        "attn_pdrop": NO_EFFECT,
        "layer_norm_epsilon": FOLLOWED,
        "summary_type": NO_EFFECT,  # the summary is the double-heads model's
        "summary_use_proj": NO_EFFECT,
        "summary_activation": NO_EFFECT,
        "summary_proj_to_labels": NO_EFFECT,
        "summary_first_dropout": NO_EFFECT,
        "scale_attn_weights": Only((True,), _ENGINE_IGNORES),
        "scale_attn_by_inverse_layer_idx": Only((False, None), "the engine's dense class has no such scale"),
        "reorder_and_upcast_attn": Only((False, None), "the engine's dense class has no such order"),
        "add_cross_attention": Only((False, None), "PrunePath models have no cross-attention"),
    },
    "roberta": _EVERY_FAMILY
    | {
        "hidden_size": FOLLOWED,
        "num_hidden_layers": FOLLOWED,
        "num_attention_heads": FOLLOWED,
        "intermediate_size": FOLLOWED,
        "hidden_act": Only(("gelu", *ACTIVATIONS), "no kernel computes another"),
        "hidden_dropout_prob": NO_EFFECT,
        "attention_probs_dropout_prob": NO_EFFECT,
        "max_position_embeddings": FOLLOWED,
        "type_vocab_size": FOLLOWED,
        "layer_norm_eps": FOLLOWED,
        "pad_token_id": FOLLOWED,  # positions start behind it
        "id2label": FOLLOWED,
        "problem_type": FOLLOWED,  # what the engine makes of logits
        "classifier_dropout": NO_EFFECT,
        "is_decoder": Only((False, None), "the engine attends to both sides"),
        "add_cross_attention": Only((False, None), "PrunePath models have no cross-attention"),
        "tie_word_embeddings": NO_EFFECT,  # a classifier has no output embeddings
    },
}
"""For each family, every field of transformers' configuration class."""

_FOREIGN_TO_ALL: dict[str, Only] = {
    "is_causal": Only((None, True), _ENGINE_ALONE),
    "attention_chunk_size": Only((None,), _ENGINE_ALONE),
    "per_layer_config": Only((None, {}), "layers of different shapes or functions do not convert"),
    "pruned_heads": Only((None, {}), "pruned attention heads do not convert"),
}
_NO_WINDOW = {"sliding_window": Only((None, 0), _ENGINE_ALONE), "layer_types": Only((None, []), _ENGINE_ALONE)}
_FOREIGN_ROPE = {
    name: Only((None, 1.0), _ENGINE_ALONE) for name in ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction")
} | {"rotary_emb_base": Only((None,), _ENGINE_ALONE)}

_NO_BIASES = {"mlp_bias": Only((None, False), "the family's feed-forward layer has no biases")}
_LLAMA_ENGINE = {
    "bias": Only((None, False), _ENGINE_ALONE),
    "qkv_bias": Only((None,), _ENGINE_ALONE),
    "logit_scale": Only((None, 1.0), _ENGINE_ALONE),
    "target_layer_count": Only((None,), _ENGINE_ALONE),
}
"""What vLLM's Llama reads, of which other families' classes are made."""

FOREIGN: dict[str, dict[str, Only]] = {
    "llama": _FOREIGN_TO_ALL | _FOREIGN_ROPE | _NO_WINDOW | _LLAMA_ENGINE,
    "qwen2": _FOREIGN_TO_ALL
    | _FOREIGN_ROPE
    | _NO_BIASES
    | {
        "qk_norm": Only((None, False), _ENGINE_ALONE),
        "dual_chunk_attention_config": Only((None,), _ENGINE_ALONE),
    },
    "qwen3": _FOREIGN_TO_ALL
    | _FOREIGN_ROPE
    | _NO_BIASES
    | {"dual_chunk_attention_config": Only((None,), _ENGINE_ALONE)},
    "mistral": _FOREIGN_TO_ALL
    | _FOREIGN_ROPE
    | _NO_BIASES
    | _LLAMA_ENGINE
    | {
        "attention_bias": Only((None, False), _ENGINE_ALONE),
        "layer_types": Only((None, []), _ENGINE_ALONE),
        "llama_4_scaling": Only((None,), _ENGINE_ALONE),
        "ada_rms_norm_t_cond": Only((None, False), _ENGINE_ALONE),
    },
    "phi3": _FOREIGN_TO_ALL
    | {name: rule for name, rule in _FOREIGN_ROPE.items() if name != "partial_rotary_factor"}
    | _NO_BIASES
    | _LLAMA_ENGINE
    | {
        "attention_bias": Only((None, False), _ENGINE_ALONE),
        "layer_types": Only((None, []), _ENGINE_ALONE),
    },
    "granite": _FOREIGN_TO_ALL
    | _FOREIGN_ROPE
    | _NO_WINDOW
    | {
        "bias": Only((None, False), _ENGINE_ALONE),
        "logit_scale": Only((1.0,), _ENGINE_ALONE),
        "layer_rope_theta": Only((None,), _ENGINE_ALONE),
        "attention_sinks": Only((None, False), _ENGINE_ALONE),
    },
    "gemma2": _FOREIGN_TO_ALL | _FOREIGN_ROPE | _NO_BIASES,
    "gemma3_text": _FOREIGN_TO_ALL | _FOREIGN_ROPE | _NO_BIASES,
    "gpt2": _FOREIGN_TO_ALL | _NO_WINDOW,
    "roberta": _FOREIGN_TO_ALL
    | _NO_WINDOW
    | {"position_embedding_type": Only((None, "absolute"), "both classes compute absolute positions, whatever it is")},
}
"""Keys of config.json that are no fields of the dense class, yet change what engine or transformers computes."""

_ROPE_BASE = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
ROPE_KINDS: dict[str, frozenset[str]] = {
    "default": _ROPE_BASE,
    "linear": _ROPE_BASE | {"factor"},
    "llama3": _ROPE_BASE | {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": _ROPE_BASE
    | {"factor", "original_max_position_embeddings", "attention_factor"}
    | {"beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "longrope": _ROPE_BASE | {"short_factor", "long_factor", "factor", "original_max_position_embeddings"},
}
ROPE_KINDS["su"] = ROPE_KINDS["longrope"]  # its old name
"""Rotary embeddings that engine and transformers compute alike, and their parameters. Not "dynamic": transformers
chooses the frequencies by each sequence's length, the engine once. With "longrope" both take the short factors up to
the original length, where the engine stops unless told otherwise; beyond, the engine, dense or not, takes the long ones
for every sequence."""

_LAYER_KINDS = ("full_attention", "sliding_attention")


def check_fields(family: Family, config: Mapping[str, Any]) -> None:
    """Refuse a configuration whose function would not be reproduced.

    Args:
        family: of the model.
        config: parsed config.json, dense or converted.

    Raises:
        ConfigError: names the field, its value and what was expected.
    """
    rules = FIELDS[family.name] | FOREIGN[family.name]
    for field, rule in rules.items():
        if isinstance(rule, Only) and field in config and not _among(config[field], rule.values):
            expected = " or ".join(dict.fromkeys(shown(value) for value in rule.values if value is not None)) or "none"
            raise ConfigError(f"{field}: {shown(config[field])}; expected {expected} ({rule.reason})")
    if family.gate is not None:
        _check_rope(family, config)
        _check_window(family, config)
    if family.gate is not None and "head_dim" not in FIELDS[family.name]:
        _check_head_dim(family, config)
    positions = family.positions(config)
    if positions is not None and positions < 1:
        raise ConfigError(
            f"max_position_embeddings: {shown(config['max_position_embeddings'])} leaves no position behind "
            f"pad_token_id {shown(config.get('pad_token_id', 1))}; expected more"
        )


def _among(value: object, allowed: tuple[Any, ...]) -> bool:
    """Equal to one of `allowed`, where True is not 1."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)


def rope_parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary embedding's parameters, under their new or their old name.

    Raises:
        ConfigError: not an object.
    """
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(name) or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"{name}: {shown(rope)}; expected an object")
    return rope


def usable_positions(family: Family, config: Mapping[str, Any]) -> int | None:
    """How many tokens a sequence may have in the engine; None where config.json does not say.

    Rows of the position table, or of the table of rotations that the engine makes.
    """
    positions = family.positions(config)
    if positions is None or family.gate is None or family.rope_by_layer_kind:
        return positions  # Gemma 3's counts what its scaling adds
    rope = rope_parameters(config)
    factor = rope.get("factor") or 1
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "linear":
        return int(positions * factor)
    if kind == "yarn":
        return int((rope.get("original_max_position_embeddings") or positions) * factor)
    return positions


def _check_rope(family: Family, config: Mapping[str, Any]) -> None:
    ropes = {"rope_parameters": rope_parameters(config)}
    if family.rope_by_layer_kind and not config.get("rope_scaling"):
        (rope,) = ropes.values()
        if unknown := sorted(str(kind) for kind in set(rope) - set(_LAYER_KINDS)):
            raise ConfigError(
                f"rope_parameters.{unknown[0]}: {shown(rope.get(unknown[0]))}; expected only {', '.join(_LAYER_KINDS)}"
            )
        ropes = {f"rope_parameters.{kind}": rope.get(kind) or {} for kind in _LAYER_KINDS}
    for name, rope in ropes.items():
        if not isinstance(rope, Mapping):
            raise ConfigError(f"{name}: {shown(rope)}; expected an object")
        _check_one_rope(name, rope, family, config)


def _check_one_rope(name: str, rope: Mapping[str, Any], family: Family, config: Mapping[str, Any]) -> None:
    kinds = family.rope_kinds
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = ROPE_KINDS[kind] if isinstance(kind, str) and kind in kinds else None
    if known is None:
        raise ConfigError(
            f"{name}.rope_type: {shown(kind)}; expected one of {', '.join(kinds)}, which engine and "
            "transformers compute alike"
        )
    unknown = sorted(str(field) for field in set(rope) - known if rope[field] is not None)
    if unknown:
        raise ConfigError(
            f"{name}.{unknown[0]}: {shown(rope.get(unknown[0]))}; expected, with rope_type {kind!r}, only "
            f"{', '.join(sorted(known))}"
        )
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if part not in (None, 1) and not family.partial_rope:
        raise ConfigError(f"{name}.partial_rotary_factor: {shown(part)}; expected 1.0 ({_ENGINE_ALONE})")
    if part is not None and (not _is_positive(part) or part > 1):
        raise ConfigError(f"{name}.partial_rotary_factor: {shown(part)}; expected a number in (0, 1]")
    if kind in ("longrope", "su"):
        head = family.hidden_size(config) // config.get("num_attention_heads", 32)
        _check_long_rope(name, rope, config, int(head * (1.0 if part is None else part)) // 2)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _check_long_rope(name: str, rope: Mapping[str, Any], config: Mapping[str, Any], pairs: int) -> None:
    """Two lists of factors, one for each pair of rotated channels; and no attention factor but the lengths' own."""
    for field in ("short_factor", "long_factor"):
        factors = rope.get(field)
        if not isinstance(factors, list) or len(factors) != pairs or not all(map(_is_positive, factors)):
            raise ConfigError(f"{name}.{field}: {shown(factors)}; expected {pairs} positive numbers")
    original = rope.get("original_max_position_embeddings", config.get("original_max_position_embeddings", 4096))
    if not _is_positive(original):
        raise ConfigError(f"{name}.original_max_position_embeddings: {shown(original)}; expected a number of tokens")
    scale, factor = config.get("max_position_embeddings", 4096) / original, rope.get("factor")
    if factor is not None and (not _is_positive(factor) or not math.isclose(factor, scale)):
        raise ConfigError(
            f"{name}.factor: {shown(factor)}; expected {scale:g}, max_position_embeddings over the original "
            "(the engine ignores another)"
        )


def _check_window(family: Family, config: Mapping[str, Any]) -> None:
    """Layers with a window must have one that is known, and the engine gives every layer of some families the same."""
    fields, layers = FIELDS[family.name], family.num_layers(config)
    if "sliding_window" not in fields:
        return
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window", not family.one_window) else None
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise ConfigError(f"sliding_window: {shown(window)}; expected a number of tokens, 1 or more, or none")
    kinds = config.get("layer_types") if "layer_types" in fields else None
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in _LAYER_KINDS for kind in kinds):
            raise ConfigError(f"layer_types: {shown(kinds)}; expected {layers} times one of {', '.join(_LAYER_KINDS)}")
        sliding = kinds.count("sliding_attention")
        said = f"layer_types: {sliding} of {layers} layers with a sliding window"
        if sliding and window is None:
            expected = "use_sliding_window and sliding_window" if family.one_window else "sliding_window"
            raise ConfigError(f"{said}, but no {expected}; expected {expected}")
    elif family.one_window:
        first = config.get("max_window_layers", 28)
        if window is None or not isinstance(first, int):
            return
        sliding = max(0, layers - max(0, first))
        said = f"max_window_layers: {shown(first)} of {layers} layers with use_sliding_window true"
    else:
        if "layer_types" in fields and window is None:
            raise ConfigError(
                "sliding_window: none; expected a number of tokens, as layer_types leaves some to a window"
            )
        return
    if 0 < sliding < layers and family.one_window:
        raise ConfigError(f"{said}; expected a window on every layer or on none (the engine has one for all)")


def _check_head_dim(family: Family, config: Mapping[str, Any]) -> None:
    """Where it is no field of the family's: transformers' class follows it all the same, and the engine's does not."""
    if "head_dim" not in config:
        return
    hidden, heads = family.hidden_size(config), config.get("num_attention_heads", 32)
    if not isinstance(heads, int) or heads <= 0 or config["head_dim"] != hidden // heads:
        raise ConfigError(
            f"head_dim: {shown(config['head_dim'])}; expected hidden_size / num_attention_heads, "
            f"{shown(hidden)} / {shown(heads)} (the engine's dense class ignores it)"
        )
