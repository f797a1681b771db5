"""The ``prunepath_config`` block of a checkpoint's config.json: one schema for conversion, transformers and engine."""

import itertools
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from prunepath_vllm.errors import ConfigError
from prunepath_vllm.tau import DENSE_TAU, MAX_TAU, MIN_FLOAT32, float32, parse_tau, shown, tau_for_sparsity

FORMAT_VERSION = 2
"""The newest format. 1, which lacks FORMAT_2_FIELDS, is read for ever and still written where it says everything."""
FORMAT_2_FIELDS = ("router", "expert_dtype", "expert_usage", "kept_experts", "max_tau")
EXPERT_DTYPES = ("float8_e4m3fn", "int8")
"""What weights of quantised experts are stored in, as PyTorch names it."""
SPARSE_TAU = 0.5
"""Any tau below 1; under threshold selection all of them mean "the experts above the threshold"."""


class Split(BaseModel):
    """How the neurons were grouped into experts."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    method: Literal["kmeans", "coactivation", "random"]
    """Neurons were grouped by their input weights, by firing together, or at random."""
    seed: int
    """Of the grouping."""
    source: str | None = None
    """What the grouping was computed from: ``"weights"``, or the calibration text's name."""


class RouterOptions(BaseModel):
    """What a router reads, and whether it is one matrix or the product of two thin ones."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    input: Literal["ffn", "attention"] = "ffn"
    """What enters the feed-forward module (the paper's), or the same block's self-attention module."""
    rank: int | None = Field(default=None, gt=0)
    """r: logits = (x down^T) weight^T + bias, down [r, hidden] and weight [E, r]; null: x weight^T + bias."""


class ExpertUsage(BaseModel):
    """How often each expert was used on a text."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    text: str
    """The text's file name."""
    tokens: int = Field(gt=0)
    """Tokens of it that were counted; those at positions below dense_positions are not."""
    tau: float = Field(ge=MIN_FLOAT32, lt=DENSE_TAU)
    """The tau that they ran at."""
    shares: list[list[Annotated[float, Field(ge=0, le=1)]]]
    """[layers][num_experts]: the share of those tokens that used the expert."""

    def hottest(self, part: float) -> float:
        """The share of all uses that fell on each layer's most used experts, `part` of them."""
        most = [sum(sorted(row, reverse=True)[: round(part * len(row))]) for row in self.shares]
        return sum(most) / max(sum(map(sum, self.shares)), MIN_FLOAT32)


class PrunePathConfig(BaseModel):
    """Everything a PrunePath checkpoint says beyond its dense model's configuration."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    format_version: Literal[1, 2]
    """1 wherever that says everything."""
    num_experts: int = Field(gt=0)
    """E, experts per feed-forward layer."""
    expert_size: int = Field(gt=0)
    """d_e, neurons per expert; num_experts * expert_size is the dense intermediate size."""
    selection: Literal["cumulative_mass", "threshold"] = "cumulative_mass"
    """Eq. 8-9, or LTE's rule: expert e is active when sigmoid(g_e) > threshold."""
    threshold: float | None = None
    """LTE's delta, in float32 too above 0 and below 1; null under cumulative_mass."""
    gate: Literal["sigmoid", "none"]
    """Whether an expert's output is multiplied by sigmoid(g_e) (eq. 10)."""
    dense_positions: int = Field(default=0, ge=0)
    """Tokens at sequence positions below it use every expert."""
    default_tau: float = Field(default=1.0, ge=MIN_FLOAT32, le=MAX_TAU)
    """The tau of requests that name none."""
    tau_curve: list[tuple[float, float]] | None = None
    """Measured (tau, FFN sparsity) pairs, ascending tau."""
    split: Split
    base_model: str | None = None
    """Name of the dense checkpoint this one was converted from."""
    router: RouterOptions = RouterOptions()
    """Format 2 alone has the field."""
    expert_dtype: Literal["float8_e4m3fn", "int8"] | None = None
    """Of the feed-forward linears' weights, each with a float32 scale per neuron; null: as the other tensors. Format 2
    alone has the field."""
    expert_usage: ExpertUsage | None = None
    """How often each expert was used, and on what. Format 2 alone has the field."""
    kept_experts: list[list[int]] | None = None
    """Per layer the experts whose weights are there, 0 to K - 1 and at least one: kept ones come first; null: all. The
    others have a router row alone. Format 2 alone has the field."""
    max_tau: float | None = Field(default=None, ge=MIN_FLOAT32, lt=DENSE_TAU)
    """With kept_experts: requests above it are refused. Format 2 alone has the field."""

    @field_validator("default_tau")
    @classmethod
    def _dense_where_workers_see_dense(cls, tau: float) -> float:
        return parse_tau(tau)

    @field_validator("tau_curve", mode="before")
    @classmethod
    def _pairs_from_json(cls, value: Any) -> Any:
        if isinstance(value, list):
            return [tuple(point) if isinstance(point, list) else point for point in value]
        return value

    @field_validator("tau_curve")
    @classmethod
    def _monotone(cls, curve: list[tuple[float, float]] | None) -> list[tuple[float, float]] | None:
        if curve is None:
            return None
        if not curve:
            raise ValueError("is empty; expected [tau, sparsity] pairs or null")
        for tau, sparsity in curve:
            if not (MIN_FLOAT32 <= tau <= MAX_TAU and 0 <= sparsity < 1):  # NaN fails both
                raise ValueError(
                    f"[{tau}, {sparsity}]: expected tau in [{MIN_FLOAT32}, {MAX_TAU}] and sparsity in [0, 1)"
                )
        for (tau0, s0), (tau1, s1) in itertools.pairwise(curve):
            if tau1 <= tau0 or s1 > s0:
                raise ValueError(
                    f"[{tau0}, {s0}] then [{tau1}, {s1}]: expected ascending tau and non-increasing sparsity"
                )
        return curve

    @model_validator(mode="after")
    def _threshold_goes_with_selection(self) -> "PrunePathConfig":
        if self.selection == "threshold":
            if self.threshold is None or not is_threshold(self.threshold):
                raise ValueError(
                    f"threshold is {self.threshold}; expected a number in (0, 1), in float32 too, "
                    "with selection 'threshold'"
                )
        elif self.threshold is not None:
            raise ValueError(f"threshold is {self.threshold}; expected null with selection 'cumulative_mass'")
        return self

    @model_validator(mode="after")
    def _kept_experts_go_with_max_tau(self) -> "PrunePathConfig":
        if self.expert_usage is not None and any(len(row) != self.num_experts for row in self.expert_usage.shares):
            raise ValueError(f"expert_usage.shares: expected {self.num_experts} shares (num_experts) in every layer")
        if (self.kept_experts is None) != (self.max_tau is None):
            raise ValueError(f"max_tau is {self.max_tau}; expected a number with kept_experts, and null without")
        for layer, kept in enumerate(self.kept_experts or ()):
            if not 1 <= len(kept) <= self.num_experts or kept != list(range(len(kept))):
                raise ValueError(
                    f"kept_experts[{layer}]: {shown(kept)}; expected 0, 1, 2 and so on, 1 to {self.num_experts} "
                    "(num_experts) of them"
                )
        if self.max_tau is not None:
            if float32(self.max_tau) >= DENSE_TAU:
                raise ValueError(f"max_tau is {self.max_tau}; expected a number in (0, 1), in float32 too")
            highest = max([self.default_tau, *(tau for tau, _ in self.tau_curve or ())])
            if highest > self.max_tau:
                raise ValueError(
                    f"max_tau is {self.max_tau}; expected at least {highest}, of default_tau and tau_curve"
                )
        return self

    @property
    def intermediate_size(self) -> int:
        """d_ff, neurons per feed-forward layer, whether their weights are there or not."""
        return self.num_experts * self.expert_size

    def kept(self, layer: int) -> int:
        """K, the experts of a layer whose weights are there: the first K."""
        return self.num_experts if self.kept_experts is None else len(self.kept_experts[layer])

    def neurons(self, layer: int) -> int:
        """Neurons of a layer whose weights are there."""
        return self.kept(layer) * self.expert_size

    def order_by_use(self, layer: int) -> list[int] | None:
        """A layer's experts, the most used first; those that have weights before the others. None without expert_usage.

        The engine holds them in this order, so that those used together lie together.
        """
        if self.expert_usage is None:
            return None
        shares, kept = self.expert_usage.shares[layer], self.kept(layer)
        return sorted(range(self.num_experts), key=lambda expert: (expert >= kept, -shares[expert]))

    @property
    def kept_share(self) -> float:
        """The share of all experts whose weights are there."""
        if self.kept_experts is None:
            return 1.0
        return sum(map(len, self.kept_experts)) / (len(self.kept_experts) * self.num_experts)

    @property
    def unset_tau(self) -> float:
        """The tau of a token whose request named none.

        Threshold selection has no cumulative mass to cut: there tau only tells every expert (>= 1) from the selected
        ones (< 1), and a request that names none gets the selection, whatever default_tau says.
        """
        return min(self.default_tau, SPARSE_TAU) if self.selection == "threshold" else self.default_tau

    def tau_for_sparsity(self, sparsity: float) -> float | None:
        """The tau measured to give FFN `sparsity`, or None where the checkpoint carries no curve."""
        return tau_for_sparsity(self.tau_curve, sparsity) if self.tau_curve else None

    def check_intermediate_size(self, intermediate_size: int) -> None:
        """Refuse a model whose feed-forward size is not num_experts * expert_size.

        Raises:
            ConfigError: names both products.
        """
        if self.intermediate_size != intermediate_size:
            raise ConfigError(
                f"prunepath_config: num_experts {self.num_experts} * expert_size {self.expert_size} = "
                f"{self.intermediate_size}; expected the model's feed-forward size {intermediate_size}"
            )

    def check_layers(self, num_layers: int) -> None:
        """Refuse a block that speaks of more or fewer layers than the model has.

        Raises:
            ConfigError: names the field and both numbers.
        """
        shares = None if self.expert_usage is None else self.expert_usage.shares
        for field, layers in (("expert_usage.shares", shares), ("kept_experts", self.kept_experts)):
            if layers is not None and len(layers) != num_layers:
                raise ConfigError(
                    f"prunepath_config.{field}: {len(layers)} layers; expected {num_layers}, those of the model"
                )

    def check_router(self, hidden_size: int) -> None:
        """Refuse a router whose rank is above the model's width, where a full one is smaller.

        Raises:
            ConfigError: names both.
        """
        rank = self.router.rank
        if rank is not None and rank > hidden_size:
            raise ConfigError(
                f"prunepath_config.router.rank: {shown(rank)}; expected 1 to {hidden_size}, the hidden size, or null"
            )

    @classmethod
    def parse(cls, data: Any, *, where: str = "prunepath_config") -> "PrunePathConfig":
        """Validate a ``prunepath_config`` block read from JSON.

        Raises:
            ConfigError: names the first offending field, its value and what was expected.
        """
        if isinstance(data, cls):
            return data
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where}: expected an object, got {type(data).__name__}")
        version = data.get("format_version")
        if version not in (1, FORMAT_VERSION) or isinstance(version, bool):
            raise ConfigError(
                f"{where}.format_version: {shown(version)} is not a format this version reads; "
                f"expected 1 or {FORMAT_VERSION}"
            )
        for field in FORMAT_2_FIELDS:
            if version == 1 and field in data:
                raise ConfigError(
                    f"{where}.{field}: Extra inputs are not permitted in format_version 1, got {shown(data[field])}; "
                    "expected format_version 2"
                )
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(str(part) for part in first["loc"])
            got = "" if first["type"] in ("missing", "value_error") else f", got {shown(first['input'])}"
            name = f"{where}.{field}" if field else where
            raise ConfigError(f"{name}: {first['msg'].removeprefix('Value error, ')}{got}") from None

    def to_json(self) -> dict[str, Any]:
        """The block as plain JSON values, in the lowest format that says everything."""
        block = self.model_dump(mode="json")
        if self.router == RouterOptions():
            del block["router"]
        for field in FORMAT_2_FIELDS:
            if field in block and block[field] is None:
                del block[field]
        return block | {"format_version": 2 if any(field in block for field in FORMAT_2_FIELDS) else 1}


def is_threshold(value: float) -> bool:
    """Whether LTE's delta can be `value`: in (0, 1) in float32 too, which has 0 for 1e-50 and 1 for 1 - 1e-9."""
    return MIN_FLOAT32 <= value < 1 and float32(value) < 1


def sparsity_curve(prunepath: PrunePathConfig) -> np.ndarray | None:
    """The checkpoint's tau_curve as float64 [2, points], taus above sparsities; None where it has none."""
    if prunepath.tau_curve is None:
        return None
    # Under threshold selection every tau below 1 selects the same experts.
    points = prunepath.tau_curve[:1] if prunepath.selection == "threshold" else prunepath.tau_curve
    return np.array(points, dtype=np.float64).T


def expected_sparsity(taus: np.ndarray, curve: np.ndarray) -> np.ndarray:
    """FFN sparsity, float64 [n], at `taus`, [n]: linear between a :func:`sparsity_curve`'s points, level beyond."""
    return np.where(taus >= DENSE_TAU, 0.0, np.interp(taus, *curve))


def check_quantization_config(config: Mapping[str, Any]) -> None:
    """Refuse a config.json whose ``quantization_config`` is no object: transformers and vLLM look into it unasked.

    Raises:
        ConfigError: quotes it.
    """
    value = config.get("quantization_config")
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"quantization_config: expected an object or null, got {shown(value)}")


def check_dense_shape(intermediate_size: int, expert_size: int) -> int:
    """Return the number of experts, or refuse a size that does not divide.

    Raises:
        ConfigError: expert_size does not divide intermediate_size.
    """
    if expert_size <= 0 or intermediate_size % expert_size:
        sizes = [size for size in (8, 16, 32, 64) if intermediate_size % size == 0]
        hint = f"; of 8, 16, 32 and 64, {sizes} do" if sizes else ""
        raise ConfigError(f"expert_size {expert_size} does not divide the feed-forward size {intermediate_size}{hint}")
    return intermediate_size // expert_size
