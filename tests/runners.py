"""vLLM's model runners on a CPU, as tests choose between them: "v1", or "v2" with Triton's interpreter."""

import functools
import inspect
import os
from typing import Any

TRACED = {"VLLM_CPU_CI_ENV": "1", "VLLM_USE_AOT_COMPILE": "0"}
"""Models are traced, as for inductor, but run as traced: it takes a minute. Such a model is never kept for the next
start, but vLLM would look for it, by a hash of all its configuration, at every step."""
INTERPRETER = {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}  # the driver below cannot compile


def environment(runner: str) -> dict[str, str]:
    """Variables of an engine in one process; runner "cuda" is what vLLM chooses on a GPU."""
    common = dict(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1")
    if runner == "cuda":
        return common
    cpu = dict(
        VLLM_CPU_KVCACHE_SPACE="1", VLLM_USE_V2_MODEL_RUNNER=str(int(runner == "v2")),
        VLLM_CPU_OMP_THREADS_BIND="nobind",  # a NUMA node for every process of an engine is what it wants otherwise
    )  # fmt: skip
    return common | TRACED | cpu | (INTERPRETER if runner == "v2" else {})


def remember_what_the_interpreter_looks_up() -> None:
    """A third of the interpreter's time: the builtins of each module and class, and types of blocks."""
    from triton.language import core
    from triton.runtime import interpreter

    @functools.cache
    def builtins(package: Any) -> list[tuple[str, Any]]:
        return [pair for pair in inspect.getmembers(package) if interpreter.tl.core.is_builtin(pair[1])]

    def patch(package: Any, builder: Any, scope: Any) -> None:
        for name, member in builtins(package):
            if getattr(package, name) is member:  # in a call from a kernel it has been replaced
                interpreter._patch_attr(package, name, member, builder, scope)

    dtypes: dict[str, Any] = {}
    look_up = interpreter._get_np_dtype

    def numpy_dtype(dtype: Any) -> Any:
        scalar = getattr(dtype, "element_ty", dtype)  # of a block; a pointer's too, which is no such dtype
        if type(scalar) is not interpreter.tl.dtype or isinstance(dtype, interpreter.tl.pointer_type):
            return look_up(dtype)
        if scalar.name not in dtypes:
            dtypes[scalar.name] = look_up(scalar)
        return dtypes[scalar.name]

    blocks: dict[tuple, tuple] = {}
    make_block = core.block_type.__init__

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([size.value if isinstance(size, core.constexpr) else size for size in shape])
        if sizes not in blocks:
            make_block(self, element_ty, shape)  # refuses what is no shape
            blocks[sizes] = self.shape, self.numel, str(self.shape)
        self.element_ty = element_ty
        self.shape, self.numel, written = blocks[sizes]
        self.name = f"<{written}, {element_ty}>"

    tensors: dict[tuple, tuple] = {}
    make_tensor = core.tensor.__init__

    def tensor(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape.values) if type.is_block() else ()
        if sizes not in tensors:
            make_tensor(self, handle, type)
            tensors[sizes] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = tensors[sizes]

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
    interpreter._patch_builtin = patch
    interpreter._get_np_dtype = numpy_dtype


if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.backends

    remember_what_the_interpreter_looks_up()

    # vLLM looks for an active Triton backend; the interpreter needs none.
    driver = type("Driver", (), {"is_active": staticmethod(lambda: True)})
    triton.backends.backends["cpu"] = type("Backend", (), {"compiler": None, "driver": driver})()
