"""Text files as equally long sequences of tokens, for calibration and perplexity."""

import gzip
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prunepath_vllm.errors import UsageError

CHARACTERS_PER_TOKEN = 16
"""How much text is tokenised at most per token wanted; real text has 3 to 5 characters a token."""


def read_sequences(
    tokenizer: PreTrainedTokenizerBase, text: str | Path, *, length: int, max_tokens: int, minimum: int = 1
) -> Tensor:
    """Cut the beginning of a text into sequences, each with the special tokens the tokenizer adds.

    Args:
        tokenizer: a fast tokenizer.
        text: UTF-8 file, gzipped where its name ends in ``.gz``.
        length: tokens per sequence, special tokens included; what does not fill a last sequence is left out.
        max_tokens: at most this many tokens in all.
        minimum: fewest sequences to accept.

    Returns:
        int64 [sequences, length].

    Raises:
        UsageError: no such file, not UTF-8 text, too short, or `max_tokens` below `minimum` sequences.
    """
    if max_tokens < minimum * length:
        raise UsageError(f"max tokens: {max_tokens}; expected at least {minimum * length}, {minimum} x {length}")
    text = Path(text)
    opener = gzip.open if text.suffix == ".gz" else open
    try:
        with opener(text, "rt", encoding="utf-8") as file:
            content = file.read(max_tokens * CHARACTERS_PER_TOKEN)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UsageError(f"text {text}: expected a readable UTF-8 text file ({reason})") from None
    # Cut here: what a tokenizer returns as overflow differs between releases of transformers.
    tokens = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    before, after = special_tokens(tokenizer)
    room = length - len(before) - len(after)
    starts = range(0, len(tokens) - room + 1, room)[: max_tokens // length]
    if len(starts) < minimum:
        raise UsageError(
            f"text {text}: {len(tokens)} tokens; expected at least {minimum * room}, {minimum} sequences of {length}"
        )
    return torch.tensor([before + tokens[start : start + room] + after for start in starts])


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The token ids that a tokenizer puts before and behind a text."""
    text = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    at = next(at for at in range(len(whole)) if whole[at : at + len(text)] == text)
    return whole[:at], whole[at + len(text) :]
