"""Two ways to run a model over an evaluation's requests: transformers, and the engine that will serve it."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig

from prunepath_vllm.checkpoint import CheckpointSummary, read_config, read_tensor_index, validate_checkpoint
from prunepath_vllm.config import PrunePathConfig
from prunepath_vllm.conversion.calibrate import in_a_fast_dtype, load_model, sequence_length
from prunepath_vllm.devices import check_device
from prunepath_vllm.evaluation.tasks import Request
from prunepath_vllm.families import Family, family_of

LONGEST = 4096
"""Tokens of context to use at most."""
BATCH_TOKENS = 2048
"""Padding included, of one forward pass with transformers."""


@dataclass(frozen=True)
class Checkpoint:
    """A PrunePath or dense checkpoint directory to evaluate."""

    path: Path
    family: Family
    config: dict[str, Any]
    summary: CheckpointSummary | None
    """None for a dense one."""

    @property
    def prunepath(self) -> PrunePathConfig | None:
        """None for a dense one."""
        return self.summary.prunepath if self.summary else None

    @property
    def causal(self) -> bool:
        """Whether it is a language model."""
        return self.family.auto_class == "AutoModelForCausalLM"

    @property
    def labels(self) -> int:
        """Classes of a classifier; transformers' default is 2."""
        return int(self.config.get("num_labels") or len(self.config.get("id2label") or (0, 1)))

    @property
    def dtype(self) -> str:
        """As config.json says."""
        return self.config.get("dtype") or self.config.get("torch_dtype") or "float32"

    def context(self, wanted: int | None = None, *, default: int = LONGEST) -> int:
        """Tokens per sequence: `wanted`, or `default` where the model takes that many.

        Raises:
            UsageError: `wanted` is more than the model takes.
        """
        return sequence_length(self.family, self.config, wanted, default=default)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Look a checkpoint directory over: a PrunePath one is validated, a dense one is safetensors of a known family.

    Raises:
        UsageError: no such directory.
        CheckpointError, ConfigError: it is neither.
    """
    path = Path(path)
    config = read_config(path)
    if "prunepath_config" not in config:
        family = family_of(config, converted=False)
        read_tensor_index(path)
        return Checkpoint(path, family, config, None)
    summary = validate_checkpoint(path)
    return Checkpoint(path, summary.family, summary.config, summary)


@dataclass(frozen=True)
class Answer:
    """What a model made of one request."""

    logprob: float = 0.0
    """Of the continuation, summed."""
    probabilities: tuple[float, ...] = ()
    """Of a classifier's labels."""
    tokens: tuple[int, ...] = ()
    """Generated ones, without the end-of-sequence token."""
    read: int = 0
    """Tokens over which the sparsity was counted."""
    ffn_sparsity: float = 0.0
    """Eq. 15 over those tokens and all layers."""


class Backend(Protocol):
    """Answers requests at one tau; None is a dense model's."""

    name: str
    tokenizer: Any
    max_length: int
    """Tokens a request may hold."""

    def loglikelihood(self, requests: Sequence[Request], tau: float | None) -> list[Answer]:
        """Log-likelihood of every continuation after its context."""

    def classify(self, prompts: Sequence[list[int]], tau: float | None) -> list[Answer]:
        """Probabilities of a classifier's labels."""

    def generate(self, prompts: Sequence[list[int]], tau: float | None, new_tokens: int) -> list[Answer]:
        """Greedy continuations."""


class TransformersBackend:
    """The transformers model, in the checkpoint's dtype or one that a CPU multiplies faster; counts experts exactly."""

    name = "transformers"

    def __init__(self, checkpoint: Checkpoint, tokenizer: Any, device: str) -> None:
        check_device(device)
        self.tokenizer = tokenizer
        self.max_length = checkpoint.context() - 1  # as the engine, which always generates one token more
        if checkpoint.summary is None:
            import transformers

            auto_class = getattr(transformers, checkpoint.family.auto_class)
            options = checkpoint.family.dense_options
            model = auto_class.from_pretrained(checkpoint.path, dtype="auto", **options).eval().to(device)
        else:
            model = load_model(checkpoint.summary, device)
        self.model: Any = in_a_fast_dtype(model)

    @torch.inference_mode()
    def loglikelihood(self, requests: Sequence[Request], tau: float | None) -> list[Answer]:
        """See :class:`Backend`."""
        groups = _sharing(requests)
        sequences, members = list(map(list, groups)), list(groups.values())
        answers: dict[int, Answer] = {}
        for batch in self._batches(sequences):
            # Padding stands on the right, where a causal model's tokens do not see it.
            ids, mask = self._pad([sequences[place] for place in batch])
            first = min(len(requests[members[place][0]].context) for place in batch) - 1
            output = self.model(ids, use_cache=False, logits_to_keep=ids.shape[1] - first, **_options(tau))
            counted = _sparsities(output, mask)
            for row, place in enumerate(batch):
                for i in members[place]:
                    start, end = len(requests[i].context) - 1 - first, len(sequences[place]) - first
                    scores = output.logits[row, start:end].float().log_softmax(-1)
                    chosen = torch.tensor(requests[i].continuation, device=ids.device)
                    logprob = scores.gather(1, chosen[:, None]).double().sum().item()
                    answers[i] = Answer(logprob=logprob, read=len(sequences[place]), ffn_sparsity=counted[row])
        return [answers[i] for i in range(len(requests))]

    @torch.inference_mode()
    def classify(self, prompts: Sequence[list[int]], tau: float | None) -> list[Answer]:
        """See :class:`Backend`."""
        answers: dict[int, Answer] = {}
        for batch in self._batches(prompts):
            ids, mask = self._pad([prompts[i] for i in batch])
            output = self.model(ids, attention_mask=mask, **_options(tau))
            counted = _sparsities(output, mask)
            for row, i in enumerate(batch):
                probabilities = tuple(output.logits[row].float().softmax(-1).tolist())
                answers[i] = Answer(probabilities=probabilities, read=len(prompts[i]), ffn_sparsity=counted[row])
        return [answers[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def generate(self, prompts: Sequence[list[int]], tau: float | None, new_tokens: int) -> list[Answer]:
        """See :class:`Backend`. One prompt at a time: padding on the left would move positions."""
        options = {} if tau is None else {"tau": tau}
        # Greedy and nothing else: a checkpoint's own penalties are not the engine's either.
        own = self.model.generation_config
        greedy = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id, do_sample=False)
        answers = []
        for prompt in prompts:
            ids = torch.tensor([prompt], device=self.model.device)
            written = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=greedy, max_new_tokens=new_tokens, **options
            )[0, len(prompt) :].tolist()
            (counted,) = self.loglikelihood([Request(prompt, written)], tau)
            tokens = tuple(written[:-1] if written[-1] in _eos(self.model.generation_config) else written)
            answers.append(Answer(tokens=tokens, read=counted.read, ffn_sparsity=counted.ffn_sparsity))
        return answers

    def _batches(self, sequences: Sequence[list[int]]) -> Iterator[list[int]]:
        """Indices of sequences of similar length, BATCH_TOKENS at a time."""
        batch: list[int] = []
        for i in sorted(range(len(sequences)), key=lambda i: -len(sequences[i])):
            if batch and (len(batch) + 1) * len(sequences[batch[0]]) > BATCH_TOKENS:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _pad(self, sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Ids and mask, int64 [B, S]."""
        pad = self.model.config.pad_token_id or 0
        longest = max(map(len, sequences))
        ids = [[*sequence, *[pad] * (longest - len(sequence))] for sequence in sequences]
        mask = [[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences]
        return torch.tensor(ids, device=self.model.device), torch.tensor(mask, device=self.model.device)


def _options(tau: float | None) -> dict[str, Any]:
    return {} if tau is None else {"tau": tau, "output_router_logits": True}


def _sparsities(output: Any, mask: Tensor) -> list[float]:
    """Each sequence's FFN sparsity, padding left out; 0 for a dense model."""
    if getattr(output, "ffn_sparsity", None) is None:
        return [0.0] * len(mask)
    return ((output.ffn_sparsity * mask).sum(-1) / mask.sum(-1)).mean(0).tolist()


def _eos(generation_config: Any) -> tuple[int, ...]:
    ids = generation_config.eos_token_id
    return tuple(ids) if isinstance(ids, list) else (ids,)


class VllmBackend:
    """vLLM's offline engine, in the checkpoint's dtype; its layers count the experts that ran."""

    name = "vllm"

    def __init__(self, checkpoint: Checkpoint, tokenizer: Any, engine: Mapping[str, Any]) -> None:
        from prunepath_vllm.engine_environment import offline_defaults

        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        options = {"dtype": checkpoint.dtype, "seed": 0, **offline_defaults(), **engine}
        from vllm import LLM

        self.max_length = checkpoint.context() - 1  # one is left for the token that the engine always generates
        self.llm = LLM(str(checkpoint.path), max_model_len=self.max_length + 1, **options)
        self.scores_ids = self.llm.llm_engine.vllm_config.use_v2_model_runner
        """Whether the engine's runner scores given tokens of a prompt, the others not."""
        self.tokenizer = tokenizer
        summary = checkpoint.summary
        self.experts = summary.prunepath.num_experts * summary.num_layers if summary else 0

    def loglikelihood(self, requests: Sequence[Request], tau: float | None) -> list[Answer]:
        """See :class:`Backend`. What the prefix cache holds is not read again, nor counted."""
        groups = _sharing(requests)
        sequences = list(map(list, groups))
        # What each sequence is scored on: its own tokens behind the shortest context, and what may come last.
        starts = [min(len(requests[i].context) for i in members) for members in groups.values()]
        last = [sorted({requests[i].continuation[-1] for i in members}) for members in groups.values()]
        results = self._score(sequences, starts, last, tau)
        answers: dict[int, Answer] = {}
        for members, start, (inner, final, cost) in zip(groups.values(), starts, results, strict=True):
            for i in members:
                context, continuation = requests[i].context, requests[i].continuation
                logprob = sum(inner[len(context) - start :]) + final[continuation[-1]].logprob
                answers[i] = Answer(logprob=logprob, **cost)
        return [answers[i] for i in range(len(requests))]

    def _score(
        self, sequences: Sequence[list[int]], starts: Sequence[int], last: Sequence[list[int]], tau: float | None
    ) -> list[tuple[list[float], Any, dict[str, Any]]]:
        """Per sequence: log-probabilities of its tokens from `start` on, those of its `last` candidates, its cost."""
        options = [dict(max_tokens=1, logprob_token_ids=one) for one in last]
        for option, sequence, start in zip(options, sequences, starts, strict=True):
            if start == len(sequence):
                continue
            if self.scores_ids:
                ids = [[token] for token in sequence[start:]]
                option |= dict(prompt_logprob_token_ids=ids, prompt_logprob_start=start - 1)
                option |= dict(skip_reading_prefix_cache=False)
            else:  # the engine computes it anew, without its prefix cache, and every token's
                option |= dict(prompt_logprobs=0)
        results = self._run(sequences, tau, options)
        # Where two continuations begin alike, the cache may hold tokens that are to be scored: once more, without it.
        again = [
            i
            for i, (output, _) in enumerate(results)
            if "prompt_logprob_start" in options[i] and output.prompt_token_id_logprobs is None
        ]
        for i in again:
            options[i]["skip_reading_prefix_cache"] = True
        anew = self._run([sequences[i] for i in again], tau, [options[i] for i in again])
        for i, result in zip(again, anew, strict=True):
            results[i] = result
        scored = []
        for sequence, start, (output, cost) in zip(sequences, starts, results, strict=True):
            inner: list[float] = []
            if output.prompt_token_id_logprobs is not None:
                inner = output.prompt_token_id_logprobs[:, 0].tolist()
            elif start < len(sequence):
                inner = [
                    place[token].logprob
                    for token, place in zip(sequence[start:], output.prompt_logprobs[start:], strict=True)
                ]
            scored.append((inner, output.outputs[0].logprobs[0], cost))
        return scored

    def classify(self, prompts: Sequence[list[int]], tau: float | None) -> list[Answer]:
        """See :class:`Backend`."""
        from vllm import PoolingParams

        params = [PoolingParams(extra_kwargs=self._extra(tau, i)) for i in range(len(prompts))]
        outputs = self.llm.classify(
            [{"prompt_token_ids": prompt} for prompt in prompts], pooling_params=params, use_tqdm=False
        )
        return [
            Answer(probabilities=tuple(output.outputs.probs), **self._cost(tau, i)) for i, output in enumerate(outputs)
        ]

    def generate(self, prompts: Sequence[list[int]], tau: float | None, new_tokens: int) -> list[Answer]:
        """See :class:`Backend`."""
        results = self._run(prompts, tau, [dict(max_tokens=new_tokens)] * len(prompts))
        return [Answer(tokens=_without_eos(output.outputs[0]), **cost) for output, cost in results]

    def _run(
        self, prompts: Sequence[list[int]], tau: float | None, options: Sequence[dict[str, Any]]
    ) -> list[tuple[Any, dict[str, Any]]]:
        from vllm import SamplingParams

        from prunepath_vllm.model_executor.counts import MAX_REPORTS

        params = [
            SamplingParams(temperature=0, extra_args=self._extra(tau, i), detokenize=False, **one)
            for i, one in enumerate(options)
        ]
        results: list[tuple[Any, dict[str, Any]]] = []
        for start in range(0, len(prompts), MAX_REPORTS):  # as many as the workers keep reports of
            part = slice(start, start + MAX_REPORTS)
            given = [{"prompt_token_ids": prompt} for prompt in prompts[part]]
            outputs = self.llm.generate(given, params[part], use_tqdm=False)
            results += [(output, self._cost(tau, start + i)) for i, output in enumerate(outputs)]
        return results

    def _extra(self, tau: float | None, i: int) -> dict[str, Any]:
        """What the i-th request of a call says to our layers; nothing to a dense model."""
        from prunepath_vllm.model_executor.counts import REPORT_KEY

        return {} if tau is None else {"tau": tau, REPORT_KEY: f"eval-{i}"}

    def _cost(self, tau: float | None, i: int) -> dict[str, Any]:
        """What the workers counted for it, as fields of an Answer."""
        if tau is None:
            return {}
        stages = filter(None, self.llm.collective_rpc("prunepath_report", args=(f"eval-{i}",)))
        parts = [part for stage in stages for part in stage]  # of prompt and answer, by pipeline stage
        active = sum(sum(layers) for layers, _ in parts)
        possible = sum(len(layers) * of_each for layers, of_each in parts)
        return dict(read=possible // self.experts, ffn_sparsity=1 - active / possible)


def _sharing(requests: Sequence[Request]) -> dict[tuple[int, ...], list[int]]:
    """Sequences to read, each with the requests it answers: nothing needs to read a request's last token.

    So the choices of a multiple-choice question whose answers are single letters are one sequence.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, request in enumerate(requests):
        groups.setdefault((*request.context, *request.continuation[:-1]), []).append(i)
    return groups


def _without_eos(completion: Any) -> tuple[int, ...]:
    tokens = tuple(completion.token_ids)
    return tokens[:-1] if completion.finish_reason == "stop" else tokens
