"""What README and docs say is true: commands, files, names, figures. tests/shapes has the rest."""

import ast
import re
import shlex
from importlib import import_module

import pytest

import train
from pipeline.memory import memory_report
from tests import readme
from tests.published import published_setup
from trainer import estimate
from trainer.data import split_batches
from trainer.footprint import Footprint, Phase, footprint
from utils.config import ROOT, load_config
from utils.downloads import DOWNLOADS
from utils.families import FAMILIES

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [words for words in readme.all_commands() if not readme.of_laboratory(str(words))]

NOTHING = Footprint(
    (Phase("generator", "rollout", {"student": 1}, 1),),
    {"generator": {"rollout": 1.0}},
    {"generator": 1.0},
)
SNIPPETS = [block for page in readme.PAGES for block in readme.blocks(page, "python")]


@pytest.mark.parametrize("words", COMMANDS, ids=shlex.join)
def test_command(words, tmp_path, monkeypatch, capsys):
    """Each is parsed by its own parser, its config loaded; what trains is run with --dry_run."""
    command = readme.parse(words)
    config = command and command.config
    if command is None:
        return
    if command.module == "scripts.download":
        assert set(command.args.names) <= set(DOWNLOADS)
    if command.module == "train" and config is not None:
        monkeypatch.chdir(tmp_path)
        prompts = tmp_path / str(config.data_path)  # as if it had been fetched
        prompts.parent.mkdir()
        prompts.write_text("a fox\nan owl\n", encoding="utf-8")
        monkeypatch.setattr(estimate, "footprint", lambda *_: NOTHING)
        assert train.main([*command.argv, "--dry_run", "--world_size", "8"]) == 0
        assert "8 ranks x" in capsys.readouterr().out


def test_files_and_names():
    """Five modules that README and docs named had been moved or were gone."""
    spans = {span for span in readme.named_files() if not readme.of_laboratory(span)}
    assert len(spans) > 50
    assert sorted(filter(None, map(readme.missing_name, spans))) == []


def test_tree():
    paths = [path for path in readme.tree_paths() if not readme.of_laboratory(path)]
    assert len(paths) > 70
    paths = [path for path in paths if path not in ("wan_models/", "checkpoints/")]  # what ships
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("room", ["wan", "pipeline", "server", "model", "trainer", "utils"])
def test_tree_is_complete(room):
    """A file that nobody finds in the tree might as well not be there."""
    named = set(readme.tree_paths())
    files = {f"{room}/{path.name}" for path in (ROOT / room).glob("[!_]*.py")}
    assert files - named == set()


def test_links():
    for page in readme.PAGES:
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text("utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize(
    "number", range(sum(len(readme.blocks(p, "python")) for p in readme.PAGES))
)
def test_snippet_imports(number):
    """Snippets whose weights have to be fetched: what they import is there."""
    source = [block for page in readme.PAGES for block in readme.blocks(page, "python")][number]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and not readme.of_laboratory(str(node.module)):
            for alias in node.names:
                assert hasattr(import_module(str(node.module)), alias.name), alias.name


# --- figures -------------------------------------------------------------------------------------


def test_models_are_all_named():
    for name in FAMILIES:
        assert f"`{name}`" in README or f"--model {name}" in README


def test_download_sizes():
    for name in ("wan2.1-1.3b", "ode-init", "vidprom-prompts"):
        assert f"{DOWNLOADS[name].size} for `{name}`" in README


def test_memory_of_the_published_model(tmp_path):
    """The line that a start prints, for files of the published sizes."""
    import torch

    report = memory_report(published_setup(tmp_path), torch.bfloat16)
    for size in re.findall(r"[\d.]+ [GM]iB", report):
        assert size in README, report


@pytest.mark.slow
def test_which_card():
    """The table of the profiles, as its command prints it."""
    from scripts.cards import table

    said = table()
    assert said in (ROOT / "docs" / "performance.md").read_text(encoding="utf-8"), said
    for needs in re.findall(r"([\d.]+ GiB) \|$", said, re.MULTILINE):
        assert f"| {needs} |" in README


def predicted(name: str) -> Footprint:
    config = load_config(f"configs/{name}.yaml")
    return footprint(config, estimate.planned_setup(config), 8, 8)


@pytest.fixture(scope="module")
def published_training() -> Footprint:
    return predicted("rolling_forcing_dmd")


@pytest.mark.long
def test_time_of_a_training(published_training):
    """Operations as the loop counts them, at the rate that the README assumes."""
    found = published_training
    generator, critic = (sum(found.flops[name].values()) / 1e12 for name in ("generator", "critic"))
    mean = found.step_flops / 1e12
    config = load_config("configs/rolling_forcing_dmd.yaml")
    seconds = split_batches(config, 8).accumulation * mean / 400
    assert f"| memory per rank | {found.peak / 2**30:.2f} GiB" in README
    for text in (f"{mean:.0f} TF", f"{critic:.0f} for the critic", f"{generator:.0f} for the"):
        assert text in README
    assert f"about {seconds:.0f} s at 400 TFLOP/s" in README
    assert f"{1000 * seconds / 3600:.0f} for every 1,000 steps" in README


@pytest.mark.long
def test_time_of_a_training_of_self_forcing():
    mean = predicted("self_forcing_dmd").step_flops / 1e12
    assert f"Self Forcing: {mean:.0f} TF, {8 * mean / 400:.0f} s" in README


@pytest.mark.long
def test_hours_and_memory_of_each_gpu(published_training):
    """The table of docs/training.md, as --dry_run computes it."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    config = load_config("configs/rolling_forcing_dmd.yaml")
    rows = re.findall(r"^\| \w+, \d+ GB \| (\d+) \| (.*) \| ([\d.]+) \| ([\d.]+) of", page, re.M)
    assert len(rows) == 4
    for rate, seconds, hours, memory in rows:
        step = published_training.step_flops / (float(rate) * 1e12)
        assert memory == f"{estimate.needed(published_training) / 2**30:.1f}"
        accumulations = (split_batches(config, ranks).accumulation for ranks in (8, 16, 64))
        assert seconds == " | ".join(f"{step * number:.0f}" for number in accumulations)
        assert hours == f"{8 * step * 1000 / 3600:.1f}"
