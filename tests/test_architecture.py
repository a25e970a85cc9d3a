"""The table of docs/architecture.md holds: who imports whom, and nobody in a circle."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"mlip_md": "mlip_md", "trainer": "mlip_md.trainer", "integrations": "mlip_md.integrations"}
GROUND = (
    "version",
    "errors",
    "elements",
    "constants",
    "files",
    "hints",
    "memory",
    "signals",
    "ownership",
    "streams",
    "rows",
    "graph",
)
MAX_FUNCTION = 60
"""Lines of a function that can still be read at a glance; command signatures aside."""


class Row(NamedTuple):
    """What the modules of a room may import."""

    ours: frozenset[str]
    others: frozenset[str]


def module_files() -> dict[str, Path]:
    """Every module of the three rooms by its import name."""
    found = {}
    for folder, package in ROOMS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            inside = file.relative_to(ROOT / folder)
            if folder == "mlip_md" and inside.parts[0] in ROOMS:
                continue
            parts = [package, *inside.with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


MODULES = module_files()


def table() -> dict[str, Row]:
    """The import table of the page."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    lines = text.split("<!-- import table -->")[1].strip().splitlines()[2:]
    rows = {}
    for line in lines:
        if not line.startswith("|"):
            break
        room, ours, others = (cell.strip() for cell in line.strip("|").split("|"))
        names = re.findall(r"`([^`]+)`", ours) or ([ours] if ours else [])
        rows[room.strip("`")] = Row(
            frozenset(names), frozenset(filter(None, re.split(r",\s*", others)))
        )
    return rows


TABLE = table()


def room_of(module: str) -> str:
    """The row that a module belongs to: the longest name that fits."""
    return max((r for r in TABLE if module == r or module.startswith(f"{r}.")), key=len)


def imports(module: str) -> Iterator[str]:
    """Modules of ours and of others that a module imports, anywhere in it."""
    file = MODULES[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                yield inner if inner in MODULES else origin


def allowed(module: str, imported: str) -> bool:
    room = room_of(module)
    if imported.split(".")[0] != "mlip_md":
        top = imported.split(".")[0]
        return top in sys.stdlib_module_names or top in TABLE[room].others
    target = room_of(imported)
    ground = imported.removeprefix("mlip_md.") in GROUND
    return ground or target == room or bool({target, "everything"} & TABLE[room].ours)


def test_the_table_covers_every_module():
    rooms = {room_of(module) for module in MODULES}
    assert set(TABLE) == rooms, "rows of the table without a module"


@pytest.mark.parametrize("room", TABLE)
def test_who_imports_whom(room):
    wrong = [
        f"{module} imports {imported}"
        for module in MODULES
        if room_of(module) == room
        for imported in imports(module)
        if not allowed(module, imported)
    ]
    assert wrong == []


def test_the_picture_of_the_rooms_names_every_module():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\w+", text.split("```")[1]))
    unnamed = [m for m in MODULES if m.split(".")[-1] not in named | {"__main__"}]
    assert unnamed == []


def test_the_ground_floor_stands_on_itself():
    for name in GROUND:
        for imported in imports(f"mlip_md.{name}"):
            if imported.startswith("mlip_md"):
                assert imported.removeprefix("mlip_md.") in GROUND, (name, imported)


def test_no_backend_imports_another_or_the_run():
    prefix = "mlip_md.integrations.md."
    forbidden = {f"{prefix}run", f"{prefix}cli"}
    for module in MODULES:
        if module.startswith(f"{prefix}backends."):
            for imported in imports(module):
                assert imported not in forbidden, (module, imported)
                other = imported.startswith(f"{prefix}backends.") and imported != module
                assert not other or imported.endswith(".interface"), (module, imported)


def only_reexports(module: str) -> bool:
    """Whether a module is a package's ``__init__`` of imports, ``__all__`` and its docstring."""
    if MODULES[module].name != "__init__.py":
        return False
    body = ast.parse(MODULES[module].read_text(encoding="utf-8")).body
    rest = [node for node in body if not isinstance(node, ast.Import | ast.ImportFrom)]
    return all(ast.unparse(node).startswith(("'", '"', "__all__ = ")) for node in rest)


def circle() -> list[str]:
    """Modules that import each other in a circle, lazily or not; [] if there is none."""
    graph = {m: {i for i in imports(m) if i in MODULES and i != m} for m in MODULES}
    doors = {m for m in MODULES if only_reexports(m)}  # each stands for what it re-exports
    graph = {m: targets - doors for m, targets in graph.items() if m not in doors}
    path: list[str] = []
    done: set[str] = set()

    def visit(module: str) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        path.append(module)
        for target in sorted(graph[module]):
            if found := visit(target):
                return found
        done.add(path.pop())
        return []

    return next((found for module in sorted(graph) if (found := visit(module))), [])


def test_no_circle():
    assert circle() == []


def functions(file: Path) -> Iterator[tuple[str, int]]:
    """Names and lengths of the functions of a file, docstrings left out."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            first = body[0].lineno if body else node.lineno
            yield node.name, (node.end_lineno or first) - first + 1


def test_no_function_is_too_long():
    long = [
        f"{module}: {name} has {length} lines"
        for module, file in MODULES.items()
        for name, length in functions(file)
        if length > MAX_FUNCTION
    ]
    assert long == []


def test_the_scan_sees_lazy_imports_and_circles(monkeypatch, tmp_path):
    files = {
        "mlip_md.errors": "def f():\n    import mlip_md.files",
        "mlip_md.files": "import mlip_md.errors",
    }
    for name, text in files.items():
        file = tmp_path / f"{name}.py"
        file.write_text(text)
        monkeypatch.setitem(MODULES, name, file)
    assert set(circle()) == {"mlip_md.errors", "mlip_md.files"}


@pytest.mark.parametrize(("more", "found"), [("", False), ("\n__version__ = '1'\n", True)])
def test_a_package_that_holds_something_of_its_own_is_seen(monkeypatch, tmp_path, more, found):
    door, inside = tmp_path / "__init__.py", tmp_path / "engine.py"
    door.write_text(f'"""What it is."""\nfrom mlip_md.engine import x\n__all__ = ["x"]\n{more}')
    inside.write_text("import mlip_md\n")
    monkeypatch.setitem(MODULES, "mlip_md", door)
    monkeypatch.setitem(MODULES, "mlip_md.engine", inside)
    assert bool(circle()) == found
