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
    """A fifth of the interpreter's time: the builtins of each module and class, looked for at every launch and call."""
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

    interpreter._patch_builtin = patch
    interpreter._get_np_dtype = numpy_dtype


if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.backends

    remember_what_the_interpreter_looks_up()

    # vLLM looks for an active Triton backend; the interpreter needs none.
    driver = type("Driver", (), {"is_active": staticmethod(lambda: True)})
    triton.backends.backends["cpu"] = type("Backend", (), {"compiler": None, "driver": driver})()
