"""Rooms of the house: nobody imports shapes, and without it everything else is whole."""

import ast
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from torch.utils.flop_counter import flop_registry

from tests.processes import in_a_copy
from utils.config import ROOT

LABORATORY = ("shapes", "configs/shapes", "tests/shapes", "wan_models/Shapes")


def sources(root: Path = ROOT) -> list[Path]:
    """The Python files of the tree, in a git checkout or not."""
    tops = [path for path in root.iterdir() if not path.name.startswith((".", "venv"))]
    return [*root.glob("*.py"), *(path for top in tops for path in top.rglob("*.py"))]


@cache
def imported(file: Path) -> set[str]:
    """Every module that a source names in an import, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


def may_import() -> dict[str, set[str]]:
    """Room (or entry point) -> rooms that it may import, as docs/architecture.md has it."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| (.*) \|$", page, re.M)
    allowed = {room: set(re.findall(r"`(\w+)`", said)) for room, said in rows}
    rooms = {room for room in allowed if "." not in room}
    return allowed | {"shapes": rooms - {"scripts"}}


@pytest.mark.parametrize("room", may_import())
def test_imports_go_downwards(room: str) -> None:
    """The picture of the rooms is true, and names all there are."""
    allowed = may_import()
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert rooms <= set(allowed)
    path = ROOT / room
    for file in [path] if path.suffix else path.rglob("*.py"):
        names = {n.partition(".")[0] for n in imported(file)}
        names &= {*rooms, "app", "inference", "train"}
        assert names <= allowed[room] | {room}, file


def test_nobody_imports_shapes() -> None:
    """The trainer, the evaluation and the data sets once knew the grammar of its captions."""
    inside = (ROOT / "shapes", ROOT / "tests" / "shapes")
    files = [path for path in sources() if not any(path.is_relative_to(room) for room in inside)]
    assert len(files) > 100
    for path in files:
        names = {name.partition(".")[0] for name in imported(path)}
        assert "shapes" not in names, path


def test_tests_of_other_rooms_need_nothing_that_ships() -> None:
    """Weights and configs of the shapes world belong to tests/shapes."""
    for path in (ROOT / "tests").rglob("*.py"):
        if not path.is_relative_to(ROOT / "tests" / "shapes") and path != Path(__file__):
            used = re.search(
                r"configs\W+shapes|wan_models/Shapes|checkpoints\W+shapes_|[\"']shapes:",
                path.read_text(encoding="utf-8"),
            )
            assert used is None, f"{path}: {used}"


def copy_without_shapes(folder: Path) -> Path:
    """The tree that stands without its laboratory."""
    skipped = shutil.ignore_patterns(
        *(".*", "__pycache__", "videos", "logs", "runs", "data", "outputs", "checkpoints"),
        "wan_models",
    )
    shutil.copytree(ROOT, folder, ignore=skipped)
    for name in LABORATORY:
        shutil.rmtree(folder / name, ignore_errors=True)
    return folder


def is_ours(place: str) -> bool:
    """Whether a module or a folder of modules is in this checkout, or in an installation of it."""
    here = Path(place).is_relative_to(ROOT) and "site-packages" not in place
    return here or (Path(place) / "shapes").is_dir()


def import_all(copy: Path) -> None:
    """Import every module of a copy, and its tests, in place of this checkout's."""
    ours = []
    for name, module in sys.modules.items():
        places = [vars(module).get("__file__"), *(vars(module).get("__path__") or [])]
        if name.partition(".")[0] == "shapes" or any(is_ours(place) for place in places if place):
            ours.append(name)
    for name in ours:
        del sys.modules[name]
    flop_registry.clear()  # a formula is registered once
    elsewhere = [path for path in sys.path if not is_ours(path)]
    sys.path[:] = [str(copy), str(copy / "tests" / "plugins"), *elsewhere]
    os.chdir(copy)
    for path in sources(copy):
        file = path.relative_to(copy).with_suffix("")
        if file.name == "setup":  # nothing to import, but a program
            continue
        module = import_module(".".join(file.parts).removesuffix(".__init__"))
        assert Path(module.__file__ or "").is_relative_to(copy)
    assert "shapes" not in sys.modules


@pytest.mark.slow
def test_a_copy_without_shapes_can_be_imported(tmp_path: Path) -> None:
    """Every module and every test; the long test below lints it and runs its tests."""
    copy = copy_without_shapes(tmp_path / "copy")
    assert in_a_copy(lambda: import_all(copy)) == 0


@pytest.mark.long
def test_a_copy_without_shapes_lints_and_passes(tmp_path: Path) -> None:
    copy = copy_without_shapes(tmp_path / "copy")
    rooms = sorted(path.parent.name for path in copy.glob("*/__init__.py"))
    tops = sorted(path.name for path in copy.glob("*.py"))
    for command in (
        ["ruff", "check", "."],
        ["mypy", *rooms, *tops],
        [
            "pytest",
            "-q",
            "-n",
            "auto",
            "--dist",
            "loadfile",
            "-m",
            "not gpu and not long and not browser",
        ],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=copy, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-1000:]}"
