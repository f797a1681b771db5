"""Tiny random checkpoints of every family, dense and PrunePath, for tests of structure, not quality."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from prunepath_vllm.checkpoint import WEIGHTS_FILE
from prunepath_vllm.families import FAMILIES

_GEMMA: dict[str, Any] = dict(head_dim=32, query_pre_attn_scalar=24, sliding_window=16, tie_word_embeddings=True)
GLU_MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, dict(tie_word_embeddings=True)),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, dict(head_dim=32)),
    "mistral": (MistralConfig, MistralForCausalLM, dict(sliding_window=16)),
    "phi3": (Phi3Config, Phi3ForCausalLM, dict(sliding_window=16)),
    "granite": (
        GraniteConfig,
        GraniteForCausalLM,
        dict(
            embedding_multiplier=4.0,
            logits_scaling=0.5,
            residual_multiplier=0.7,
            attention_multiplier=0.2,
            tie_word_embeddings=True,
        ),
    ),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, dict(attn_logit_softcapping=5.0, **_GEMMA)),
    "gemma3_text": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        dict(final_logit_softcapping=20.0, sliding_window_pattern=2, **_GEMMA),
    ),
}
"""Configuration, model, and what a tiny one differs in; one line more for a family that is a row of families.py."""

FAMILY_NAMES = (*GLU_MODELS, "gpt2", "roberta")
CAUSAL_FAMILY_NAMES = (*GLU_MODELS, "gpt2")
ENGINE_FAMILY_NAMES = ("llama", "qwen2", "gpt2")
"""With engines of their own in every scenario; those of the other families share a process."""
HIDDEN, INTERMEDIATE, LAYERS, HEADS, VOCAB, MAX_POSITIONS = 64, 256, 3, 2, 320, 512
"""head_dim is 32: the smallest that vLLM's CPU attention takes."""

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: one token per byte, plus <s>, </s>, <pad>, <unk>."""
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_dense(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides) -> PreTrainedModel:
    """A dense model with random weights, scaled up so that its logits are far from ties."""
    ids = dict(bos_token_id=0, pad_token_id=1, eos_token_id=2)
    glu = dict(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        vocab_size=VOCAB,
        max_position_embeddings=MAX_POSITIONS,
        **ids,
    )
    torch.manual_seed(seed)
    model: PreTrainedModel
    if family in GLU_MODELS:
        config_class, model_class, own = GLU_MODELS[family]
        config = config_class(**{**glu, **own, **overrides})
        model = model_class._from_config(config, attn_implementation="eager" if family == "gemma2" else None)
    elif family == "gpt2":
        gpt2 = dict(n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, vocab_size=VOCAB, n_positions=MAX_POSITIONS, **ids)
        model = GPT2LMHeadModel(GPT2Config(**{**gpt2, **overrides}))
    elif family == "roberta":
        roberta = dict(
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            vocab_size=VOCAB,
            max_position_embeddings=MAX_POSITIONS + 2,
            type_vocab_size=1,
            num_labels=3,
            **ids,
        )
        model = RobertaForSequenceClassification(RobertaConfig(**{**roberta, **overrides}))
    else:
        raise ValueError(family)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.to(dtype).eval()


def split_gate_up(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Phi-3's tensors under the names that a converted checkpoint has."""
    result = {}
    for name, tensor in tensors.items():
        gate = name.replace(".gate_up_proj.", ".gate_proj.")
        result |= {name: tensor}
        if gate != name:
            del result[name]
            result[gate], result[name.replace(".gate_up_proj.", ".up_proj.")] = tensor.chunk(2)
    return result


def save_dense(family: str, path: Path, **kwargs) -> Path:
    """Save a dense checkpoint directory with its tokenizer and return its path."""
    model = build_dense(family, **kwargs)
    model.save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


def save_prunepath(
    family: str,
    path: Path,
    *,
    expert_size: int = 32,
    gate: str = "none",
    selection: str = "cumulative_mass",
    threshold: float | None = None,
    dense_positions: int = 0,
    default_tau: float = 1.0,
    tau_curve: list[list[float]] | None = None,
    router_bias: bool = False,
    router_scale: float = 0.15,
    router_input: str = "ffn",
    router_rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **overrides,
) -> Path:
    """Save ``build_dense(family, dtype=dtype, seed=seed, **overrides)`` as a PrunePath checkpoint and return its path.

    Written by hand from the dense state dict, independent of the package's conversion and models: neurons randomly
    permuted, random routers (logits of standard deviation about 8 * `router_scale`, so that a tau sweep selects from
    one expert to all), the second linear doubled under the sigmoid gate. At tau >= 1 it is the dense model where
    gate is "none", or "sigmoid" with ``router_scale=0``.
    """
    row = next(row for row in FAMILIES if row.name == family)
    dense = build_dense(family, dtype=dtype, seed=seed, **overrides)
    config = json.loads(dense.config.to_json_string(use_diff=False))
    tensors = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    if family == "phi3":
        tensors = split_gate_up(tensors)
    if config["tie_word_embeddings"]:
        tensors.pop("lm_head.weight", None)

    hidden, intermediate = row.hidden_size(config), row.intermediate_size(config)
    num_experts = intermediate // expert_size
    generator = torch.Generator().manual_seed(seed + 1)
    for layer in range(row.num_layers(config)):
        order = torch.randperm(intermediate, generator=generator)
        for name in row.inputs(layer):
            weight = tensors[f"{name}.weight"]
            tensors[f"{name}.weight"] = weight[:, order] if row.conv1d else weight[order]
            if f"{name}.bias" in tensors:
                tensors[f"{name}.bias"] = tensors[f"{name}.bias"][order]
        down = f"{row.output(layer)}.weight"
        tensors[down] = tensors[down][order] if row.conv1d else tensors[down][:, order]
        if gate == "sigmoid":
            tensors[down] = 2 * tensors[down]
        router = torch.randn(num_experts, router_rank or hidden, generator=generator) * router_scale
        if router_rank is not None:
            down = torch.randn(router_rank, hidden, generator=generator) / router_rank**0.5
            tensors[f"{row.router(layer)}.down.weight"] = down.to(dtype)
        tensors[f"{row.router(layer)}.weight"] = router.to(dtype)
        if router_bias:
            tensors[f"{row.router(layer)}.bias"] = torch.randn(num_experts, generator=generator).to(dtype) * 0.5

    config["architectures"] = [row.architecture]
    config["model_type"] = row.model_type
    config["prunepath_config"] = dict(
        format_version=1,
        num_experts=num_experts,
        expert_size=expert_size,
        selection=selection,
        threshold=threshold,
        gate=gate,
        dense_positions=dense_positions,
        default_tau=default_tau,
        tau_curve=tau_curve,
        split=dict(method="random", seed=seed, source=None),
        base_model=f"tiny-{family}",
    )
    if (router_input, router_rank) != ("ffn", None):
        config["prunepath_config"] |= dict(format_version=2, router=dict(input=router_input, rank=router_rank))
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors", {"format": "pt"}
    )
    if dense.can_generate():
        dense.generation_config.save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


def tokens(batch: int, length: int) -> torch.Tensor:
    """Random token ids of a tiny model, the same in every call."""
    return torch.randint(4, 300, (batch, length), generator=torch.Generator().manual_seed(0))


def block(path: Path) -> dict:
    """The prunepath_config of a checkpoint."""
    return json.loads((path / "config.json").read_text())["prunepath_config"]


def block_fields(**changes) -> dict:
    """A right prunepath_config of format 2 for a tiny model, and what a test changes in it."""
    fields = dict(format_version=2, num_experts=8, expert_size=32, gate="none", split=dict(method="random", seed=0))
    return fields | changes


def edit_config(path: Path, **fields: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | fields))


def edit_tensors(path: Path, **tensors: torch.Tensor) -> None:
    save_file(load_file(path / WEIGHTS_FILE) | tensors, path / WEIGHTS_FILE)
