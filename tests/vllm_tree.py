"""vLLM's source tree compared with the checklist of what we reach for in it, without importing any of it.

python tests/vllm_tree.py DIRECTORY     of an unpacked wheel's vllm/, for a release that cannot be installed here
"""

import ast
import functools
import sys
from pathlib import Path

from prunepath_vllm.model_executor.reaches import PUBLIC, REACHES, Reach

Node = ast.AST


class Tree:
    """A directory `vllm`, read as text.

    Args:
        root: the directory that holds vLLM's own ``__init__.py``.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @functools.cache  # noqa: B019
    def module(self, name: str) -> tuple[list[Node], bool] | None:
        """A module's statements, those under `if` and `try` among them, and whether it is a package; None: no such."""
        path = self.root.joinpath(*name.split(".")[1:])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return list(_statements(ast.parse(file.read_text(encoding="utf-8")).body)), file.name == "__init__.py"
        return None

    def find(self, module: str, name: str) -> tuple[str, Node] | None:
        """The definition of a dotted name and the module that holds it; imports and base classes are followed."""
        first, _, rest = name.partition(".")
        found = self._in_module(module, first)
        for part in filter(None, rest.split(".")):
            if found is None or not isinstance(found[1], ast.ClassDef):
                return None
            found = self._in_class(*found, part)
        return found

    def _in_module(self, module: str, name: str, depth: int = 0) -> tuple[str, Node] | None:
        parsed = self.module(module)
        if parsed is None or depth > 8:
            return None
        statements, package = parsed
        stars = []
        for node in statements:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
                return module, node
            if name in _assigned(node):
                return module, node
            if isinstance(node, ast.ImportFrom):
                source = _source(node, module, package)
                for alias in node.names:
                    if alias.name == "*":
                        stars.append(source)
                    elif (alias.asname or alias.name) == name:
                        if self.module(f"{source}.{alias.name}"):
                            return f"{source}.{alias.name}", node
                        return self._in_module(source, alias.name, depth + 1)
        return next(filter(None, (self._in_module(source, name, depth + 1) for source in stars)), None)

    def _in_class(self, module: str, owner: ast.ClassDef, name: str) -> tuple[str, Node] | None:
        for holder, node in self._bases(module, owner):
            for member in _statements(node.body):
                if getattr(member, "name", None) == name or name in _assigned(member):
                    return holder, member
        return None

    def _bases(self, module: str, node: ast.ClassDef) -> list[tuple[str, ast.ClassDef]]:
        """A class and its bases within vLLM."""
        found = [(module, node)]
        for base in node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            where = self._in_module(module, base.id) if isinstance(base, ast.Name) else None
            if where is not None and isinstance(where[1], ast.ClassDef):
                found += self._bases(where[0], where[1])
        return found

    def attributes(self, module: str, node: ast.ClassDef) -> set[str]:
        """What a class and its bases within vLLM declare, define, or set on ``self``."""
        names: set[str] = set()
        for _, owner in self._bases(module, node):
            for inner in ast.walk(owner):
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                    names.add(inner.name)
                elif isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
                    names |= {inner.attr} if getattr(inner.value, "id", "") == "self" else set()
            for statement in owner.body:
                names |= _assigned(statement)
        return names

    def problems(self, reach: Reach) -> list[str]:
        """What of a row does not hold in this tree; empty where all does."""
        what = f"{reach.module}.{reach.name}"
        found = self.find(reach.module, reach.name)
        if found is None and reach.name.endswith(".__init__"):  # a dataclass makes its own
            found = self.find(reach.module, reach.name.removesuffix(".__init__"))
        if found is None:
            return [f"{what}: not there"]
        said = []
        module, node = found
        if reach.parameters or reach.keywords:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                return [f"{what}: no function"]
            arguments = node.args
            takes = [one.arg for one in arguments.posonlyargs + arguments.args]
            if takes[: len(reach.parameters)] != list(reach.parameters):
                said.append(f"{what}: takes ({', '.join(takes)}), not ({', '.join(reach.parameters)}, ...)")
            named = {*takes, *(one.arg for one in arguments.kwonlyargs)}
            if not arguments.kwarg and (missing := set(reach.keywords) - named):
                said.append(f"{what}: takes no {min(missing)}")
        if reach.attributes:
            if not isinstance(node, ast.ClassDef):
                return [*said, f"{what}: no class"]
            if missing := set(reach.attributes) - self.attributes(module, node):
                said.append(f"{what}: has no {', '.join(sorted(missing))}")
        return said


def _statements(body: list[ast.stmt]) -> list[ast.stmt]:
    found = []
    for node in body:
        found.append(node)
        for name in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                found += _statements(getattr(node, name, []))
        for handler in getattr(node, "handlers", []):
            found += _statements(handler.body)
    return found


def _assigned(node: Node) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def _source(node: ast.ImportFrom, module: str, package: bool) -> str:
    """The absolute name of the module that an import is from."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def compare(root: Path) -> list[str]:
    """Every row of the list that does not hold in the tree under `root`, and public names that are gone."""
    tree = Tree(root)
    said = [problem for reach in REACHES for problem in tree.problems(reach)]
    return said + [
        f"{module}.{name}: public, not there"
        for module, names in PUBLIC.items()
        for name in names
        if module not in ("vllm", "vllm.envs") and tree.find(module, name) is None  # both make their names when asked
    ]


if __name__ == "__main__":
    problems = compare(Path(sys.argv[1]))
    print("\n".join(problems) or f"all {len(REACHES)} rows hold")
    sys.exit(bool(problems))
