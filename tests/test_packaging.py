"""What is installed is what is in the tree, and nobody imports or changes what they must not."""

import ast
import importlib
import importlib.metadata
import itertools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"mlip_md": "mlip_md", "trainer": "mlip_md/trainer", "integrations": "mlip_md/integrations"}
LINKS = ["trainer", "integrations"]
CORE_PACKAGES = {"mlip_md", "numpy", "jax", "flax", "e3nn_jax", "safetensors", "vesin"}
OPTIONAL_PACKAGES = {"nvalchemiops": "nvalchemi-toolkit-ops"}
"""Packages of the core that may be missing, and who provides them."""
MAX_WHEEL_BYTES = 5 * 2**20

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def room_files(room: str) -> list[Path]:
    """Files of a room without what Python, editors and compilers leave there."""
    found = []
    for file in sorted((ROOT / room).rglob("*")):
        inside = file.relative_to(ROOT / room).parts
        if room == "mlip_md" and inside[0] in LINKS:
            continue
        junk = "__pycache__" in inside or file.name.startswith(".") or file.suffix == ".so"
        if file.is_file() and not junk:
            found.append(file)
    return found


def sources(room: str) -> list[Path]:
    return [file for file in room_files(room) if file.suffix == ".py"]


ALL_SOURCES = [file for room in ROOMS for file in sources(room)]


def expected_in_wheel() -> set[str]:
    return {
        f"{installed}/{file.relative_to(ROOT / room).as_posix()}"
        for room, installed in ROOMS.items()
        for file in room_files(room)
    }


# --- what is built ---------------------------------------------------------------------------


NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}


def build(kind: str, tree: Path, output: Path, **environment: str) -> Path:
    """A wheel or an sdist; the wheel as where there is no compiler unless told otherwise."""
    output.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(output)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env={**os.environ, **(environment or NO_COMPILER)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = output.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return file


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of what builds read, so that builds leave nothing in the checkout."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("setuptools 77 or newer builds this package")
    copy = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for room in ROOMS:
        junk = shutil.ignore_patterns("__pycache__", ".*", "*.so")
        shutil.copytree(ROOT / room, copy / room, symlinks=True, ignore=junk)
    return copy


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    return build("wheel", tree, tmp_path_factory.mktemp("wheel"))


def files_in_wheel(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_every_file_and_nothing_else(wheel):
    assert files_in_wheel(wheel) == expected_in_wheel()


def test_without_a_compiler_the_wheel_is_everybodys(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")


@pytest.mark.slow
def test_with_a_compiler_the_wheel_has_a_convolution_for_every_python(tree, wheel, tmp_path):
    """Built here, it is loaded, and agrees with its definition, in a process of its own."""
    compiler = shutil.which("c++") or pytest.skip("there is no C++ compiler")
    fast = build("wheel", tree, tmp_path / "wheel", CXX=compiler)
    tag = fast.name.removesuffix(".whl").split("-")[-3:]
    assert tag[:2] == ["py3", "none"]
    assert tag[2] != "any"
    library = "mlip_md/native/libconvolution.so"
    assert files_in_wheel(fast) == files_in_wheel(wheel) | {library}
    with zipfile.ZipFile(fast) as archive:
        archive.extractall(tmp_path / "site")
    code = "from mlip_md.networks.native_convolution import find_native as f; print(f())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert "available=True" in done.stdout, done.stdout + done.stderr


def test_the_wheel_is_small(wheel):
    assert wheel.stat().st_size < MAX_WHEEL_BYTES


def test_the_wheel_names_its_commands_and_plug_ins(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("entry_points.txt")]
        text = archive.read(name).decode()
    assert "[console_scripts]\nmlip-md = mlip_md.cli:main" in text
    plug_in = "mlip-md = mlip_md.integrations:MLIPPotentialImplFactory"
    assert f"[openmmml.potentials]\n{plug_in}" in text


def test_a_wheel_made_from_the_sdist_is_the_same(tree, wheel, tmp_path):
    archive = build("sdist", tree, tmp_path / "sdist")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    again = build("wheel", unpacked, tmp_path / "wheel")
    assert files_in_wheel(again) == files_in_wheel(wheel)


def test_every_folder_with_an_init_is_a_listed_package():
    listed = set(PYPROJECT["tool"]["setuptools"]["packages"])
    folders = {
        str(Path(name).parent).replace("/", ".")
        for name in expected_in_wheel()
        if name.endswith("/__init__.py")
    }
    assert listed == folders


def test_the_links_lead_to_the_rooms():
    for link in LINKS:
        assert (ROOT / "mlip_md" / link).resolve() == (ROOT / link).resolve()


def test_entry_points_exist():
    project = PYPROJECT["project"]
    targets = [*project["scripts"].values()]
    targets += project["entry-points"]["openmmml.potentials"].values()
    for target in targets:
        module, attribute = target.split(":")
        assert callable(getattr(importlib.import_module(module), attribute))


def test_the_version_is_said_once_more_only():
    import mlip_md

    assert mlip_md.__version__ == PYPROJECT["project"]["version"]


# --- who imports whom ------------------------------------------------------------------------


def imported_modules(file: Path) -> Iterator[str]:
    """Absolute names of the modules that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from names_of_from(node, package_of(file))


def package_of(file: Path) -> list[str]:
    room = file.relative_to(ROOT).parts[0]
    inside = file.relative_to(ROOT / room).parent.as_posix()
    return [part for part in f"{ROOMS[room]}/{inside}".split("/") if part != "."]


def names_of_from(node: ast.ImportFrom, package: list[str]) -> list[str]:
    base = package[: len(package) - node.level + 1] if node.level else []
    module = ".".join([*base, *([node.module] if node.module else [])])
    return [module, *(f"{module}.{alias.name}" for alias in node.names)]


def third_party(file: Path) -> set[str]:
    names = {name.split(".")[0] for name in imported_modules(file)}
    return names - sys.stdlib_module_names


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_the_core_imports_only_what_it_may():
    for file in sources("mlip_md"):
        if file.name != "cli.py":
            assert third_party(file) <= CORE_PACKAGES | OPTIONAL_PACKAGES.keys(), file
            for name in imported_modules(file):
                assert not within(name, "mlip_md.trainer"), file
                assert not within(name, "mlip_md.integrations"), file


@pytest.mark.parametrize(
    ("room", "other"), [("trainer", "integrations"), ("integrations", "trainer")]
)
def test_trainer_and_integrations_never_import_each_other(room, other):
    for file in sources(room):
        for name in imported_modules(file):
            assert not within(name, f"mlip_md.{other}"), file
            if file.name != "__main__.py":  # starts the command line itself
                assert not within(name, "mlip_md.cli"), file


def test_rooms_are_imported_by_their_full_names():
    for file in ALL_SOURCES:
        assert third_party(file).isdisjoint(LINKS), file


def test_every_imported_package_is_declared():
    project = PYPROJECT["project"]
    extras = itertools.chain.from_iterable(project["optional-dependencies"].values())
    requirements = [*project["dependencies"], *extras]
    declared = {normalized(re.split(r"[\[<>=~!; ]", text)[0]) for text in requirements}
    distributions = importlib.metadata.packages_distributions()
    for file in ALL_SOURCES:
        for name in third_party(file) - {"mlip_md"}:
            by_name = [OPTIONAL_PACKAGES.get(name, name)]
            providers = {normalized(d) for d in distributions.get(name, by_name)}
            assert providers & declared, f"{file} imports {name}, which is not declared"


def normalized(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("mlip_md", ["jax", "numpy", "openmm", "ase"]),
        ("mlip_md.integrations", ["jax", "openmm", "ase"]),
        ("mlip_md.trainer", ["jax", "openmm"]),
        ("mlip_md.trainer.cli", ["jax", "openmm", "h5py"]),
        ("mlip_md.integrations.md.cli", ["jax", "openmm", "ase"]),
        ("mlip_md.formats.own", ["openmm", "ase", "optax", "h5py"]),
        ("openmmml", ["jax", "flax"]),
    ],
)
def test_imports_stay_light(module, unwanted):
    if module == "openmmml":
        pytest.importorskip("openmmml")
    code = f"import sys, {module}; print(*[n for n in {unwanted} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.split() == []


# --- what nobody touches ---------------------------------------------------------------------


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of an expression of names; what is not a name becomes ``?``."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


FORBIDDEN_CALLS = re.compile(
    r"(jax\.)?config\.update|jax\.distributed\.initialize"
    r"|os\.(putenv|unsetenv)|os\.environ\.(update|setdefault|pop|clear)"
    r"|(e3nn(_jax)?)\.config|(np|numpy|onp)\.random\.(seed|set_state)|random\.seed"
    r"|(np|numpy)\.seterr|warnings\.(filterwarnings|simplefilter)"
    r"|pickle\.loads?|eval|exec|print"
)


def global_changes(file: Path) -> Iterator[str]:
    """Places where a file changes state of the whole process, unpickles, or prints."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and FORBIDDEN_CALLS.fullmatch(dotted(node.func)):
            yield f"{file}:{node.lineno} {dotted(node.func)}()"
        targets = node.targets if isinstance(node, (ast.Assign, ast.Delete)) else []
        for target in targets:
            if isinstance(target, ast.Subscript) and dotted(target.value).endswith("os.environ"):
                yield f"{file}:{node.lineno} os.environ[...]"
            if isinstance(target, ast.Attribute) and "jax.config" in dotted(target):
                yield f"{file}:{node.lineno} {dotted(target)}"


WORKERS = ROOT / "trainer/generate/make_dataset.py"
"""Limits the threads of its own worker processes, in which nothing else runs."""
PARALLEL = ROOT / "trainer/parallel.py"
"""Lets processes meet, when asked to; what it changes meanwhile is put back."""
CACHE = ROOT / "mlip_md/compilation_cache.py"
"""Switches JAX's cache of compiled programs on, for whoever asks for it."""


def test_no_source_changes_global_state():
    files = [file for file in ALL_SOURCES if file not in (WORKERS, CACHE, PARALLEL)]
    assert [change for file in files for change in global_changes(file)] == []
    assert len(list(global_changes(WORKERS))) == 1
    assert len(list(global_changes(CACHE))) == 2
    assert len(list(global_changes(PARALLEL))) == 3


def test_the_scan_for_global_changes_sees_them(tmp_path):
    file = tmp_path / "bad.py"
    lines = [
        "jax.config.update('jax_enable_x64', True)",
        "jax.config.jax_enable_x64 = True",
        "os.environ['A'] = '1'",
        "os.environ.setdefault('A', '1')",
        "del os.environ['A']",
        "np.random.seed(0)",
        "pickle.load(file)",
        "print('x')",
    ]
    file.write_text("\n".join(lines))
    assert len(list(global_changes(file))) == len(lines)
    file.write_text("a = os.environ.get('A', os.environ['B'])\nwith jax.enable_x64(True): pass")
    assert list(global_changes(file)) == []


def test_importing_changes_no_global_state():
    code = """
import os, logging
import numpy as np
import jax
def state():
    levels = logging.root.level, tuple(logging.root.handlers)
    return dict(os.environ), dict(jax.config.values), levels, np.geterr()
before = state()
import mlip_md.formats.own, mlip_md.formats.instadeep, mlip_md.engine, mlip_md.cli
import mlip_md.networks.mace, mlip_md.networks.nequip, mlip_md.integrations.ase
import mlip_md.trainer.train
after = state()
for old, new in zip(before, after, strict=True):
    if isinstance(old, dict):  # parts of JAX that are imported late bring flags of their own
        new = {name: new[name] for name in old}
    assert old == new, (old, new)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_sources_are_free_of_leftovers():
    words = re.compile(r"TODO|FIXME|XXX|\bNotImplementedError|except:\s")
    for file in ALL_SOURCES:
        found = words.search(file.read_text(encoding="utf-8"))
        assert found is None, f"{file}: {found and found.group()}"


def test_every_module_says_what_it_is():
    for file in ALL_SOURCES:
        source = file.read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(source)), file
