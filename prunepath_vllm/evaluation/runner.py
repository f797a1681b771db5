"""Run a task over a checkpoint at several taus: shards of items, kept as they come, then metrics with intervals."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from prunepath_vllm.arguments import require_package
from prunepath_vllm.conversion.text import read_sequences
from prunepath_vllm.devices import check_device
from prunepath_vllm.engine_environment import runs_on_cpu
from prunepath_vllm.errors import CheckpointError, UsageError
from prunepath_vllm.evaluation import tasks
from prunepath_vllm.evaluation.backends import Answer, Backend, Checkpoint, TransformersBackend, VllmBackend
from prunepath_vllm.evaluation.journal import Journal
from prunepath_vllm.evaluation.statistics import estimate
from prunepath_vllm.evaluation.tasks import TASKS, Item, Options, Request, Task
from prunepath_vllm.modeling import load_tokenizer
from prunepath_vllm.version import __version__

BACKENDS = ("vllm", "transformers")
SHARD_ITEMS = {"cpu": 64, "cuda": 256}
"""Asked at a time: what an interruption loses, and what fills a GPU."""
SHARD_SEQUENCES = {"cpu": 8, "cuda": 64}
"""Of a task that reads a text, whose items are long."""
CONTEXT = 1024
DATA_FOLDER = Path(".cache/data")


class Run:
    """One task over one checkpoint.

    Args:
        checkpoint: what to evaluate; a dense one runs once, without tau.
        name: of the task.
        taus: each in (0, 1.05].
        data: folder or file of the task's data; None is where ``prunepath fetch`` puts it.
        backend: one of BACKENDS.
        dense: a dense checkpoint to measure first, with transformers.
        limit: how many items; None takes all.
        options: of the task.
        device: of transformers, "cpu" or "cuda"; the engine has its own.
        journal: file that results are appended to and read back from; None keeps none.
        engine: more arguments of vLLM's LLM.
        like: another run over the checkpoint with this backend: its model answers here as well.

    Raises:
        UsageError: task, data, or options that do not fit the checkpoint or one another.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        name: str,
        taus: Sequence[float],
        *,
        data: Path | None = None,
        backend: str = "transformers",
        dense: Checkpoint | None = None,
        limit: int | None = None,
        options: Options | None = None,
        device: str = "cpu",
        journal: Path | None = None,
        engine: Mapping[str, Any] | None = None,
        like: "Run | None" = None,
    ) -> None:
        if name not in TASKS:
            raise UsageError(f"task: {name!r}; expected one of {', '.join(TASKS)}")
        if limit is not None and limit < 1:
            raise UsageError(f"--limit {limit}; expected 1 or more")
        self.checkpoint, self.name, self.dense, self.device = checkpoint, name, dense, device
        self.task: Task = TASKS[name]
        self.backend, self.engine, self.like = backend, dict(engine or {}), like
        if backend == "vllm":  # the engine chooses for itself
            self.device = "cpu" if runs_on_cpu() else "cuda"
        self.taus: list[float | None] = [None] if checkpoint.prunepath is None else list(dict.fromkeys(taus))
        options = options or Options()
        self._check(options)
        self.tokenizer: Any = load_tokenizer(checkpoint.path)
        self.facts: dict[str, Any] = {}
        items = self._load(data or DATA_FOLDER / self.task.corpus, options)
        self.items = items[:limit]
        self.size = (SHARD_ITEMS if self.task.load else SHARD_SEQUENCES)[self.device]
        self._prepared: tuple[Any, list[Any]] = (None, [])
        self.journal = Journal(
            journal,
            dict(
                version=__version__,
                task=name,
                checkpoint=_fingerprint(checkpoint),
                dense=dense and _fingerprint(dense),
                backend=backend,
                device=self.device,
                items=hashlib.sha256(repr(self.items).encode()).hexdigest(),
                shard=self.size,
            ),
        )

    def _check(self, options: Options) -> None:
        checkpoint, task = self.checkpoint, self.task
        if self.backend not in BACKENDS:
            raise UsageError(f"--backend {self.backend!r}; expected one of {', '.join(BACKENDS)}")
        if self.backend == "transformers":
            check_device(self.device)
        if task.kind == "generation":
            require_package("rouge_score", "eval", f"--task {self.name}")
        for name, value, least in (("shots", options.shots, 0), ("max-tokens", options.max_tokens, 1)):
            if value < least:
                raise UsageError(f"--{name} {value}; expected {least} or more")
        for one in (checkpoint, self.dense):
            if one is not None and one.causal != task.causal:
                wanted = "a causal model" if task.causal else "a classifier"
                raise UsageError(
                    f"{one.path}: {one.family.architecture} has no {task.metrics[0]} on {self.name}; expected {wanted}"
                )
            if one is not None and task.labels and one.labels != task.labels:
                raise UsageError(f"{one.path}: {one.labels} labels; expected the {task.labels} of {self.name}")
        if self.dense is not None and self.dense.prunepath is not None:
            raise UsageError(f"dense model {self.dense.path}: a PrunePath checkpoint; expected a dense one")
        if self.dense is not None and self.backend != "transformers":
            raise UsageError(
                "--dense needs --backend transformers; for the engine's figure give the dense model as CKPT"
            )

    def _load(self, data: Path, options: Options) -> list[Item]:
        if self.task.load is not None:
            self.facts["data"] = data.name
            return self.task.load(data, options)
        # The engine needs room for the token that it always generates.
        room = self.checkpoint.context() - (self.backend == "vllm")
        length = self.checkpoint.context(min(CONTEXT, room) if options.context is None else options.context)
        if length > room and self.backend == "vllm":
            raise UsageError(f"context: {length}; expected at most {room} with the engine")
        text = tasks.data_file(data, tasks.WIKITEXT_FILES)
        sequences = read_sequences(self.tokenizer, text, length=length, max_tokens=options.max_tokens)
        self.facts |= dict(text=text.name, sequences=len(sequences), context=length)
        if self.task.kind == "recall":
            return tasks.needle_items(sequences.tolist(), self.tokenizer, self.task.new_tokens)
        return [Item(tokens=tuple(sequence)) for sequence in sequences.tolist()]

    def results(self) -> dict[str, Any]:
        """Run what the journal lacks.

        Returns:
            A JSON-able mapping: what was measured on, ``points`` (tau, FFN sparsity and each metric; tau None is the
            dense model's) and ``intervals`` (each metric's bootstrap interval, point by point).
        """
        # Every tau of a shard in turn: its texts are tokenised once.
        rounds: list[list[tuple[bool, float | None]]] = [[(False, tau) for tau in self.taus]]
        if self.dense is not None:
            rounds.insert(0, [(True, None)])
        records: dict[tuple[bool, float | None], list[dict[str, Any]]] = {one: [] for part in rounds for one in part}
        with tqdm(total=len(records) * len(self.items), desc=self.name, unit="item") as progress:
            for together in rounds:
                for start in range(0, len(self.items), self.size):
                    for dense, tau in together:
                        shard = self._shard(dense, tau, start)
                        records[dense, tau] += shard
                        progress.update(len(shard))
        points, intervals = [], []
        for (_, tau), answered in records.items():
            estimates = estimate([record["statistics"] for record in answered], self.task.metrics)
            values = {metric: value for metric, (value, _, _) in estimates.items()}
            sparsity = _mean_sparsity([(record["ffn_sparsity"], record["read"]) for record in answered])
            points.append(dict(tau=tau, ffn_sparsity=sparsity, **values))
            intervals.append({metric: [low, high] for metric, (_, low, high) in estimates.items()})
        prunepath = self.checkpoint.prunepath
        return {
            "task": self.name,
            "checkpoint": self.checkpoint.path.resolve().name,
            **self.facts,
            "items": len(self.items),
            "backend": self.backend,
            "device": self.device,
            "dtype": self.checkpoint.dtype,
            "torch": torch.__version__,
            "expert_size": prunepath and prunepath.expert_size,
            "dense_positions": prunepath and prunepath.dense_positions,
            "points": points,
            "intervals": intervals,
        }

    def _shard(self, dense: bool, tau: float | None, start: int) -> list[dict[str, Any]]:
        """Records of the items from `start` on, from the journal or the model."""
        key = f"{'dense' if dense else tau}/{start // self.size}"
        if self.journal.get(key) is None:
            items, model = self.items[start : start + self.size], self._dense if dense else self._model
            if self._prepared[0] != (dense, start):
                self._prepared = (dense, start), prepare(self.task, items, model)
            self.journal.put(key, ask(self.task, items, self._prepared[1], model, tau))
        return self.journal.get(key)

    @cached_property
    def _model(self) -> Backend:
        self.__dict__.pop("_dense", None)  # measured first, and no longer needed
        if self.like is not None:
            return self.like._model
        return (
            VllmBackend(self.checkpoint, self.tokenizer, self.engine)
            if self.backend == "vllm"
            else TransformersBackend(self.checkpoint, self.tokenizer, self.device)
        )

    @cached_property
    def _dense(self) -> Backend:
        assert self.dense is not None
        return TransformersBackend(self.dense, self.tokenizer, self.device)


def prepare(task: Task, items: Sequence[Item], model: Backend) -> list[Any]:
    """What the model reads for these items: requests (one per choice, item after item) or token ids."""
    tokenizer, longest = model.tokenizer, model.max_length
    if task.kind == "perplexity":
        return [Request(list(item.tokens[:1]), list(item.tokens[1:])) for item in items]
    if task.kind == "choice":
        return tasks.choice_requests(items, tokenizer, longest)
    if task.kind == "classification":
        return [tasks.classification_ids(item, tokenizer, longest) for item in items]
    if task.kind == "recall":
        return [list(item.tokens) for item in items]
    return [tasks.generation_prompt(item, tokenizer, longest - task.new_tokens) for item in items]


def ask(
    task: Task, items: Sequence[Item], prepared: list[Any], model: Backend, tau: float | None
) -> list[dict[str, Any]]:
    """One record per item: its statistics, what the model answered, and its FFN sparsity.

    Raises:
        CheckpointError: the model's numbers are not finite, of which no metric can be made.
    """
    details: list[dict[str, Any]]
    if task.kind == "perplexity":
        answers = [[answer] for answer in _finite(model.loglikelihood(prepared, tau), task, tau)]
        details = [
            {"statistics": {"nll": -answer.logprob, "predicted": len(item.tokens) - 1.0}}
            for item, (answer,) in zip(items, answers, strict=True)
        ]
    elif task.kind == "choice":
        flat = iter(_finite(model.loglikelihood(prepared, tau), task, tau))
        answers = [list(islice(flat, len(item.choices))) for item in items]
        logprobs = [[answer.logprob for answer in group] for group in answers]
        details = [
            {"statistics": tasks.score_choices(item, scores), "logprobs": scores}
            for item, scores in zip(items, logprobs, strict=True)
        ]
    elif task.kind == "classification":
        answers = [[answer] for answer in _finite(model.classify(prepared, tau), task, tau)]
        probabilities = [answer.probabilities for (answer,) in answers]
        predicted = [max(range(len(one)), key=one.__getitem__) for one in probabilities]
        details = [
            {"statistics": tasks.score_class(item, label), "probabilities": one}
            for item, label, one in zip(items, predicted, probabilities, strict=True)
        ]
    else:
        score = tasks.score_recall if task.kind == "recall" else tasks.score_text
        answers = [[answer] for answer in model.generate(prepared, tau, task.new_tokens)]
        texts = [
            tasks.answer_text(model.tokenizer.decode(list(answer.tokens), skip_special_tokens=True))
            for (answer,) in answers
        ]
        details = [{"statistics": score(item, text), "text": text} for item, text in zip(items, texts, strict=True)]
    return [{**detail, **_cost(group)} for detail, group in zip(details, answers, strict=True)]


def _finite(answers: Sequence[Answer], task: Task, tau: float | None) -> Sequence[Answer]:
    for answer in answers:
        if not all(map(math.isfinite, (answer.logprob, *answer.probabilities))):
            at = "" if tau is None else f" at tau {tau:g}"
            raise CheckpointError(
                f"{task.corpus}: the model's probabilities{at} are NaN or zero; expected finite logits: are its values "
                "too large for its dtype?"
            )
    return answers


def _cost(answers: Sequence[Answer]) -> dict[str, Any]:
    """FFN sparsity over all tokens read for one item."""
    pairs = [(answer.ffn_sparsity, answer.read) for answer in answers]
    return dict(ffn_sparsity=_mean_sparsity(pairs), read=sum(size for _, size in pairs))


def _mean_sparsity(pairs: Sequence[tuple[float, int]]) -> float:
    """Mean over tokens; a dense model's answers in the engine count none."""
    return sum(sparsity * size for sparsity, size in pairs) / max(1, sum(size for _, size in pairs))


def _fingerprint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Changes when what is measured does; the weights count by size and time of change, a tau curve not at all."""
    files = sorted(checkpoint.path.glob("*.safetensors"))
    weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    config = dict(checkpoint.config)
    if checkpoint.prunepath is not None:
        config["prunepath_config"] = checkpoint.prunepath.model_dump(exclude={"tau_curve"})
    known = repr((sorted(config.items()), weights))
    return dict(name=checkpoint.path.resolve().name, sha256=hashlib.sha256(known.encode()).hexdigest())
