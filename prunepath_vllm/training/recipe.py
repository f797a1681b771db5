"""The recipe of a training: one schema for the YAML file, ``--set`` and docs/reference/recipe.md."""

import os.path
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from prunepath_vllm.arguments import MAX_SEED
from prunepath_vllm.config import is_threshold
from prunepath_vllm.errors import UsageError
from prunepath_vllm.tau import MAX_TAU, MIN_FLOAT32, parse_tau

RECIPE_FILE = "recipe.yaml"

Location = Annotated[str, AfterValidator(os.path.expanduser)]
"""A file, a directory, or a Hugging Face name; no shell has expanded a ~ in a YAML file."""


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Conversion(Section):
    """How a dense model becomes the starting point."""

    expert_size: int = Field(default=8, gt=0, description="neurons per expert")
    split: Literal["kmeans", "coactivation", "random"] = Field(default="kmeans", description="how neurons are grouped")
    gate: Literal["none", "sigmoid"] = Field(
        default="none", description="whether expert outputs are multiplied by sigmoid(g)"
    )
    router: Literal["calibrated", "zero", "random"] = Field(
        default="calibrated", description="routers at the start: fitted to `text`, zero, or normal with deviation 0.02"
    )
    router_input: Literal["ffn", "attention"] = Field(
        default="ffn", description="what routers read: the feed-forward layer's input, or the self-attention's"
    )
    router_rank: int | None = Field(
        default=None, gt=0, description="rank of the routers, products of two thin matrices; null: one full matrix"
    )
    text: Location | None = Field(
        default=None, description="text file for calibrated routers and the co-activation split"
    )
    tokens: int = Field(default=32768, gt=0, description="how much of `text` calibration reads")
    dense_positions: int = Field(default=1, ge=0, description="tokens at positions below it use every expert")


class Model(Section):
    """What is trained."""

    path: Location = Field(
        description="PrunePath checkpoint, or dense model (directory or Hugging Face name) to convert"
    )
    convert: Conversion | None = Field(
        default=None, description="how to convert a dense `path`; null trains `path` as it is"
    )
    adapter: Location | None = Field(
        default=None, description="adapter.safetensors that a run made of the dense model `path`, to go on from"
    )
    scratch: dict[str, Any] | None = Field(
        default=None, description="config.json fields of a new random dense model; `path` then gives its tokenizer"
    )
    rank: int | None = Field(
        default=None, gt=0, description="low-rank updates of this rank instead of full fine-tuning"
    )
    dense: Location | None = Field(
        default=None, description="dense model the checkpoint was converted from; needed with `rank`"
    )
    embeddings: Literal["trained", "frozen"] = Field(
        default="trained", description="frozen: token embeddings and output head stay as they are"
    )
    adapter_bits: float | None = Field(
        default=None, gt=0, le=6,
        description="also write adapter.safetensors: weights' changes, rounded to so many bits, mean over the matrices",
    )  # fmt: skip
    adapter_sequences: int = Field(
        default=64, ge=0, description="training sequences that this rounding is fitted to (causal models); 0: to none"
    )
    labels: int | None = Field(
        default=None, gt=1, description="classes of a new classification head; null keeps the head"
    )


class Source(Section):
    """One data set."""

    path: Location = Field(
        description=".txt, .jsonl (both also .gz), .npy of token ids, or a Hugging Face data set's name"
    )
    config: str | None = Field(default=None, description="configuration of a Hugging Face data set")
    split: str = Field(default="train", description="split of a Hugging Face data set")
    text: str = Field(default="{text}", description="a row's text, made of its columns (labelled texts, documents)")
    text_pair: str | None = Field(default=None, description="a labelled row's second text, likewise")
    eos: bool = Field(default=True, description="end every document with the EOS token")
    repeat: int = Field(default=1, gt=0, description="passes over it in one epoch")


class Data(Section):
    """What it is trained on."""

    task: Literal["causal", "chat", "classification"] = Field(
        default="causal", description="packed text; packed conversations with loss on answers only; labelled texts"
    )
    train: list[Source] = Field(min_length=1, description="training data sets, mixed")
    sequence_length: int = Field(default=1024, gt=1, description="tokens per sequence")
    max_tokens: int | None = Field(
        default=None, gt=0, description="tokens taken of each data set at most; null takes all"
    )


class Losses(Section):
    """Weights of the loss terms beside the task's, each averaged over layers."""

    entropy: float = Field(default=0.0, ge=0, description="eta, eq. 12: sharp per token")
    balance: float = Field(default=0.0, ge=0, description="lambda, eq. 13: spread over the batch")
    gate: float = Field(default=0.0, ge=0, description="gamma, eq. 17: small gates")
    contribution: float = Field(
        default=0.0, ge=0, description="cross-entropy to each expert's share of what leaving it out costs"
    )
    efficiency: float = Field(default=0.0, ge=0, description="LTE's eta: mean sigmoid(g)^2")
    separation: float = Field(default=0.0, ge=0, description="LTE's lambda: mean 1 / (sigmoid(g) - threshold)^2")


class Stage(Section):
    """A part of the run with its own tau, losses and routing."""

    name: str = Field(default="train", description="shown in logs")
    share: float = Field(default=1.0, gt=0, description="of the run, relative to the other stages' shares")
    tau: Literal["fixed", "path", "uniform"] = Field(
        default="uniform",
        description="tau_start throughout; from tau_start to tau_end in `rounds`; or drawn per sequence between them",
    )
    tau_start: float = Field(
        default=1.0, ge=MIN_FLOAT32, le=MAX_TAU, description="highest tau; 1 and above is every expert"
    )
    tau_end: float = Field(default=0.25, ge=MIN_FLOAT32, le=MAX_TAU, description="lowest tau")
    rounds: int = Field(default=10, gt=0, description="T of the sparsity path")
    full: float = Field(
        default=0.0, ge=0, lt=1, description="share of a batch's sequences that use every expert, with tau 'uniform'"
    )
    losses: Losses = Field(default_factory=Losses, description="weights of the loss terms")
    gate: Literal["none", "sigmoid"] | None = Field(default=None, description="null keeps the checkpoint's")
    selection: Literal["cumulative_mass", "threshold"] | None = Field(
        default=None, description="null keeps the checkpoint's"
    )
    threshold: float | None = Field(default=None, gt=0, lt=1, description="LTE's delta, with selection 'threshold'")
    train_routers: bool = Field(default=True, description="false freezes the routers")
    new_schedule: bool = Field(
        default=False, description="warm-up and decay of the learning rate begin anew with this stage"
    )

    @property
    def lowest_tau(self) -> float:
        """The lowest that is trained at."""
        return self.tau_start if self.tau == "fixed" else min(self.tau_start, self.tau_end)

    @model_validator(mode="after")
    def _threshold_goes_with_selection(self) -> "Stage":
        if (self.selection == "threshold" or self.losses.separation) and self.threshold is None:
            raise ValueError("threshold is null; expected LTE's delta with selection 'threshold' or a separation loss")
        if self.threshold is not None and not is_threshold(self.threshold):
            raise ValueError(f"threshold is {self.threshold}; expected a number in (0, 1), in float32 too")
        return self


class Optimizer(Section):
    """AdamW, in groups."""

    lr: float = Field(default=3e-4, gt=0, description="peak learning rate of the weights")
    weight_decay: float = Field(default=0.0, ge=0, description="of weights with two dimensions")
    router_lr: float = Field(default=1e-3, gt=0, description="peak learning rate of the routers")
    router_weight_decay: float = Field(default=0.0, ge=0, description="of the routers")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's beta1")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="AdamW's beta2")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients are clipped to this norm")


class Schedule(Section):
    """How long, and the learning rate on the way."""

    epochs: float | None = Field(
        default=None, gt=0, description="passes over the data; null where a limit below ends the run"
    )
    max_steps: int | None = Field(default=None, gt=0, description="optimizer steps")
    max_minutes: float | None = Field(
        default=None,
        gt=0,
        description="minutes of training; rate and stages follow the clock, so that the run ends annealed",
    )
    warmup: float = Field(default=0.03, ge=0, lt=1, description="share of the run (or stage) with a rising rate")
    decay: Literal["cosine", "linear"] = Field(default="cosine", description="shape of the way down")
    final: float = Field(default=0.0, ge=0, le=1, description="last learning rate, relative to the peak")

    @model_validator(mode="after")
    def _ends(self) -> "Schedule":
        if self.epochs is None and self.max_steps is None and self.max_minutes is None:
            raise ValueError("has no end; expected epochs, max_steps or max_minutes")
        return self


class Batch(Section):
    """Sequences per optimizer step."""

    sequences: int = Field(default=32, gt=0, description="sequences a device takes at a time")
    accumulation: int = Field(default=1, gt=0, description="times that happens before an optimizer step")


class Distillation(Section):
    """A dense teacher whose predictions are part of the target."""

    teacher: Location = Field(description="directory or Hugging Face name of a dense causal model, same vocabulary")
    share: float = Field(default=0.5, gt=0, le=1, description="of the teacher's distribution in the target")
    hidden: float = Field(
        default=0.0, ge=0, description="weight of the squared distance of the layers' outputs to the teacher's"
    )


class Runtime(Section):
    """How it runs; nothing here should change what is learned."""

    device: Literal["auto", "cpu"] = Field(default="auto", description="a CUDA GPU where there is one, or the CPU")
    bf16: bool = Field(default=True, description="bfloat16 autocast (weights and routers stay float32)")
    compile: bool = Field(
        default=True, description="torch.compile, layer by layer; on a GPU only; of a sharded model the loss alone"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute layers in the backward: less memory, slower"
    )
    sharding: Literal["none", "full"] = Field(
        default="none",
        description="full: parameters, gradients and optimizer state are spread over all processes (FSDP2)",
    )
    log_steps: int = Field(default=20, gt=0, description="optimizer steps between reports")
    save_steps: int | None = Field(default=None, gt=0, description="optimizer steps between checkpoints to resume from")
    keep: int = Field(default=2, gt=0, description="checkpoints kept")
    tensorboard: bool = Field(default=True, description="write TensorBoard reports")


class Evaluation(Section):
    """What the result is measured on."""

    data: Source | None = Field(default=None, description="held-out data, or its path; null measures nothing")
    max_tokens: int = Field(default=65536, gt=0, description="how much of a text is read")
    points: int = Field(default=0, ge=0, description="times quality is measured during the run, at even distances")
    taus: list[float] = Field(
        default=[1.0, 0.95, 0.9, 0.8, 0.7, 0.5], min_length=1, description="taus measured during the run"
    )
    point_tokens: int = Field(default=16384, gt=0, description="tokens read each time during the run")

    @field_validator("data", mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("taus")
    @classmethod
    def _in_range(cls, taus: list[float]) -> list[float]:
        return [parse_tau(tau) for tau in taus]  # here, not when the run measures first


class Recipe(Section):
    """A whole training."""

    output: Location = Field(description="directory of the run: checkpoints, reports, and the result in model/")
    seed: int = Field(default=0, ge=0, le=MAX_SEED, description="of the split, the data's order and the tau draws")
    model: Model
    data: Data
    stages: list[Stage] = Field(default_factory=lambda: [Stage()], min_length=1)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    schedule: Schedule
    batch: Batch = Field(default_factory=Batch)
    distillation: Distillation | None = None
    runtime: Runtime = Field(default_factory=Runtime)
    evaluation: Evaluation = Field(default_factory=Evaluation)

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        if self.distillation is not None and self.data.task == "classification":
            raise ValueError("distillation goes with a causal model; expected null for classification")
        if self.model.rank is not None and self.data.task == "classification":
            raise ValueError("model.rank goes with a causal model; expected null for classification")
        if self.model.adapter_bits is not None and self.model.rank is not None:
            raise ValueError("model.adapter_bits goes with full fine-tuning; expected null with model.rank")
        others = {"convert": self.model.convert, "scratch": self.model.scratch, "rank": self.model.rank}
        for name, value in others.items() if self.model.adapter is not None else ():
            if value is not None:
                raise ValueError(f"model.adapter goes without model.{name}; expected null")
        return self


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file and apply ``a.b=value`` overrides (values are YAML; list items by number: ``stages.0.tau``).

    Raises:
        UsageError: no such file, not YAML, or a key or value the schema refuses; names it.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"recipe {path}: expected a readable YAML file ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UsageError(f"recipe {path}: expected a mapping, got {type(content).__name__}")
    for override in overrides:
        _apply(content, override)
    return parse_recipe(content, where=str(path))


def parse_recipe(content: Any, *, where: str = "recipe") -> Recipe:
    """Validate a recipe read from YAML.

    Raises:
        UsageError: names the first offending key, its value and what was expected.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        got = "" if first["type"] in ("missing", "value_error") else f", got {first['input']!r}"
        raise UsageError(f"{where}: {key or 'recipe'}: {first['msg'].removeprefix('Value error, ')}{got}") from None


def save_recipe(recipe: Recipe, directory: str | Path) -> Path:
    """Write the resolved recipe, defaults included, into a directory and return the file's path."""
    path = Path(directory) / RECIPE_FILE
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    return path


def recipe_table() -> str:
    """Every key of a recipe as a Markdown table: docs/reference/recipe.md carries it."""
    rows = [f"| `{key}` | {default} | {description} |" for key, default, description in _rows(Recipe, "")]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows])


def _rows(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in section.model_fields.items():
        inner, is_list = _section_of(field.annotation)
        key = f"{prefix}{name}"
        if inner is not None:
            yield from _rows(inner, f"{key}.N." if is_list else f"{key}.")
            continue
        default = "required" if field.is_required() else f"`{yaml_value(field.get_default(call_default_factory=True))}`"
        yield key, default, field.description or ""


def _section_of(annotation: Any) -> tuple[type[Section] | None, bool]:
    """The section a field holds, and whether it holds a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, False
    is_list = typing.get_origin(annotation) is list
    for argument in typing.get_args(annotation):
        inner, _ = _section_of(argument)
        if inner is not None:
            return inner, is_list
    return None, False


def yaml_value(value: Any) -> str:
    """A value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()


def _apply(content: Any, override: str) -> None:
    key, sign, value = override.partition("=")
    if not sign or not key:
        raise UsageError(f"--set {override}: expected key=value")
    *parents, last = key.split(".")
    node = content
    for part in parents:
        node = _child(node, part, override)
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {override}: {value!r} is not YAML ({' '.join(str(error).split())})") from None
    if isinstance(node, list):
        node[_index(node, last, override)] = parsed
    else:
        node[last] = parsed


def _child(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, override)]
    child = node.get(part)
    if child is None:
        child = node[part] = {}
    if not isinstance(child, dict | list):
        raise UsageError(f"--set {override}: {part} is {child!r}; expected a section or a list there")
    return child


def _index(node: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise UsageError(f"--set {override}: {part!r}; expected an item's number, 0 to {len(node) - 1}")
    return int(part)
