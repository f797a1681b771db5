"""Processes that start as a fork of one that has imported vLLM: the import takes longer than most tests.

``Popen`` and ``run`` are those of ``subprocess`` for a command that is Python: a script, or the interpreter with a
script or ``-m``. What such a process starts by itself (an engine, workers, parts of a benchmark) is a fork of it as
well. Tests of the start itself use ``subprocess``, and so do those on a GPU: CUDA does not survive a fork.

    python warm.py DESCRIPTOR MODULE...    # the process that is forked; requests come through the socket
"""

import array
import atexit
import ctypes
import functools
import gc
import importlib
import json
import logging
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterable
from subprocess import DEVNULL, PIPE, STDOUT, CompletedProcess, TimeoutExpired  # noqa: F401
from typing import Any, ClassVar, NoReturn

MODULES = (
    "runners",
    "transformers.tokenization_mistral_common",
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.llm",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.v1.engine.core",
    "vllm.v1.pool.flash_maxsim",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "prunepath_vllm.entrypoints.server.engine",
    "prunepath_vllm.model_executor.worker_cpu",
    "prunepath_vllm.model_executor.models.glu",
    "prunepath_vllm.modeling.configuration_gpt2",
    "prunepath_vllm.modeling.configuration_roberta",
    "prunepath_vllm.plugin",
    "prunepath_vllm.evaluation.backends",
)
READ_AT_IMPORT = ("HF_", "LD_", "OMP_", "PYTHON", "TORCH", "TRANSFORMERS_", "TRITON_")
"""Variables that begin so are read at import: a process is forked from one that was started with the same."""
SET_BY_IMPORT = (
    "LD_LIBRARY_PATH",
    "TORCHINDUCTOR_CACHE_DIR",
    "TORCHINDUCTOR_COMPILE_THREADS",
    "TRITON_CACHE_AUTOTUNING",
)
"""Of these, what vLLM's and torch's own import sets: a test file that has imported them needs no other process."""
PR_SET_CHILD_SUBREAPER = 36


# --- where processes are wanted --------------------------------------------------------------------------------------


class Warm:
    """A process that is forked."""

    started: ClassVar[dict[str, "Warm"]] = {}

    def __init__(self, environment: dict[str, str]) -> None:
        # What it forks twice over becomes a child of this process, which can then wait for it.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno()), *MODULES]
            self.process = subprocess.Popen(
                command, env=environment, stdin=DEVNULL, stdout=DEVNULL,
                pass_fds=[theirs.fileno()], start_new_session=True,
            )  # fmt: skip

    @classmethod
    def of(cls, environment: dict[str, str]) -> "Warm":
        """The one for this environment."""
        names = {name for name in environment if name.startswith(READ_AT_IMPORT)} - set(SET_BY_IMPORT)
        read = {name: environment[name] for name in names}
        key = json.dumps(read, sort_keys=True)
        if key not in cls.started:
            cls.started[key] = cls({name: value for name, value in environment.items() if "PROMETHEUS" not in name})
        return cls.started[key]

    def fork(self, request: dict[str, Any], streams: list[int]) -> int:
        """The number of a new process."""
        message = json.dumps(request).encode()
        descriptors = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", streams))]
        self.socket.sendmsg([len(message).to_bytes(8)], descriptors)
        self.socket.sendall(message)
        number = self.socket.recv(8)
        assert number, "the process that is forked has ended; its error is above"
        return int.from_bytes(number)


class Popen(subprocess.Popen):
    """``subprocess.Popen`` of a command that is Python."""

    def _execute_child(self, *args: Any) -> None:
        def fork(command, executables, close, keep, directory, variables, *rest) -> int:  # of _posixsubprocess
            subprocess._fork_exec = original
            environment = dict(os.environ) if variables is None else as_dict(variables)
            request = {
                "command": [os.fsdecode(word) for word in command],
                "environment": environment,
                "directory": os.fsdecode(directory or os.getcwd()),
                "session": bool(rest[9]),
            }
            return Warm.of(environment).fork(request, standard_streams(rest))

        original, subprocess._fork_exec = subprocess._fork_exec, fork
        try:
            super()._execute_child(*args)
        finally:
            subprocess._fork_exec = original


def run(command: list, **options: Any) -> CompletedProcess:
    """``subprocess.run`` of a command that is Python."""
    check = options.pop("check", False)
    if options.pop("capture_output", False):
        options |= {"stdout": PIPE, "stderr": PIPE}
    with Popen([str(word) for word in command], **options) as process:
        output = process.communicate()
    done = CompletedProcess(command, process.returncode, *output)
    if check:
        done.check_returncode()
    return done


def as_dict(variables: Iterable[bytes]) -> dict[str, str]:
    """An environment, of what fork_exec is given."""
    return dict(os.fsdecode(one).split("=", 1) for one in variables)


def standard_streams(given: tuple) -> list[int]:
    """Descriptors of a child's standard streams, of what fork_exec is given for both ends of pipes."""
    return [own if child == -1 else child for own, child in enumerate((given[0], given[3], given[5]))]


# --- the process that is forked, and its forks -----------------------------------------------------------------------


def main() -> None:
    requests = socket.socket(fileno=int(sys.argv[1]))
    chosen = choose_metrics_late()
    gc.disable()  # a third of the imports' time
    for module in sys.argv[2:]:
        importlib.import_module(module)
    import setproctitle

    assert not chosen.cache_info().currsize, "a module makes metrics at import"
    override_kernels_once()
    wait_instead_of_spinning()
    handler = LogLevel()
    for one in logging.getLogger("vllm").handlers:
        one.addFilter(handler)
    setproctitle.getproctitle()  # finds the words of the command line, which it can overwrite, while they are in place
    gc.collect()
    gc.enable()
    gc.freeze()  # nothing of the import is looked through, and so copied, by a fork's collections
    gc.unfreeze = lambda: None  # an engine's end calls it, and every collection from there on takes half a second
    while True:
        length, descriptors, _, _ = socket.recv_fds(requests, 8, 3)
        if not length:
            return
        message = b""
        while len(message) < int.from_bytes(length):
            message += requests.recv(1 << 16)
        request = json.loads(message)
        reading, writing = os.pipe()
        if middle := os.fork():
            os.waitpid(middle, 0)
            requests.sendall(os.read(reading, 8))
            for descriptor in (reading, writing, *descriptors):
                os.close(descriptor)
            continue
        if child := os.fork():
            os.write(writing, child.to_bytes(8))
            os._exit(0)
        become(streams=descriptors, **request)


def choose_metrics_late() -> Any:
    """Where metrics are kept depends on the environment at prometheus_client's import; now at the first metric."""
    from prometheus_client import values

    chosen = functools.cache(values.get_value_class)
    values.ValueClass = lambda *args, **kwargs: chosen()(*args, **kwargs)
    return chosen


def override_kernels_once() -> None:
    """What a worker puts in the place of Triton's kernels, it looks for in all of every module: once, before a fork."""
    from vllm.platforms import current_platform

    register = functools.cache(current_platform.register_triton_kernel_overrides)
    type(current_platform).register_triton_kernel_overrides = staticmethod(register)
    register()


def wait_instead_of_spinning() -> None:
    """A process of several of an engine spins for a second after each message: on a core that another could use."""
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    SpinCondition.__init__.__defaults__ = (0.01,)


class LogLevel(logging.Filter):
    """vLLM's level as the environment has it now."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= getattr(logging, os.environ.get("VLLM_LOGGING_LEVEL", "INFO"))


def become(
    command: list[str],
    environment: dict[str, str] | None,
    directory: str | None,
    session: bool,
    streams: list[int],
    keep: Iterable[int] = (),
) -> NoReturn:
    """Be the process of a command from here on, in a fork: what an exec would have left is left."""
    status = 1
    try:
        for number, descriptor in enumerate([os.dup(stream) for stream in streams]):
            os.dup2(descriptor, number)
        close_others({0, 1, 2, *keep})
        for name in signal.valid_signals():
            if callable(signal.getsignal(name)):
                signal.signal(name, signal.default_int_handler if name == signal.SIGINT else signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        if session:
            os.setsid()
        if environment is not None:
            os.environ.clear()
            os.environ.update(environment)
        if directory is not None:
            os.chdir(directory)
        random.seed()
        subprocess._fork_exec = fork_exec
        sys.modules["_posixsubprocess"].fork_exec = fork_exec
        status = execute(command)
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def close_others(keep: set[int]) -> None:
    """Objects of the parent's may still close a descriptor by its number: it must not be a new one's."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in keep:
            try:
                os.fstat(int(name))
            except OSError:  # that of the listing
                continue
            os.dup2(nothing, int(name))


def execute(command: list[str]) -> int:
    """Run a command line of Python; the exit status."""
    words = [word for word in command if word not in ("-B", "-u")]
    if os.path.realpath(words[0]) == os.path.realpath(sys.executable):
        words = words[1:]
    try:
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(words[1], {"__name__": "__main__"})
        elif words[0] == "-m":
            sys.argv, sys.path[0] = words[1:], os.getcwd()
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = words, os.path.dirname(os.path.abspath(words[0]))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, int) or end.code is None:
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def fork_exec(command, executables, close, keep, directory, variables, *rest) -> int:
    """In the place of ``_posixsubprocess.fork_exec``: Python is not started but forked."""
    words = [os.fsdecode(word) for word in command]
    python = os.path.realpath(words[0]) == os.path.realpath(sys.executable)
    tracker = any("resource_tracker import" in word for word in words)  # it is small
    if not python or tracker:
        return EXEC(command, executables, close, keep, directory, variables, *rest)
    environment = None if variables is None else as_dict(variables)
    if child := os.fork():
        return child
    gc.freeze()
    atexit._clear()
    become(
        words, environment, None if directory is None else os.fsdecode(directory), bool(rest[9]),
        standard_streams(rest), keep=() if "--multiprocessing-fork" not in words else keep,
    )  # fmt: skip


EXEC = subprocess._fork_exec

if __name__ == "__main__":
    main()
