"""The routed feed-forward layer (arXiv 2605.28283, eq. 7-10) written out one token and one expert at a time.

Reads checkpoints by itself and shares no code with the package, so that models and engine can be compared with it.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, PreTrainedModel, RobertaForSequenceClassification


def active_experts(logits: Tensor, tau: float, *, selection: str, threshold: float | None) -> list[int]:
    """The active experts of one token, ascending. `logits` is [E]."""
    num_experts = len(logits)
    if tau >= 1:
        return list(range(num_experts))
    if selection == "threshold":
        assert threshold is not None
        return [e for e in range(num_experts) if 1 / (1 + math.exp(-logits[e].item())) > threshold]
    probabilities = torch.softmax(logits.float(), dim=0).tolist()
    ranked = sorted(range(num_experts), key=lambda e: (-probabilities[e], e))
    active = [ranked[0]]
    mass = probabilities[ranked[0]]
    for expert in ranked[1:]:
        mass += probabilities[expert]
        if not mass < tau:
            break
        active.append(expert)
    return sorted(active)


class NaiveFFN(nn.Module):
    """Replaces a dense model's feed-forward layer; all weights [out, in]. Takes one sequence from its position 0 on."""

    def __init__(self, block: dict, router: dict, up: dict, down: dict, gate: dict | None, activation: Any) -> None:
        super().__init__()
        self.block, self.router, self.up, self.down, self.gate = block, router, up, down, gate
        self.activation = activation
        self.tau: float | list[float] = 1.0  # of all tokens, or of each
        self.attention_input: Tensor | None = None
        self.active_counts: list[int] = []

    def token(self, x: Tensor, routed: Tensor, tau: float) -> Tensor:
        """One token: x [H] to y [H]; `routed` [H] is what the router reads."""
        size = self.block["expert_size"]
        if "down.weight" in self.router:
            routed = self.router["down.weight"] @ routed
        logits = linear(routed, self.router)
        active = active_experts(logits, tau, selection=self.block["selection"], threshold=self.block["threshold"])
        self.active_counts.append(len(active))
        y = torch.zeros_like(x)
        for expert in active:
            rows = slice(expert * size, (expert + 1) * size)
            neurons = linear(x, self.up, rows)
            if self.gate is None:
                neurons = self.activation(neurons)
            else:
                neurons = self.activation(linear(x, self.gate, rows)) * neurons
            output = self.down["weight"][:, rows] @ neurons
            y = y + (torch.sigmoid(logits[expert]) * output if self.block["gate"] == "sigmoid" else output)
        return y + self.down["bias"] if "bias" in self.down else y

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        assert batch == 1
        dense_positions = self.block["dense_positions"]
        routed = x
        if self.block.get("router", {}).get("input") == "attention":
            routed = self.attention_input
        given = self.tau if isinstance(self.tau, list) else [self.tau] * length
        taus = [1.0 if s < dense_positions else given[s] for s in range(length)]
        tokens = [self.token(x[0, s], routed[0, s], taus[s]) for s in range(length)]
        return torch.stack(tokens).unsqueeze(0)


def linear(x: Tensor, parameters: dict[str, Tensor], rows: slice = slice(None)) -> Tensor:
    """Some rows of a linear layer, on one token."""
    y = parameters["weight"][rows] @ x
    return y + parameters["bias"][rows] if "bias" in parameters else y


def load_naive(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The dense model of a PrunePath checkpoint directory, its feed-forward layers replaced by :class:`NaiveFFN`."""
    config = json.loads((path / "config.json").read_text())
    block = config.pop("prunepath_config")
    model_class = getattr(transformers, config.pop("architectures")[0].removeprefix("PrunePath"))
    del config["model_type"]
    # Eager attention: the default one leaves out the cap that Gemma 2 puts on scores.
    dense = model_class._from_config(model_class.config_class(**config), attn_implementation="eager")
    model: PreTrainedModel = dense.to(dtype).eval()
    stored = load_file(path / "model.safetensors")
    tensors = {
        name: widened(tensor, stored.get(f"{name}_scale")).to(dtype)
        for name, tensor in stored.items()
        if not name.endswith(".weight_scale")
    }
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    # Phi-3's dense model has one linear where its checkpoint has gate_proj and up_proj; both are replaced below.
    missing = [name for name in missing if ".gate_up_proj." not in name]
    unexpected = [name for name in unexpected if not name.endswith((".gate_proj.weight", ".up_proj.weight"))]
    assert set(missing) <= {"lm_head.weight"}
    assert all(".router." in name for name in unexpected)
    model.tie_weights()

    def parameters(name: str, transpose: bool = False) -> dict[str, Tensor]:
        kinds = ("weight", "bias", "down.weight")
        found = {kind: tensors[f"{name}.{kind}"] for kind in kinds if f"{name}.{kind}" in tensors}
        return {"weight": found["weight"].t(), "bias": found["bias"]} if transpose else found

    if isinstance(model, GPT2LMHeadModel):
        for index, layer in enumerate(model.transformer.h):
            name = f"transformer.h.{index}.mlp"
            up, down = parameters(f"{name}.c_fc", transpose=True), parameters(f"{name}.c_proj", transpose=True)
            gelu_tanh = lambda x: F.gelu(x, approximate="tanh")  # noqa: E731
            layer.mlp = NaiveFFN(block, parameters(f"{name}.router"), up, down, None, gelu_tanh)
            watch_attention(layer.attn, layer.mlp)
    elif isinstance(model, RobertaForSequenceClassification):
        for index, layer in enumerate(model.roberta.encoder.layer):
            name = f"roberta.encoder.layer.{index}"
            up, down = parameters(f"{name}.intermediate.dense"), parameters(f"{name}.output.dense")
            layer.intermediate = nn.Identity()
            layer.output.dense = NaiveFFN(block, parameters(f"{name}.intermediate.router"), up, down, None, F.gelu)
            watch_attention(layer.attention, layer.output.dense)
    else:
        gelu = "hidden_activation" in config  # Gemma's; silu is what the other tiny models have
        glu_activation = (lambda x: F.gelu(x, approximate="tanh")) if gelu else F.silu
        for index, layer in enumerate(model.model.layers):
            name = f"model.layers.{index}.mlp"
            gate, up, down = (parameters(f"{name}.{kind}_proj") for kind in ("gate", "up", "down"))
            layer.mlp = NaiveFFN(block, parameters(f"{name}.router"), up, down, gate, glu_activation)
            watch_attention(layer.self_attn, layer.mlp)
    return model


def widened(tensor: Tensor, scales: Tensor | None) -> Tensor:
    """A weight of quantised experts, one scale a neuron; others as they are. Neurons are more than the width."""
    if scales is None:
        return tensor
    if scales.dim() == 2:  # of the attention, one scale an output
        return tensor.float() * scales
    assert len(scales) == max(tensor.shape) > min(tensor.shape)
    shape = [-1 if size == len(scales) else 1 for size in tensor.shape]
    return tensor.float() * scales.view(shape)


def watch_attention(attention: nn.Module, ffn: NaiveFFN) -> None:
    """Keep what enters a block's self-attention module, for routers that read it."""

    def keep(_: nn.Module, args: tuple, kwargs: dict) -> None:
        ffn.attention_input = args[0] if args else kwargs["hidden_states"]

    attention.register_forward_pre_hook(keep, with_kwargs=True)


@torch.no_grad()
def naive_logits(model: PreTrainedModel, input_ids: list[int], tau: float | list[float]) -> Tensor:
    """Logits of one sequence, at one tau or one for each token: [S, vocab], or [num_labels] of a classifier."""
    for module in model.modules():
        if isinstance(module, NaiveFFN):
            module.tau = tau
            module.active_counts.clear()
    return model(torch.tensor([input_ids])).logits[0]


def naive_sparsity(model: PreTrainedModel) -> Tensor:
    """[L, S] FFN sparsity of the tokens of the last :func:`naive_logits`."""
    layers = [module for module in model.modules() if isinstance(module, NaiveFFN)]
    return torch.tensor([[1 - count / ffn.block["num_experts"] for count in ffn.active_counts] for ffn in layers])


def logits_of_answer(model: PreTrainedModel, prompt: list[int], tokens: list[int], tau: float) -> Tensor:
    """[len(tokens), V]: what each token of an answer to `prompt` was chosen from."""
    return naive_logits(model, [*prompt, *tokens[:-1]], tau)[len(prompt) - 1 :]


def naive_generate(model: PreTrainedModel, input_ids: list[int], tau: float, max_new_tokens: int) -> list[int]:
    """Greedy continuation without a KV cache or an end: the new tokens."""
    tokens = list(input_ids)
    for _ in range(max_new_tokens):
        tokens.append(int(naive_logits(model, tokens, tau)[-1].argmax()))
    return tokens[len(input_ids) :]
