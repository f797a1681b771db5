"""CUDA's virtual memory management on a CPU, for split_memory's tests: the calls it makes, with memory that is mapped.

Physical memory is an anonymous file; mapping it twice gives the same bytes at two addresses, as the driver does.
"""

import ctypes
import mmap
import os
from enum import Enum, IntEnum
from types import SimpleNamespace

import torch

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_size_t]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FIXED, _MAP_NORESERVE, _PROT_NONE = 0x10, 0x4000, 0


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NOT_SUPPORTED = 801


class Location(Enum):
    CU_MEM_LOCATION_TYPE_DEVICE = 1
    CU_MEM_LOCATION_TYPE_HOST_NUMA = 3


class FakeDriver:
    """What ``cuda.bindings.driver`` offers of it.

    Attributes:
        physical: handle -> (bytes, whether it is the host's), of what has not been released.
        reserved: address -> bytes, of what has not been freed.
        host_limit: bytes of host memory that there are; None for any.
    """

    CUresult, CUmemLocationType = Result, Location
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)
    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID=134)

    def __init__(self) -> None:
        self.physical: dict[int, tuple[int, bool]] = {}
        self.reserved: dict[int, int] = {}
        self.readable: set[int] = set()
        self.host_limit: int | None = None

    def CUmemAllocationProp(self):
        return SimpleNamespace(type=None, location=SimpleNamespace(type=None, id=None))

    def CUmemAccessDesc(self):
        return SimpleNamespace(location=SimpleNamespace(type=None, id=None), flags=None)

    def cuDeviceGetAttribute(self, attribute, device):
        return Result.CUDA_SUCCESS, -1

    def cuMemCreate(self, size, properties, flags):
        on_host = properties.location.type is Location.CU_MEM_LOCATION_TYPE_HOST_NUMA
        held = sum(size for size, host in self.physical.values() if host)
        if on_host and self.host_limit is not None and held + size > self.host_limit:
            return Result.CUDA_ERROR_OUT_OF_MEMORY, None
        handle = os.memfd_create("grains")
        os.ftruncate(handle, size)
        self.physical[handle] = (size, on_host)
        return Result.CUDA_SUCCESS, handle

    def cuMemRelease(self, handle):
        del self.physical[handle]
        os.close(handle)  # what is mapped stays
        return (Result.CUDA_SUCCESS,)

    def cuMemAddressReserve(self, size, alignment, address, flags):
        anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        address = _libc.mmap(None, size, _PROT_NONE, anonymous, -1, 0)
        self.reserved[address] = size
        return Result.CUDA_SUCCESS, address

    def cuMemMap(self, address, size, offset, handle, flags):
        assert self.physical[handle][0] == size, "the whole of it: the driver takes no parts"
        assert offset == 0
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        assert _libc.mmap(address, size, protection, mmap.MAP_SHARED | _MAP_FIXED, handle, 0) == address
        return (Result.CUDA_SUCCESS,)

    def cuMemSetAccess(self, address, size, access, count):
        assert self.reserved[address] == size
        assert count == len(access) == 1
        self.readable.add(address)
        return (Result.CUDA_SUCCESS,)

    def cuMemUnmap(self, address, size):
        assert self.reserved[address] == size
        _libc.munmap(address, size)
        return (Result.CUDA_SUCCESS,)

    def cuMemAddressFree(self, address, size):
        del self.reserved[address]
        return (Result.CUDA_SUCCESS,)

    def bytes_of(self, part) -> torch.Tensor:
        """What ``Range.bytes`` gives on a GPU."""
        assert part.address in self.readable
        data = (ctypes.c_ubyte * part.size).from_address(part.address)
        data.part = part  # kept by the tensor's buffer, as torch keeps the object of an array interface
        return torch.frombuffer(data, dtype=torch.uint8)
