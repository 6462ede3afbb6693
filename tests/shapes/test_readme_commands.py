"""What README and docs say of the shapes world: its commands, its files, and the snippets."""

import json
import shlex

import pytest

from scripts import evaluate
from tests import readme
from utils.config import ROOT
from utils.video import probe_video

COMMANDS = [words for words in readme.all_commands() if readme.of_laboratory(str(words))]
SHIPPED = [block for page in readme.PAGES for block in readme.blocks(page, "python")]
SHIPPED = [block for block in SHIPPED if readme.of_laboratory(block)]


@pytest.mark.parametrize("words", COMMANDS, ids=shlex.join)
def test_command(words):
    """Each is parsed by its own parser, and its config loaded."""
    command = readme.parse(words)
    if command is not None:
        assert command.config is None or command.config.generator_name


def test_files_and_names():
    spans = {span for span in readme.named_files() if readme.of_laboratory(span)}
    assert len(spans) > 10
    assert sorted(filter(None, map(readme.missing_name, spans))) == []
    paths = [path for path in readme.tree_paths() if readme.of_laboratory(path)]
    assert {f"shapes/{path.name}" for path in (ROOT / "shapes").glob("[!_]*.py")} <= set(paths)
    assert all((ROOT / path).exists() for path in paths)


@pytest.mark.slow
@pytest.mark.parametrize("source", SHIPPED)
def test_snippet(source, tmp_path, monkeypatch):
    """It runs as it stands, in a folder where nothing is."""
    monkeypatch.chdir(tmp_path)
    exec(compile(source, "README", "exec"), {})
    if "star.mp4" in source:
        assert probe_video(tmp_path / "star.mp4").frames == 81


@pytest.mark.slow
def test_evaluation(tmp_path, monkeypatch):
    """The README's line as it stands, with less to do behind it."""
    monkeypatch.chdir(tmp_path)
    texts = readme.blocks(readme.PAGES[0], "bash")
    commands = [words for text in texts for words in readme.lines(text)]
    found = [readme.parse(words) for words in commands if "scripts/evaluate.py" in words]
    assert found
    for command in found:
        shorter = ["--prompts", "1", "--seeds", "1", "--seconds", "1"]
        assert evaluate.main([*command.argv, *shorter]) == 0
        assert json.loads(command.args.json.read_text())
