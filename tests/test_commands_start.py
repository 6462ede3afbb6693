"""How commands start: by name, from any folder, and without PyTorch until they need it."""

import ast
import os
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from scripts.__main__ import commands, main
from utils.config import ROOT

HEAVY = ("torch", "diffusers", "transformers", "matplotlib", "PIL", "safetensors")
# In one process for all: what building a parser costs where no heavy library can be imported.
PARSERS = f"""
import sys, time
from importlib import import_module
sys.modules |= dict.fromkeys({HEAVY!r})
for name in sys.argv[1:]:
    begin = time.process_time()
    try:
        import_module(name).build_parser().format_help()
        print(name, time.process_time() - begin)
    except ImportError as error:
        print(name, error)
"""
# In one process for all: where `utils` is taken from by each command that is started by its path.
TREES = """
import runpy, sys
start = list(sys.path)
for file in sys.argv[1:]:
    sys.path[:] = [file.rpartition("/")[0], *start]
    for name in [n for n in sys.modules if n.partition(".")[0] in ("utils", "scripts", "shapes")]:
        del sys.modules[name]
    runpy.run_path(file, run_name="by_path")
    print(sys.modules["utils"].__file__)
"""


def run(*words: str, cwd: Path = ROOT) -> tuple[float, subprocess.CompletedProcess[str]]:
    """A Python process with this checkout's modules; CPU seconds, and how it ended."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, result


@pytest.fixture(scope="module")
def parsers() -> dict[str, str]:
    """Seconds that the parser of each command took, or what it could not import."""
    result = run("-c", PARSERS, *commands().values())[1]
    assert result.returncode == 0, result.stderr
    return dict(line.split(" ", 1) for line in result.stdout.splitlines())


@pytest.mark.parametrize("name", commands().values())
def test_help_needs_no_heavy_library(name, parsers):
    """`--help` took five to seven seconds: every command imported PyTorch at its top."""
    assert float(parsers[name]) < 0.4


@pytest.mark.parametrize(
    "command",
    [
        "train.py --logdir logs/x",
        "inference.py --prompt fox",
        "-m scripts.benchmark",
    ],
)
def test_wrong_key_is_refused_at_once(command, tmp_path):
    """It took seven seconds: all libraries were imported before the config was read."""
    words = [str(ROOT / word) if word.endswith(".py") else word for word in command.split()]
    config = "configs/rolling_forcing_dmd.yaml"  # found from any folder
    seconds, result = run(*words, "--config_path", config, "no_such_key=1", cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "no_such_key" in result.stderr
    assert seconds < 1
    assert list(tmp_path.iterdir()) == []


def test_every_command_is_named():
    """`rolling-forcing NAME` and `python -m scripts NAME` know each file that is a command."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("scripts/[!_]*.py"), *ROOT.glob("shapes/*.py")]
    starting = [file for file in files if "run_main(main)" in file.read_text(encoding="utf-8")]
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts) for file in starting}
    tops = {module for module in commands().values() if (ROOT / module.split(".")[0]).exists()}
    files_of_ours = {m for m in commands().values() if "." not in m}
    assert names == tops | files_of_ours  # an installed copy may have rooms that this one lacks


@pytest.mark.slow
def test_a_command_is_of_the_tree_that_it_lies_in(tmp_path):
    """`python scripts/benchmark.py` of one checkout measured the other one that was installed."""
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "__init__.py").write_text("raise SystemExit('the other tree')")
    own = [ROOT / f"{module.replace('.', '/')}.py" for module in commands().values()]
    own += [ROOT / "scripts" / name for name in ("__main__.py", "_gpu_stages.py")]
    files = [str(file) for file in own if file.parent.is_dir()]  # a tree may lack a room
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    words = [sys.executable, "-c", TREES, *files]
    result = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [str(ROOT / "utils" / "__init__.py")] * len(files)


def test_command_by_name(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rolling-forcing"])
    assert main(["download", "--list"]) == 0
    assert "wan2.1-1.3b" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "plot_run " in capsys.readouterr().out


# --- what is installed ---------------------------------------------------------------------------


def read_requirements(name: str) -> dict[str, Requirement]:
    """The lines of a file of pip's, by the normalised name of the package."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and line[0] not in "#-"]
    return {normal(requirement.name): requirement for requirement in found}


def normal(name: str) -> str:
    """A package's name as indices compare it."""
    return name.lower().replace("_", "-")


def test_lists_of_packages_agree():
    """pyproject.toml bounds from below what requirements.txt names; torch alone is pinned there,
    and constraints.txt holds an allowed version of everything."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = [Requirement(line) for line in project["dependencies"]]
    extras = project["optional-dependencies"]
    bounds += [Requirement(line) for line in (*extras["app"], *extras["dev"])]
    wanted = {}
    for name in ("requirements.txt", "requirements-app.txt", "requirements-dev.txt"):
        wanted |= read_requirements(name)
    pins = read_requirements("constraints.txt")
    assert {normal(bound.name) for bound in bounds} == set(wanted)
    assert str(wanted["torch"].specifier) == "==2.13.0"
    for bound in bounds:
        name = normal(bound.name)
        version = str(pins[name].specifier).removeprefix("==")
        assert str(bound.specifier).startswith(">="), name
        assert version in bound.specifier, name
        assert bound.specifier == wanted[name].specifier or name == "torch"


@pytest.mark.slow
def test_what_is_imported_is_required():
    """A library that only another one brought along may be gone with its next version."""
    lists = read_requirements("requirements.txt") | read_requirements("requirements-app.txt")
    known = {normal(name) for name in lists}
    known |= {"pil", "yaml", "peft", "tensorboard", "wandb", "flash-attn", "vbench"}
    known |= {"flash-attn-interface", "setuptools"}
    ours = {path.name.removesuffix(".py") for path in ROOT.iterdir()}
    for file in ROOT.glob("**/*.py"):
        if {"tests", ".venv"} & set(file.relative_to(ROOT).parts):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            tops = {name.partition(".")[0] for name in names}
            strangers = {t for t in tops - ours - sys.stdlib_module_names if normal(t) not in known}
            assert strangers == set(), file
