"""Tensors that lie partly in GPU memory and partly in pinned host memory, under one range of GPU addresses.

The driver maps grains of physical memory, of either kind, into a range of addresses. Kernels, the library's products,
copies and captured graphs see one contiguous tensor, and compute the same bits wherever its grains lie; what lies on
the host comes over PCIe word by word as it is read. A second range may map the same grains again, with GPU memory where
the first has host memory: a copy of those grains then makes the whole tensor resident, and moves nothing else.

CUDA's virtual memory management, https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__VA.html.
"""

import functools
import itertools
import math
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from prunepath_vllm.errors import ConfigError, UnsupportedFeatureError

GRAIN = 2 << 20
"""Bytes that lie in one place; what the driver maps at least, and GPUs translate at a time."""


def resident_grains(nbytes: int, parts: int, resident: int) -> list[bool]:
    """Of each grain of a tensor, whether it lies on the GPU: where it holds any of the first bytes of a part.

    Args:
        nbytes: of the tensor.
        parts: equal parts that follow each other in it, such as a GLU's gate and up rows.
        resident: bytes of each part, from its beginning, that lie on the GPU.
    """
    grains = [False] * -(-nbytes // GRAIN)
    for start in range(0, nbytes, nbytes // parts):
        for grain in range(start // GRAIN, -(-(start + resident) // GRAIN) if resident else 0):
            grains[grain] = True
    return grains


@functools.cache
def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise UnsupportedFeatureError(
            f"memory in GPU and host under one address needs the package cuda-bindings ({error}); expected it installed"
        ) from None
    return driver


def _call(function: str, *arguments: Any, wanted: str) -> Any:
    """A driver function's result.

    Raises:
        ConfigError: there is not so much memory.
        UnsupportedFeatureError: any other error; on machines without this kind of memory, say.
    """
    driver = _driver()
    error, *values = getattr(driver, function)(*arguments)
    if error == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise ConfigError(f"{wanted}: the driver has not so much memory left; expected less, or more to be free")
    if error != driver.CUresult.CUDA_SUCCESS:
        raise UnsupportedFeatureError(f"{wanted}: {function} failed ({error.name}) on this GPU, driver or machine")
    return values[0] if values else None


class Grains:
    """Physical memory, freed when nothing holds it and no range maps it.

    Attributes:
        size: bytes, a multiple of GRAIN.
        on_host: whether it is pinned host memory, of the GPU's own NUMA node, instead of the GPU's.
    """

    in_use: ClassVar[weakref.WeakSet["Grains"]] = weakref.WeakSet()

    def __init__(self, size: int, device: int, *, on_host: bool) -> None:
        driver = _driver()
        self.size, self.on_host = size, on_host
        properties = driver.CUmemAllocationProp()
        properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        kinds = driver.CUmemLocationType
        if on_host:
            attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID
            node = _call("cuDeviceGetAttribute", attribute, device, wanted="the GPU's NUMA node")
            properties.location.type = kinds.CU_MEM_LOCATION_TYPE_HOST_NUMA
            properties.location.id = max(0, node)  # -1 on machines with one
        else:
            properties.location.type = kinds.CU_MEM_LOCATION_TYPE_DEVICE
            properties.location.id = device
        wanted = f"{size / 2**30:.2f} GiB of {'pinned host' if on_host else 'GPU'} memory for experts"
        self.handle = _call("cuMemCreate", size, properties, 0, wanted=wanted)
        weakref.finalize(self, driver.cuMemRelease, self.handle).atexit = False
        Grains.in_use.add(self)

    @classmethod
    def held(cls, *, on_host: bool) -> int:
        """Bytes of either kind that this process holds."""
        return sum(grains.size for grains in cls.in_use if grains.on_host == on_host)


class Range:
    """Physical memory under a range of addresses, in the order given; as torch takes it for a tensor of bytes.

    Tensors made of it keep it, and with it the memory, alive.
    """

    def __init__(self, grains: Sequence[Grains], device: int) -> None:
        driver = _driver()
        self.grains, self.device = list(grains), device
        self.size = sum(one.size for one in grains)
        wanted = f"{self.size / 2**30:.2f} GiB of addresses"
        self.address = int(_call("cuMemAddressReserve", self.size, 0, 0, 0, wanted=wanted))
        weakref.finalize(self, _unmap, self.address, self.size).atexit = False
        for start, one in self.places():
            _call("cuMemMap", self.address + start, one.size, 0, one.handle, 0, wanted=wanted)
        access = driver.CUmemAccessDesc()
        access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = device
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        _call("cuMemSetAccess", self.address, self.size, [access], 1, wanted=wanted)
        self.__cuda_array_interface__ = dict(
            shape=(self.size,), typestr="|u1", data=(self.address, False), strides=None, version=3
        )

    def places(self) -> Iterator[tuple[int, Grains]]:
        """The memory, and where in the range each piece of it begins."""
        starts = itertools.accumulate((one.size for one in self.grains), initial=0)
        return zip(starts, self.grains, strict=False)

    def host_places(self) -> list[slice]:
        """Bytes that lie on the host."""
        return [slice(start, start + one.size) for start, one in self.places() if one.on_host]

    def bytes(self) -> Tensor:
        """All of it, uint8."""
        return torch.as_tensor(self, device=torch.device("cuda", self.device))

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor over its beginning."""
        return self.bytes()[: math.prod(shape) * dtype.itemsize].view(dtype).view(*shape)


def _unmap(address: int, size: int) -> None:
    torch.cuda.synchronize()  # kernels may still read it
    driver = _driver()
    driver.cuMemUnmap(address, size)
    driver.cuMemAddressFree(address, size)


def split_range(resident: Sequence[bool], device: int) -> Range:
    """New memory, a grain for each of `resident`, which says whether it lies on the GPU."""
    runs = [(on_gpu, len(list(run))) for on_gpu, run in itertools.groupby(resident)]
    return Range([Grains(length * GRAIN, device, on_host=not on_gpu) for on_gpu, length in runs], device)


class Staging:
    """GPU memory that stands in for what other ranges have on the host."""

    def __init__(self, device: int) -> None:
        self.device = device
        self.grains: list[Grains] = []

    def resident(self, sources: Sequence[Range]) -> list[Range]:
        """The same memory where it lies on the GPU, this one's where it does not: a grain for every one.

        All that is made of one Staging shares its memory, so that one caller's may be filled at a time.
        """
        wanted = sum(one.size for source in sources for one in source.grains if one.on_host) // GRAIN
        while len(self.grains) < wanted:
            self.grains.append(Grains(GRAIN, self.device, on_host=False))
        free = iter(self.grains)
        return [
            Range([piece for one in source.grains for piece in self._stand_ins(one, free)], self.device)
            for source in sources
        ]

    @staticmethod
    def _stand_ins(grains: Grains, free: Iterator[Grains]) -> list[Grains]:
        return list(itertools.islice(free, grains.size // GRAIN)) if grains.on_host else [grains]
