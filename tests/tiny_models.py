"""Tiny random dense checkpoints of every family, with a byte-level tokenizer, for tests of structure, not quality."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

FAMILY_NAMES = ("llama", "qwen2", "gpt2", "roberta")
CAUSAL_FAMILY_NAMES = ("llama", "qwen2", "gpt2")
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
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**{**glu, **overrides}))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**{**glu, "tie_word_embeddings": True, **overrides}))
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


def save_dense(family: str, path: Path, **kwargs) -> Path:
    """Save a dense checkpoint directory with its tokenizer and return its path."""
    model = build_dense(family, **kwargs)
    model.save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path
