"""Fixtures shared by all tests."""

import gc
import os
import sys

if gc.isenabled():
    gc.disable()  # else a third of an import's time is a search for garbage; until all tests are collected, below

# Several workers: before torch is imported, and for every process that a test starts.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # on busy cores the threads of a tiny product mostly wait for each other
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # every engine would take the first core

from collections.abc import Callable
from pathlib import Path

import absl.logging
import pytest
from hypothesis import settings

# vLLM configures logging anew for an engine, which closes every handler; absl's then closes the stream that it was made
# with, unless it is the process's own. Made by an import in a test, that stream would be pytest's, for all other tests.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__

settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", max_examples=5000)
settings.load_profile("repeatable")  # the same code gets the same verdict; --hypothesis-profile=explore looks further

SLOWEST = (
    "test_kernels_interpreted.py",
    "test_kernels_compiled.py",
    "test_kernels_compiled_hopper.py",
    "test_engine.py",
    "test_counts.py",
    "test_routers.py",
    "test_real_model.py",
    "test_server.py",
    "test_quantize.py",
    "test_quantize_linears.py",
    "test_hardening.py",
    "test_examples.py",
    "test_cli.py",
    "test_training_parts.py",
    "test_lora.py",
    "test_pooling.py",
    "test_eval_harness.py",
    "test_cold.py",
    "test_quantised_kernels.py",
    "test_bench_engine.py",
    "test_server_policy.py",
    "test_server_layouts.py",
    "test_training.py",
    "test_training_adapter.py",
    "test_playground.py",
    "test_plugin.py",
    "test_eval.py",
    "test_sweep.py",
    "test_eval_reference.py",
    "test_modeling.py",
    "test_calibrate.py",
    "test_fields.py",
    "test_conversion.py",
    "test_modeling_checkpoint.py",
    "test_figures.py",
    "test_kernels_native.py",
)
"""What takes longer than ten seconds, the longest first: a short file at the end leaves no worker alone for long."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in the order of SLOWEST, then the others; a file's tests stay together and in their order."""
    ranks = {name: rank for rank, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """In every worker after its collection, and in the process that only hands tests out."""
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def imports_are_no_garbage() -> None:
    """What is left when a file's tests begin are modules and what lives as long: nothing looks through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def dense_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``dense_checkpoint(family)``: the directory of a tiny random dense model in float32, made once per session."""
    from tiny_models import save_dense  # torch, which the process that only hands tests out does without

    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = save_dense(family, tmp_path_factory.mktemp("dense") / family)
        return made[family]

    return get


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of some sequences of the tiny models."""
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text("".join(f"{i}: the quick brown fox jumps over the lazy dog; " for i in range(40)))
    return path


@pytest.fixture
def own_text(tmp_path: Path) -> Path:
    """A text file of the test's own, to overwrite."""
    path = tmp_path / "calibration.txt"
    path.write_text("The quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs.\n" * 20)
    return path


@pytest.fixture
def own_llama(tmp_path: Path) -> Path:
    """A dense checkpoint of the test's own, to damage."""
    from tiny_models import save_dense

    return save_dense("llama", tmp_path / "dense")


@pytest.fixture(scope="module")
def registered() -> None:
    """What ``prunepath_vllm.register`` registers."""
    import prunepath_vllm

    prunepath_vllm.register()


@pytest.fixture(scope="session")
def prunepath_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``prunepath_checkpoint(family, **options)``: what ``save_prunepath`` writes, made once per session; read only."""
    from tiny_models import save_prunepath

    made: dict[str, Path] = {}

    def get(family: str, **options) -> Path:
        key = repr((family, sorted(options.items())))
        if key not in made:
            made[key] = save_prunepath(family, tmp_path_factory.mktemp("prunepath") / family, **options)
        return made[key]

    return get


@pytest.fixture(scope="session")
def quantised(
    prunepath_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``quantised(family, expert_dtype, **options)``: a ``prunepath_checkpoint``, quantised, made once; read only."""
    from prunepath_vllm.conversion.quantize import quantize

    made: dict[str, Path] = {}

    def get(family: str, expert_dtype: str, linears: str | None = None, **options) -> Path:
        key = repr((family, expert_dtype, linears, sorted(options.items())))
        if key not in made:
            path = tmp_path_factory.mktemp("quantised") / family
            quantize(prunepath_checkpoint(family, **options), path, expert_dtype, linears=linears)
            made[key] = path
        return made[key]

    return get


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """(training text, held-out text): the project's own documents."""
    folder = tmp_path_factory.mktemp("texts")
    prose = "\n".join(path.read_text() for path in sorted((Path(__file__).parent.parent / "docs").glob("*.md")))
    assert len(prose) > 15000
    (folder / "train.txt").write_text(prose[:-4000])
    (folder / "valid.txt").write_text(prose[-4000:])
    return folder / "train.txt", folder / "valid.txt"


@pytest.fixture
def recipe(texts, dense_checkpoint, tmp_path):
    """``recipe(**changes)``: a short training of a converted tiny Llama; sections are replaced key by key."""
    from training_runs import LENGTH

    from prunepath_vllm.training.recipe import parse_recipe

    def build(family="llama", **changes):
        content = dict(
            output=str(tmp_path / "run"),
            model=dict(
                path=str(dense_checkpoint(family)), convert=dict(text=str(texts[0]), tokens=2048, expert_size=16)
            ),
            data=dict(train=[dict(path=str(texts[0]))], sequence_length=LENGTH),
            stages=[dict(losses=dict(contribution=0.1))],
            optimizer=dict(lr=2e-3),
            schedule=dict(max_steps=12),
            batch=dict(sequences=4),
            runtime=dict(device="cpu", bf16=False, log_steps=3, tensorboard=False),
        )
        for key, value in changes.items():
            merged = isinstance(value, dict) and isinstance(content.get(key), dict)
            content[key] = content[key] | value if merged else value
        return parse_recipe(content)

    return build
