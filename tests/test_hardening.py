"""A server under abuse: fuzzed bodies, clients that come and go, a checkpoint pulled away, processes killed."""

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest
import test_server
from test_server import BIN, CURVE, HTTP, MODEL, PROMPTS, TAUS, Server, complete
from tiny_models import save_prunepath

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from fuzz import KNOBS, fuzz
from soak import soak_server

serve = test_server.serve

BOUND = 60
"""Seconds in which a client must hear that its request is lost, and a process must be gone."""


@pytest.fixture(scope="module")
def checkpoint(prunepath_checkpoint, tmp_path_factory) -> Path:
    path = prunepath_checkpoint("llama", default_tau=0.6, tau_curve=CURVE)
    return shutil.copytree(path, tmp_path_factory.mktemp("served") / "llama")


@pytest.fixture(scope="module")
def server(serve, checkpoint) -> Server:
    return serve(checkpoint, command=(str(BIN / "prunepath"), "serve"))


def metrics_directory(process: psutil.Process) -> Path:
    """Where the server's processes leave their counters."""
    (file,) = Path(tempfile.gettempdir()).glob(f"prunepath-metrics-*/counter_{process.pid}.db")
    return file.parent


def answers(server: Server) -> list[list[int]]:
    return [complete(server, prompt, tau=tau) for prompt in PROMPTS[:2] for tau in TAUS]


@pytest.fixture(scope="module")
def right(server) -> list[list[int]]:
    return answers(server)


CHOICES = 4


class Killer:
    """In the place of an event: kills a process, in the thread that sets it for the n-th time."""

    def __init__(self, process: psutil.Process, times: int) -> None:
        self.process, self.left = process, threading.Semaphore(times - 1)
        self.done, self.turn = threading.Event(), threading.Lock()

    def set(self) -> None:
        if not self.left.acquire(blocking=False):
            with self.turn:
                if not self.done.is_set():
                    self.process.kill()
                    self.done.set()


class Stream(threading.Thread):
    """One streamed answer of CHOICES choices, as long as they come."""

    def __init__(self, server: Server, tau: float, begun: threading.Event | Killer) -> None:
        super().__init__(daemon=True)
        self.url, self.tau, self.begun = server.url, tau, begun
        self.received = b""
        self.broken = False
        self.start()

    def run(self) -> None:
        body = {"model": MODEL, "prompt": "a", "n": CHOICES, "max_tokens": 250, "ignore_eos": True, "stream": True}
        body |= {"tau": self.tau}
        try:
            # verify: making a TLS context takes longer than an answer, and there is no TLS.
            with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=BOUND, verify=False) as answer:
                for part in answer.iter_bytes():
                    if not self.received:
                        self.begun.set()
                    self.received += part
        except httpx.HTTPError:
            self.broken = True

    @property
    def finished(self) -> bool:
        """Whether all its choices are whole: one that breaks off may have some, and end as others do."""
        whole = self.received.count(b'"finish_reason":"length"') == CHOICES
        return whole and self.received.endswith(b"data: [DONE]\n\n")


def test_fuzzed_bodies_get_the_right_refusals_and_leave_the_server_right(server, right):
    summary = fuzz(server.url, count=150, bodies=12, progress=False)
    assert summary.failures == []
    assert summary.sent == 150
    assert set(summary.refused_for) == set(KNOBS)
    assert summary.statuses["200"] > 10
    assert answers(server) == right


def test_clients_that_abort_and_come_back(server, right):
    summary = soak_server(server.url, server.process.pid, clients=16, seconds=15, samples=40, progress=False)
    assert (summary["errors"], summary["wrong"], summary["metrics"]) == ([], [], [])
    assert summary["replayed"] == 40
    assert summary["aborted"] > 0
    assert len(summary["rss_mib"]) > 5
    assert answers(server) == right


def test_a_checkpoint_replaced_under_the_server_changes_no_answer(server, right, checkpoint):
    info = HTTP.get(f"{server.url}/prunepath/info").json()
    os.truncate(checkpoint / "model.safetensors", 0)  # pages that were still mapped would be lost
    assert answers(server) == right
    shutil.rmtree(checkpoint)
    save_prunepath("llama", checkpoint, seed=7, default_tau=0.3, tau_curve=CURVE)
    assert answers(server) == right
    assert HTTP.get(f"{server.url}/prunepath/info").json() == info


def still_running(family: list[psutil.Process]) -> list[psutil.Process]:
    """What has not ended in time. A zombie has: whoever inherited it reaps it when it likes."""

    def runs(process: psutil.Process) -> bool:
        try:
            return process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    deadline = time.monotonic() + BOUND
    while (left := [process for process in family if runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def test_requests_hear_of_a_killed_engine_and_nothing_stays_behind(server, right):
    process = server.process
    # Known before the streams begin: looking for it takes as long as several of them.
    family = [process, *process.children(recursive=True)]
    engine = server.engine
    begun = Killer(engine, 4)  # as many streams as run at once
    # On a loaded machine the one that kills comes seconds late: a quarter of these streams was answered by then.
    streams = [Stream(server, tau, begun) for tau in TAUS * 24]
    assert begun.done.wait(BOUND)
    killed = time.monotonic()
    unhealthy = None
    while unhealthy is None and time.monotonic() < killed + BOUND:
        try:
            status = httpx.get(f"{server.url}/health", timeout=BOUND).status_code
            unhealthy = status if status != 200 else None
        except httpx.TransportError:
            unhealthy = 0  # the server has stopped itself
    assert unhealthy in (0, 503)
    for stream in streams:
        stream.join(BOUND)
        assert not stream.is_alive()
    cut = [stream for stream in streams if not stream.finished]
    assert len(cut) >= 8
    for stream in cut:
        assert stream.broken or b'"error"' in stream.received, stream.received[-500:]
    assert not still_running(family)


def test_a_restarted_server_ends_its_streams_and_itself_on_sigterm(serve, checkpoint, right):
    shutil.rmtree(checkpoint)
    save_prunepath("llama", checkpoint, default_tau=0.6, tau_curve=CURVE)
    server = serve(checkpoint, command=(str(BIN / "prunepath"), "serve"))
    assert answers(server) == right
    process = server.process
    family = [process, *process.children(recursive=True)]
    metrics = metrics_directory(process)
    begun = threading.Event()
    streams = [Stream(server, tau, begun) for tau in TAUS]
    assert begun.wait(BOUND)
    process.send_signal(signal.SIGTERM)
    for stream in streams:
        stream.join(BOUND)
        assert not stream.is_alive()
    assert not still_running(family)
    assert not metrics.exists()
