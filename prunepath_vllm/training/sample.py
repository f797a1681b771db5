"""Text of a model's own, to distil it on: fresh where a corpus would be read many times over.

A batch of sequences grows together, one token a step; on a GPU the step is a CUDA graph. Key-value caches are
transformers' static ones, of which a step reads only the part that is filled.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer

from prunepath_vllm.errors import UsageError

ATTENTION = "prunepath_grouped"
"""Name of :func:`grouped_attention` among transformers' attention functions."""
WINDOW = 128
"""The cache is read in multiples of this many positions; one CUDA graph for each."""


def sample(
    model: PreTrainedModel,
    prompts: np.ndarray,
    *,
    tokens: int,
    length: int,
    prompt_length: int,
    batch: int,
    vocabulary: int | None = None,
    temperature: float = 1.0,
    max_minutes: float | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Continue pieces of a text, picked at random, with tokens drawn from a model's distribution.

    A sequence goes on after the EOS token, as packed training data does.

    Args:
        model: causal, in evaluation mode, on the device to compute on; its attention function is replaced.
        prompts: token ids of the text, one dimension.
        tokens: how many to make at least, prompts included; whole batches are made.
        length: tokens of a sequence.
        prompt_length: of these, taken from `prompts`.
        batch: sequences that grow together.
        vocabulary: draw ids below this one only; None for all that the model has, which can be more than its tokenizer.
        temperature: of the distribution; 1 is the model's own.
        max_minutes: make no further batch after this time.
        seed: of the pieces and the draws.

    Returns:
        int64 [N, length].

    Raises:
        UsageError: a length that does not fit the text, the model's context, or each other.
    """
    context = model.config.max_position_embeddings
    if not 0 < prompt_length < length <= context:
        raise UsageError(
            f"prompt length {prompt_length}, length {length}: expected 0 < prompt length < length <= {context}, "
            "the model's context"
        )
    if len(prompts) < prompt_length:
        raise UsageError(f"prompts: {len(prompts)} tokens; expected at least {prompt_length}, the prompt length")
    began = time.monotonic()
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    decoder = Decoder(model, batch, length, temperature, vocabulary)
    made: list[np.ndarray] = []
    with tqdm(total=tokens, desc="sampling", unit="token", unit_scale=True) as progress:
        while len(made) * batch * length < tokens:
            starts = random.integers(len(prompts) - prompt_length + 1, size=batch)
            pieces = np.stack([prompts[start : start + prompt_length] for start in starts]).astype(np.int64)
            made.append(decoder.continue_(torch.from_numpy(pieces), progress.update).cpu().numpy())
            if max_minutes is not None and time.monotonic() - began > 60 * max_minutes:
                break
    return np.concatenate(made)


class Decoder:
    """Draws the next token of `batch` sequences of one length, over and over."""

    def __init__(
        self, model: PreTrainedModel, batch: int, length: int, temperature: float, vocabulary: int | None = None
    ) -> None:
        """Set up the caches; on a GPU, capture the step's graphs.

        Args:
            model: as :func:`sample` takes it.
            batch: B, sequences.
            length: positions of a sequence.
            temperature: divides the logits.
            vocabulary: as :func:`sample` takes it.
        """
        AttentionInterface.register(ATTENTION, grouped_attention)
        model.set_attn_implementation(ATTENTION)
        self.model, self.length, self.temperature, self.vocabulary = model, length, temperature, vocabulary
        self.layers = [_Windowed(max_cache_len=length) for _ in range(model.config.num_hidden_layers)]
        self.cache = Cache(layers=self.layers)
        device = model.device
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        """The tokens of one position going in, those of the next coming out."""
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self.positions = torch.arange(length, device=device)
        self.graphs: dict[int, Callable[[], Any]] = {}
        if device.type == "cuda":
            self._capture()

    def _capture(self) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            self._step(min(WINDOW, self.length))  # allocates the caches
        torch.cuda.synchronize()
        pool = None
        for window in range(min(WINDOW, self.length), self.length + WINDOW, WINDOW):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._step(min(window, self.length))
            pool = graph.pool()
            self.graphs[min(window, self.length)] = graph.replay

    @torch.no_grad()
    def _step(self, window: int) -> None:
        """Read the tokens at `position`, of which the first `window` hold all so far; draw the next; move on."""
        for layer in self.layers:
            layer.window = window
        logits = self.model(
            input_ids=self.ids,
            attention_mask=(self.positions[:window] <= self.position).view(1, 1, 1, window),
            position_ids=self.position.view(1, 1),
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1, : self.vocabulary]
        p = (logits.float() / self.temperature).softmax(dim=-1)
        # The largest p over an exponential draw falls on each token with its probability; multinomial would wait.
        self.ids.copy_((p / torch.empty_like(p).exponential_()).argmax(dim=-1, keepdim=True))
        self.position.add_(1)

    def continue_(self, prompts: Tensor, report: Callable[[int], Any] = lambda tokens: None) -> Tensor:
        """Continue each prompt, int64 [B, P], to the whole length: int64 [B, length].

        `report` is told how many tokens were made since it was told last.
        """
        tokens = torch.zeros(len(prompts), self.length, dtype=torch.int64, device=self.ids.device)
        given = prompts.shape[1]
        tokens[:, :given] = prompts.to(tokens.device)
        self.position.zero_()
        for layer in self.layers:
            layer.cumulative_length.zero_()
        for position in range(self.length - 1):
            if position < given:
                self.ids.copy_(tokens[:, position : position + 1])
            window = min((position // WINDOW + 1) * WINDOW, self.length)
            self.graphs[window]() if self.graphs else self._step(window)
            if position >= given - 1:
                tokens[:, position + 1 : position + 2] = self.ids
            report(len(tokens))
        report(len(tokens))
        return tokens


class _Windowed(StaticLayer):
    """A static cache that shows only its first positions."""

    window = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys[:, :, : self.window], values[:, :, : self.window]


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in which the query heads of a group share one product, so that keys and values are read once.

    Args:
        module: the caller; unused.
        query: [B, heads, 1, D].
        key: [B, groups, L, D]; heads / groups neighbouring heads share a group.
        value: like `key`.
        attention_mask: bool [1, 1, 1, L], true where a key counts; None for all.
        scaling: of the scores; None for 1 / sqrt(D).
        **kwargs: what other attention functions take; unused.

    Returns:
        ([B, 1, heads, D], None).
    """
    sequences, heads, _, width = query.shape
    groups = key.shape[1]
    scores = query.view(sequences, groups, heads // groups, width) @ key.transpose(-1, -2)
    scores = scores.float() * (width**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    output = scores.softmax(dim=-1).to(value.dtype) @ value
    return output.view(sequences, 1, heads, width), None
