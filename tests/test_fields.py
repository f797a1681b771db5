"""Every field of transformers' dense configurations: followed by the converted model, without effect, or refused."""

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import FAMILY_NAMES, GLU_MODELS, LAYERS, build_dense, save_prunepath
from torch import Tensor
from transformers import GPT2Config, RobertaConfig

from prunepath_vllm.checkpoint import load_prunepath_config
from prunepath_vllm.conversion.convert import convert
from prunepath_vllm.errors import ConfigError, UsageError
from prunepath_vllm.families import FAMILIES, Family
from prunepath_vllm.fields import FIELDS, FOLLOWED, FOREIGN, NO_EFFECT, Only, check_fields, usable_positions

CONFIGS: dict[str, Any] = {name: config for name, (config, _, _) in GLU_MODELS.items()}
CONFIGS |= {"gpt2": GPT2Config, "roberta": RobertaConfig}
ROWS: dict[str, Family] = {row.name: row for row in FAMILIES}
IDS = torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(0))


def rope(**parameters: Any) -> dict[str, Any]:
    return dict(rope_parameters=dict(rope_theta=10_000.0, **parameters))


LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8)
YARN = dict(factor=4.0, original_max_position_embeddings=128, beta_fast=16.0, beta_slow=2.0, attention_factor=1.3)
GLU: dict[str, list[dict[str, Any]]] = {
    "vocab_size": [dict(vocab_size=400)],
    "dtype": [dict(dtype=torch.bfloat16)],
    "hidden_size": [dict(hidden_size=96)],
    "intermediate_size": [dict(intermediate_size=192)],
    "num_hidden_layers": [dict(num_hidden_layers=2)],
    "num_attention_heads": [dict(num_attention_heads=4)],
    "num_key_value_heads": [dict(num_key_value_heads=2)],
    "max_position_embeddings": [dict(max_position_embeddings=64)],
    "rms_norm_eps": [dict(rms_norm_eps=0.1)],
    "rope_parameters": [
        dict(rope_parameters=dict(rope_type="default", rope_theta=100.0)),
        rope(rope_type="linear", factor=2.0),
        rope(rope_type="llama3", **LLAMA3),
        rope(rope_type="yarn", **YARN),
    ],
}
QWEN_WINDOW: dict[str, list[dict[str, Any]]] = {
    "use_sliding_window": [dict(use_sliding_window=True, max_window_layers=0, sliding_window=8)],
    "sliding_window": [dict(use_sliding_window=True, max_window_layers=0, sliding_window=5)],
    "max_window_layers": [dict(use_sliding_window=True, max_window_layers=LAYERS, sliding_window=8)],
    "layer_types": [dict(use_sliding_window=True, layer_types=["sliding_attention"] * LAYERS, sliding_window=8)],
}
SHORT, LONG = [1 + i / 4 for i in range(16)], [9 - i / 4 for i in range(16)]
LONGROPE = dict(rope_type="longrope", rope_theta=100.0, short_factor=SHORT, long_factor=LONG)
HALF_LONGROPE = LONGROPE | dict(partial_rotary_factor=0.5, short_factor=SHORT[:8], long_factor=LONG[:8])
LINEAR = dict(rope_type="linear", rope_theta=10_000.0, factor=8)
GEMMA = GLU | {
    "tie_word_embeddings": [dict(tie_word_embeddings=False)],
    "head_dim": [dict(head_dim=16)],
    "attention_bias": [dict(attention_bias=True)],
    "query_pre_attn_scalar": [dict(query_pre_attn_scalar=144)],
    "sliding_window": [dict(sliding_window=5)],
    "layer_types": [dict(layer_types=["full_attention"] * LAYERS), dict(layer_types=["sliding_attention"] * LAYERS)],
    "final_logit_softcapping": [dict(final_logit_softcapping=None), dict(final_logit_softcapping=3.0)],
}
VARIANTS: dict[str, dict[str, list[dict[str, Any]]]] = {
    "llama": GLU
    | {
        "tie_word_embeddings": [dict(tie_word_embeddings=True)],
        "attention_bias": [dict(attention_bias=True)],
        "mlp_bias": [dict(mlp_bias=True)],
        "head_dim": [dict(head_dim=16)],
    },
    "qwen2": GLU | QWEN_WINDOW | {"tie_word_embeddings": [dict(tie_word_embeddings=False)]},
    "qwen3": GLU
    | QWEN_WINDOW
    | {"tie_word_embeddings": [dict(tie_word_embeddings=True)], "head_dim": [dict(head_dim=16)]},
    "mistral": GLU
    | {
        "tie_word_embeddings": [dict(tie_word_embeddings=True)],
        "head_dim": [dict(head_dim=16)],
        "sliding_window": [dict(sliding_window=5), dict(sliding_window=None)],
    },
    "phi3": GLU
    | {
        "tie_word_embeddings": [dict(tie_word_embeddings=True)],
        "sliding_window": [dict(sliding_window=5), dict(sliding_window=None)],
        "original_max_position_embeddings": [
            dict(rope_parameters=LONGROPE, max_position_embeddings=512, original_max_position_embeddings=size)
            for size in (8, 64)  # shorter than the prompt, and longer
        ],
        "rope_parameters": [
            dict(rope_parameters=dict(rope_type="default", rope_theta=100.0)),
            dict(rope_parameters=dict(rope_type="default", rope_theta=100.0, partial_rotary_factor=0.5)),
            dict(rope_parameters=HALF_LONGROPE),
        ],
    },
    "granite": GLU
    | {
        "tie_word_embeddings": [dict(tie_word_embeddings=False)],
        "attention_bias": [dict(attention_bias=True)],
        "mlp_bias": [dict(mlp_bias=True)],
        "embedding_multiplier": [dict(embedding_multiplier=12)],
        "logits_scaling": [dict(logits_scaling=8.0)],
        "residual_multiplier": [dict(residual_multiplier=0.22)],
        "attention_multiplier": [dict(attention_multiplier=0.015625)],
    },
    "gemma2": {field: values for field, values in GEMMA.items() if field not in ("tie_word_embeddings", "dtype")}
    | {"attn_logit_softcapping": [dict(attn_logit_softcapping=None), dict(attn_logit_softcapping=50.0)]},
    "gemma3_text": {field: values for field, values in GEMMA.items() if field != "dtype"}
    | {
        "layer_types": [dict(layer_types=["full_attention"] * LAYERS), dict(sliding_window_pattern=3)],
        "rope_parameters": [
            dict(rope_parameters=dict(full_attention=LINEAR, sliding_attention=dict(rope_type="default"))),
            dict(rope_parameters=dict(sliding_attention=dict(rope_type="default", rope_theta=100.0))),
        ],
    },
    "gpt2": {
        "vocab_size": [dict(vocab_size=400)],
        "dtype": [dict(dtype=torch.bfloat16)],
        "n_positions": [dict(n_positions=64)],
        "n_embd": [dict(n_embd=96)],
        "n_layer": [dict(n_layer=2)],
        "n_head": [dict(n_head=4)],
        "n_inner": [dict(n_inner=192)],
        "layer_norm_epsilon": [dict(layer_norm_epsilon=0.1)],
        "tie_word_embeddings": [dict(tie_word_embeddings=False)],
    },
    "roberta": {
        "vocab_size": [dict(vocab_size=400)],
        "dtype": [dict(dtype=torch.bfloat16)],
        "hidden_size": [dict(hidden_size=96)],
        "intermediate_size": [dict(intermediate_size=192)],
        "num_hidden_layers": [dict(num_hidden_layers=2)],
        "num_attention_heads": [dict(num_attention_heads=4)],
        "max_position_embeddings": [dict(max_position_embeddings=64)],
        "type_vocab_size": [dict(type_vocab_size=2)],
        "layer_norm_eps": [dict(layer_norm_eps=0.1)],
        "pad_token_id": [dict(pad_token_id=2)],
        "id2label": [dict(num_labels=1), dict(num_labels=5)],
        "problem_type": [dict(problem_type="regression"), dict(problem_type="multi_label_classification")],
    },
}
"""For every followed field, values that are not the tiny models'."""

SAME_LOGITS = {
    "dtype",
    "max_position_embeddings",
    "n_positions",
    "type_vocab_size",
    "problem_type",
    "max_window_layers",
}
"""Fields that bound or store, or say what becomes of logits: the engine's tests look at those."""

ELSEWHERE = {"architectures"}
"""The class itself; test_conversion.py."""


def followed(family: str) -> set[str]:
    return {field for field, meaning in FIELDS[family].items() if meaning == FOLLOWED}


@cache
def logits_of(family: str) -> Tensor:
    return logits(build_dense(family))


@cache
def config_of(family: str) -> dict[str, Any]:
    return build_dense(family).config.to_dict() | {"dtype": "float32"}


def logits(model: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **options).logits.float()


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_field_is_decided(family):
    """A field that a new release of transformers brings must be read about in both classes, then put into the table."""
    fields = {field.name: field for field in dataclasses.fields(CONFIGS[family])}
    assert set(FIELDS[family]) == set(fields)
    assert {meaning for meaning in FIELDS[family].values() if isinstance(meaning, str)} <= {FOLLOWED, NO_EFFECT}
    assert set(VARIANTS[family]) | ELSEWHERE == followed(family)
    assert not set(FOREIGN[family]) & set(fields)
    for name, meaning in FIELDS[family].items():
        if isinstance(meaning, Only):
            assert meaning.values[0] == fields[name].default


@pytest.mark.parametrize(
    ("family", "field", "number"),
    [
        (family, field, number)
        for family in FAMILY_NAMES
        for field in VARIANTS[family]
        for number in range(len(VARIANTS[family][field]))
    ],
)
def test_a_followed_field_gives_the_dense_logits(family, field, number, tmp_path):
    import prunepath_vllm

    prunepath_vllm.register()
    options = dict(VARIANTS[family][field][number])
    dense = build_dense(family, **options)
    dense.save_pretrained(tmp_path / "dense")
    path = convert(tmp_path / "dense", tmp_path / "out", split="random")
    auto = getattr(transformers, ROWS[family].auto_class)
    # What sdpa leaves out of Gemma 2 must not be left out of the converted model either.
    attention = dict(attn_implementation="eager") if family == "gemma2" else {}
    # Read again, as a model cast to bfloat16 keeps rounded rotary frequencies.
    expected = logits(auto.from_pretrained(tmp_path / "dense", dtype=torch.float32, **attention).eval())
    model: Any = auto.from_pretrained(path, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(model, tau=1.0), expected, atol=1e-4, rtol=1e-4)
    other = logits_of(family)
    assert field in SAME_LOGITS or other.shape != expected.shape or (other - expected).abs().max() > 1e-3


def other_than(values: tuple[Any, ...]) -> Any:
    """A value that is none of these, of their kind where there is one."""
    if any(isinstance(value, bool) for value in values):
        return next((value for value in (True, False) if value not in values), "sometimes")
    if any(isinstance(value, str) for value in values):
        return "relu2"
    return {"0": [1]} if {} in values else 7


REFUSED = [
    (family, field, other_than(rule.values))
    for family in FAMILY_NAMES
    for field, rule in (FIELDS[family] | FOREIGN[family]).items()
    if isinstance(rule, Only)
] + [
    ("llama", "rope_parameters.rope_type", rope(rope_type="dynamic", factor=2.0)),
    ("qwen2", "rope_parameters.rope_type", dict(rope_scaling=dict(type="longrope", factor=2.0))),
    ("llama", "rope_parameters.rope_type", rope(rope_type=["linear"])),
    ("llama", "rope_parameters.alpha", rope(rope_type="default", alpha=2.0)),
    ("llama", "rope_parameters.partial_rotary_factor", rope(rope_type="default", partial_rotary_factor=0.5)),
    ("llama", "rope_parameters", dict(rope_parameters="linear")),
    (
        "qwen2",
        "max_window_layers",
        dict(use_sliding_window=True, max_window_layers=1, sliding_window=8, layer_types=None),
    ),
    ("qwen2", "layer_types", dict(use_sliding_window=True, layer_types=["full_attention"] * 2 + ["sliding_attention"])),
    ("qwen2", "layer_types", dict(layer_types=["sliding_attention"] * LAYERS)),
    ("qwen2", "layer_types", dict(layer_types=["full_attention"])),
    ("qwen2", "head_dim", dict(head_dim=16)),
    ("mistral", "sliding_window", dict(sliding_window=0)),
    ("phi3", "rope_parameters.short_factor", dict(rope_scaling=dict(type="longrope", short_factor=[1.0]))),
    ("phi3", "rope_parameters.long_factor", dict(rope_parameters=LONGROPE | dict(long_factor=[1.0] * 15 + [-1.0]))),
    ("phi3", "rope_parameters.factor", dict(rope_parameters=LONGROPE | dict(factor=3.0))),
    ("phi3", "rope_parameters.long_mscale", dict(rope_parameters=LONGROPE | dict(long_mscale=1.1))),
    ("phi3", "rope_parameters.attention_factor", dict(rope_parameters=LONGROPE | dict(attention_factor=1.1))),
    (
        "phi3",
        "rope_parameters.original_max_position_embeddings",
        dict(rope_parameters=LONGROPE | dict(original_max_position_embeddings=0)),
    ),
    ("phi3", "rope_parameters.rope_type", dict(rope_scaling=dict(type="yarn", factor=2.0))),
    (
        "phi3",
        "rope_parameters.partial_rotary_factor",
        dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=1.5)),
    ),
    ("gemma2", "sliding_window", dict(sliding_window=None, layer_types=None)),
    ("gemma2", "layer_types", dict(sliding_window=None)),
    ("gemma2", "layer_types", dict(layer_types=["chunked_attention"] * LAYERS)),
    ("gemma2", "dtype", dict(dtype="float16")),
    ("gemma3_text", "rope_parameters.factor", dict(rope_parameters=LINEAR)),
    (
        "gemma3_text",
        "rope_parameters.full_attention.rope_type",
        dict(rope_parameters=dict(full_attention=dict(rope_type="yarn", factor=2.0))),
    ),
    ("gemma3_text", "rope_parameters.full_attention", dict(rope_parameters=dict(full_attention="linear"))),
    ("gemma3_text", "rope_parameters.rope_type", dict(rope_scaling=dict(rope_type="llama3"))),
    ("roberta", "pad_token_id", dict(pad_token_id=None)),
    ("roberta", "max_position_embeddings", dict(max_position_embeddings=2)),
]
"""(family, field to be named, its value or what to put into config.json)."""


def write_config(path: Path, config: dict[str, Any]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(("family", "field", "value"), REFUSED)
def test_a_function_that_would_not_be_reproduced_is_refused_by_name(family, field, value, tmp_path):
    """By convert before anything else is looked for, and in a checkpoint that somebody made by hand."""
    row = ROWS[family]
    fields = value if isinstance(value, dict) and set(value) - {"0"} else {field: value}
    config = config_of(family) | {"architectures": [row.dense_architecture]}
    check_fields(row, config)
    dense = write_config(tmp_path / "dense", config | fields)
    with pytest.raises(ConfigError, match=rf"dense: {field}: .*expected"):
        convert(dense, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    block = dict(format_version=1, num_experts=8, expert_size=32, gate="none", selection="cumulative_mass")
    block |= dict(threshold=None, dense_positions=0, default_tau=1.0, tau_curve=None, base_model="tiny")
    block |= dict(split=dict(method="random", seed=0, source=None))
    named = dict(architectures=[row.architecture], model_type=row.model_type, prunepath_config=block)
    with pytest.raises(ConfigError, match=rf"config\.json: {field}: .*expected"):
        load_prunepath_config(write_config(tmp_path / "made", config | named | fields))


@pytest.mark.parametrize(
    ("family", "fields", "expected"),
    [
        ("gpt2", dict(n_positions=100), 100),
        ("roberta", dict(max_position_embeddings=130), 128),
        ("roberta", dict(max_position_embeddings=130, pad_token_id=3), 126),
        ("llama", dict(max_position_embeddings=100), 100),
        ("llama", dict(max_position_embeddings=100, rope_scaling=dict(type="linear", factor=2.5)), 250),
        ("llama", dict(max_position_embeddings=100) | rope(rope_type="llama3", **LLAMA3), 100),
        ("llama", dict(max_position_embeddings=100) | rope(rope_type="yarn", **YARN), 512),
        ("llama", {}, None),
        ("gemma3_text", dict(max_position_embeddings=100, rope_scaling=dict(rope_type="linear", factor=8.0)), 100),
    ],
)
def test_how_long_a_sequence_may_be(family, fields, expected):
    assert usable_positions(ROWS[family], fields) == expected


@pytest.mark.parametrize(
    ("family", "fields"), [("gpt2", dict(n_positions=20)), ("roberta", dict(max_position_embeddings=22))]
)
def test_a_sequence_beyond_the_position_table_is_refused(family, fields, tmp_path):
    import prunepath_vllm

    prunepath_vllm.register()
    path = save_prunepath(family, tmp_path / family, **fields)
    model: Any = getattr(transformers, ROWS[family].auto_class).from_pretrained(path)
    assert model(input_ids=torch.full((1, 20), 5)).logits.isfinite().all()
    with pytest.raises(UsageError, match="a sequence of 21 tokens; expected at most 20"):
        model(input_ids=torch.full((1, 21), 5))
    if family == "roberta":  # padding takes no position
        padded = torch.tensor([[5] * 20 + [1] * 2])
        assert model(input_ids=padded, attention_mask=(padded != 1).long()).logits.isfinite().all()
    else:
        with pytest.raises(UsageError, match="21 tokens"):
            model.generate(torch.full((1, 19), 5), max_new_tokens=5, do_sample=False, eos_token_id=None)
