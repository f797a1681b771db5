"""Experts that lie in host memory: which, and how calls that read all of them get them ahead.

Calls of a few tokens read the experts they use from where they lie: of those on the host, a token at a fifth of all
experts uses few. Calls that read every expert are given each layer's weights copied, while the layer before computes,
into GPU memory that layers share by turns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from prunepath_vllm.kernels.layer import Weights
from prunepath_vllm.kernels.split_memory import Range, Staging, resident_grains, split_range


@dataclass(eq=False)
class _Layer:
    """A layer's two weights where they lie, and where they are brought to: there only once a call has asked for it."""

    weights: list[Tensor] = field(default_factory=list)
    split: list[Range] = field(default_factory=list)
    brought: list[Tensor] = field(default_factory=list)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Bytes that bring them: target and source."""

    def share(self, staging: Staging) -> None:
        """Take the staging memory for what lies on the host."""
        ranges = staging.resident(self.split)
        for one, source, target in zip(self.weights, self.split, ranges, strict=True):
            self.brought.append(target.tensor(one.shape, one.dtype))
            self.copies += [(target.bytes()[place], source.bytes()[place]) for place in source.host_places()]


class HostExperts:
    """The expert weights of one model on one GPU, the last experts of every layer in host memory.

    Whole grains of ``split_memory`` lie in one place: on the GPU those that hold any of the other experts.

    Attributes:
        share: of a layer's experts in host memory, (0, 1].
    """

    _by_address: ClassVar[WeakValueDictionary[int, "HostExperts"]] = WeakValueDictionary()
    """By the address of a layer's first weight: the engine's op is handed tensors alone."""

    def __init__(self, share: float) -> None:
        self.share = share
        self._layers: list[_Layer] = []
        self._numbers: dict[int, int] = {}  # of the layers, by that address
        self._copy_stream: torch.cuda.Stream | None = None
        self._on_its_way: int | None = None

    def resident(self, num_kept: int) -> int:
        """Of a layer's experts, how many lie on the GPU: the first ones."""
        return num_kept - int(self.share * num_kept)

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype, *, parts: int, resident_rows: int, first: Tensor | None = None
    ) -> Tensor:
        """An uninitialised weight, partly on the current GPU. Layers are made in the order of the model.

        Args:
            shape: [rows, H].
            dtype: of the weight as it is stored.
            parts: that its rows consist of: 2 for a GLU's first linear, else 1.
            resident_rows: of each part, from its beginning, that lie on the GPU.
            first: the layer's first weight, for its second; None for the first.

        Raises:
            ConfigError: there is not so much memory.
            UnsupportedFeatureError: the GPU or the driver has no such memory.
        """
        row = shape[1] * dtype.itemsize
        split = split_range(resident_grains(shape[0] * row, parts, resident_rows * row), torch.cuda.current_device())
        weight = split.tensor(shape, dtype)
        if first is None:
            self._by_address[weight.data_ptr()] = self
            self._numbers[weight.data_ptr()] = len(self._layers)
            self._layers.append(_Layer())
        layer = self._layers[self._numbers[(weight if first is None else first).data_ptr()]]
        layer.weights.append(weight)
        layer.split.append(split)
        return weight

    @classmethod
    def of(cls, w_in: Tensor) -> "HostExperts | None":
        """The ones that a layer's first weight belongs to; None where it lies wholly on the GPU."""
        return cls._by_address.get(w_in.data_ptr())

    def bring(self, weights: Weights, *, ahead: bool) -> Weights:
        """A layer's weights in GPU memory, for what is launched on the current stream before the next call.

        Layers are brought in the order of the model. Nothing waits on the host, and graphs may capture it.

        Args:
            weights: the layer's, as they were made.
            ahead: whether the next layer's copy may begin here; not where a captured graph ends before that layer.
        """
        layers, number = self._layers, self._numbers[weights.w_in.data_ptr()]
        if self._copy_stream is None:
            self._copy_stream = torch.cuda.Stream(weights.w_in.device)
            stagings = [Staging(weights.w_in.device.index) for _ in layers[:2]]
            for turn, layer in enumerate(layers):
                layer.share(stagings[turn % 2])
        if self._on_its_way != number or number == 0:
            self._begin_copy(layers[number], self._copy_stream)
        torch.cuda.current_stream().wait_stream(self._copy_stream)
        self._on_its_way = number + 1 if ahead and number + 1 < len(layers) else None
        if self._on_its_way is not None:
            self._begin_copy(layers[self._on_its_way], self._copy_stream)
        w_in, w_out_t = layers[number].brought
        return replace(weights, w_in=w_in, w_out_t=w_out_t)

    @staticmethod
    def _begin_copy(layer: _Layer, stream: torch.cuda.Stream) -> None:
        """Copy beside what is launched from now on, after all that was launched before.

        That includes the last reader of the same staging memory: the layer but one before.
        """
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for target, source in layer.copies:
                target.copy_(source, non_blocking=True)
