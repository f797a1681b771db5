"""Imports point downwards: the order of the package's rooms, and the diagram of docs/architecture.md drawn from it.

``python tests/test_layers.py`` writes the diagram anew.
"""

import ast
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "prunepath_vllm"
ARCHITECTURE = ROOT / "docs" / "architecture.md"

ROOMS = [
    ["errors", "activations", "version", "cpu_wheel"],
    ["tau", "arguments", "devices", "engine_version"],
    ["config", "families", "engine_environment", "files"],
    ["fields", "linears"],
    ["checkpoint"],
    ["kernels", "sources"],
    ["modeling"],
    ["conversion"],
    ["model_executor", "training"],
    ["evaluation"],
    ["benchmarks", "entrypoints.server"],
    ["plugin"],
    ["entrypoints"],
    ["__init__"],
]
"""Modules and packages, lowest first. A room imports what is in lines above its own and in itself, wherever the import
stands: in a function too. ``__init__`` is the package itself, whose ``register()`` needs all."""

FOREIGN = {
    "kernels": {"vllm", "transformers"},
    "modeling": {"vllm"},
    "conversion": {"vllm"},
    "training": {"vllm"},
    "model_executor": {"starlette", "fastapi"},
}
"""Packages that a room does not import."""

NAMES_ABOVE = {
    "families": "the table of the classes that stand in for a family, which are loaded by name",
    "evaluation.sweep": "runs our command in a process of its own",
    "benchmarks.latency": "runs our command in a process of its own",
}
"""Modules that name one above them in a string, and why."""

RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}


@cache
def trees() -> dict[str, ast.Module]:
    """Every module of the package by its name inside it."""
    return {name_of(path): ast.parse(path.read_text()) for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(parts if len(parts) == 1 or parts[-1] != "__init__" else parts[:-1])


def room_of(module: str) -> str:
    """The longest room that holds a module."""
    parts = module.split(".")
    return next(room for n in range(len(parts), 0, -1) if (room := ".".join(parts[:n])) in RANK)


def imports(module: str) -> set[str]:
    """The full names of what a module imports, in functions and for type checking too; a.b of ``from a import b``."""
    found: set[str] = set()
    for node in ast.walk(trees()[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(module: str) -> set[str]:
    """The package's modules that a module imports."""
    names = {inside(name) for name in imports(module) if name.split(".")[0] == PACKAGE}
    return {name if name in trees() else name.rpartition(".")[0] or "__init__" for name in names}


def inside(name: str) -> str:
    return name.removeprefix(PACKAGE).lstrip(".") or "__init__"


def test_every_module_is_in_a_room():
    assert {room_of(module) for module in trees()} == set(RANK)


def test_imports_point_downwards():
    upwards = [
        f"{module} -> {imported}"
        for module in trees()
        for imported in own_imports(module)
        if (here := room_of(module)) != (there := room_of(imported)) and RANK[there] >= RANK[here]
    ]
    assert not upwards


def test_no_module_imports_itself_by_way_of_others():
    graph = {module: own_imports(module) for module in trees()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)  # raises a CycleError that names the circle


def test_rooms_do_without_what_is_not_theirs():
    found = {
        f"{module} imports {name}"
        for module in trees()
        for name in imports(module)
        if name.split(".")[0] in FOREIGN.get(room_of(module), ())
    }
    assert not found


def test_who_names_a_module_above():
    named = {
        module
        for module, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if re.fullmatch(rf"{PACKAGE}\.[\w.]*:?", node.value)
        if RANK[room_of(inside(node.value.rstrip(":.")))] > RANK[room_of(module)]
    }
    assert named == set(NAMES_ABOVE)


def diagram() -> str:
    """The rooms for mermaid: an arrow from each to those it imports, unless a longer way over arrows leads there.

    Without the two lowest lines, which rooms of all heights import.
    """
    needs: dict[str, set[str]] = {room: set() for room in RANK}
    for module in trees():
        needs[room_of(module)] |= {room_of(imported) for imported in own_imports(module)} - {room_of(module)}
    reach: dict[str, set[str]] = {}
    for room in RANK:  # lowest first
        reach[room] = needs[room].union(*(reach[other] for other in needs[room]))
    lines = ["```mermaid", "flowchart TD"]
    for room in reversed(RANK):
        direct = needs[room] - set().union(*(reach[other] for other in needs[room]))
        lines += [f"    {node(room)} --> {node(other)}" for other in sorted(direct) if RANK[other] > 1]
    return "\n".join([*lines, "```"])


def node(room: str) -> str:
    label = "prunepath_vllm.register" if room == "__init__" else room.replace(".", "/")
    return label if label == room else f'{room.replace(".", "_").strip("_")}["{label}"]'


def drawn() -> re.Match[str]:
    found = re.search(r"```mermaid\nflowchart TD\n.*?```", ARCHITECTURE.read_text(), re.DOTALL)
    assert found
    return found


def test_the_diagram_is_the_codes():
    assert drawn()[0] == diagram()


if __name__ == "__main__":
    start, end = drawn().span()
    text = ARCHITECTURE.read_text()
    ARCHITECTURE.write_text(text[:start] + diagram() + text[end:])
