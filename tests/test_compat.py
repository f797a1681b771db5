"""The checklist of what we reach for inside vLLM: it holds in the installed engine, and nothing else is reached for."""

import ast
import importlib
import re
import sys
import types
from pathlib import Path

import pytest
import vllm
from vllm_tree import Tree, compare

import prunepath_vllm
from prunepath_vllm.errors import EngineVersionError
from prunepath_vllm.model_executor import compat, reaches
from prunepath_vllm.model_executor.reaches import NOT_MODULES, PUBLIC, REACHES, Reach

SOURCE = Path(prunepath_vllm.__file__).parent
MODULES = {reach.module for reach in REACHES} | set(PUBLIC)
OBJECTS = {
    name: {attribute for reach in REACHES if name in reach.known_as for attribute in reach.attributes}
    for name in {name for reach in REACHES for name in reach.known_as}
}
"""What our code calls objects of vLLM, and the attributes that it may read of them. (``request.app`` is FastAPI's.)"""


@pytest.mark.parametrize("module", sorted({reach.module for reach in REACHES}))
def test_the_installed_engine_has_what_is_reached_for(module):
    compat.expect_module(module, importlib.import_module(module))


def test_the_installed_engines_source_has_the_attributes_too():
    assert compare(Path(vllm.__file__).parent) == []


def test_every_row_says_why_and_what_to_do():
    for reach in REACHES:
        assert min(len(reach.why), len(reach.moved)) > 8, reach
    assert len(set(REACHES)) == len(REACHES)


def known(module: str, name: str) -> bool:
    return name in PUBLIC.get(module, ()) or any(
        reach.module == module and name in (reach.name, reach.name.split(".")[0]) for reach in REACHES
    )


def unlisted(source: str) -> list[str]:
    """What a file of ours takes from vLLM that is not in the list: imports, names in strings, attributes."""
    nodes = list(ast.walk(ast.parse(source)))
    found, modules = [], {}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "vllm":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in MODULES:
                    modules[alias.asname or alias.name] = inner
                elif not known(node.module, alias.name):
                    found.append(inner)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "vllm":
                    modules[alias.asname or "vllm"] = alias.name if alias.asname else "vllm"
                    found += [] if alias.name in MODULES else [alias.name]
        elif isinstance(node, ast.Constant) and re.fullmatch(r"vllm(\.\w+)+", str(node.value)):
            listed = node.value in (*MODULES, *NOT_MODULES) or known(*node.value.rsplit(".", 1))
            found += [] if listed else [node.value]
    ours = "compat import" in source  # elsewhere the same names mean other things
    for node in nodes:
        if not isinstance(node, ast.Attribute):
            continue
        owner = node.value
        name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
        if isinstance(owner, ast.Name) and name in modules:
            inner = f"{modules[name]}.{node.attr}"
            if not known(modules[name], node.attr) and not any(one.startswith(inner) for one in MODULES):
                found.append(inner)
        elif ours and name in OBJECTS and node.attr not in OBJECTS[name] and f"{name}.{node.attr}" != "request.app":
            found.append(f"{name}.{node.attr}")
    return sorted(set(found))


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_else_of_vllm_is_reached_for(path):
    assert unlisted(path.read_text()) == []


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("from vllm.v1.engine.core import EngineCoreProc", "vllm.v1.engine.core.EngineCoreProc"),
        ("from vllm.v1.worker import gpu_worker\ngpu_worker.init_worker_distributed_environment", "gpu_worker"),
        ("import vllm\nvllm.TokensPrompt", "vllm.TokensPrompt"),
        ("import vllm.v1.outputs", "vllm.v1.outputs"),
        ("import sys\nsys.modules['vllm.v1.outputs']", "vllm.v1.outputs"),
        (
            "from compat import VllmConfig\nvllm_config.compilation_config",
            "compilation_config",
        ),
        ("from compat import VllmConfig\nself.runner.execute_model_state", "runner.execute_model_state"),
    ],
)
def test_a_reach_that_is_not_listed_is_found(source, named):
    (found,) = unlisted(source)
    assert named in found


TREE = {
    "__init__.py": "",
    "one.py": "from .two import *\nif True:\n    from vllm.two import Moved as Here\n",
    "two.py": (
        "class Base:\n    declared: int\n    def __init__(self): self.set_here = 1\n"
        "class Moved(Base):\n    def run(self, first, *, second=None): ...\n"
    ),
}


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("Moved.run", {"parameters": ("self", "first"), "keywords": ("second",)}, None),
        ("Here.run", {"parameters": ("self", "second")}, "takes (self, first)"),
        ("Moved.run", {"keywords": ("third",)}, "takes no third"),
        ("Moved", {"attributes": ("declared", "set_here", "run")}, None),
        ("Moved", {"attributes": ("gone",)}, "has no gone"),
        ("Gone", {}, "not there"),
        ("Moved.gone", {}, "not there"),
    ],
)
def test_a_tree_is_compared_without_importing_it(tmp_path, name, row, said):
    for file, text in TREE.items():
        (tmp_path / file).write_text(text)
    problems = Tree(tmp_path).problems(Reach("vllm.one", name, "why", "what to do", **row))
    assert problems == [] if said is None else said in problems[0]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"name": "gone"}, "vllm.engine_of_tomorrow.gone"),
        ({"name": "run", "parameters": ("args",)}, "run(args, ...); it takes (first, second)"),
        ({"name": "run", "keywords": ("args",)}, "run(..., args=)"),
    ],
)
def test_an_engine_that_has_moved_is_named_at_start_up(monkeypatch, row, said):
    module = types.ModuleType("vllm.engine_of_tomorrow")
    module.run = lambda first, second: None
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(compat, "REACHES", (Reach(module.__name__, why="a test", moved="nothing", **row),))
    with pytest.raises(EngineVersionError, match=re.escape(said)):
        compat.expect_loaded()


def test_the_list_is_read_without_vllm():
    tree = ast.parse(Path(reaches.__file__).read_text())
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [node.module for node in imported] == ["dataclasses"]
