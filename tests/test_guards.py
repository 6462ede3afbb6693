"""Rules of the code that a search holds: each names what must not stand in which files."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from utils.config import ROOT

ROOMS = (
    "wan",
    "model",
    "pipeline",
    "trainer",
    "utils",
    "evaluation",
    "shapes",
    "server",
    "scripts",
)


def sources(rooms: Sequence[str] = ()) -> list[Path]:
    """The Python files of rooms; of all that is ours, but for the tests, if none is named."""
    top = [] if rooms else sorted(ROOT.glob("*.py"))
    return [*top, *(f for room in rooms or ROOMS for f in (ROOT / room).rglob("*.py"))]


def matches(pattern: str, files: Sequence[Path]) -> list[str]:
    """`file:line: text` of each line that the pattern is found in."""
    return [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]


@pytest.mark.parametrize(
    ("pattern", "rooms"),
    [
        pytest.param(r"\b(1560|32760|4680)\b|60, ?104|12, ?128", (), id="sizes of one model"),
        pytest.param(r"(getattr|hasattr)\((self\.)?(config|cfg|args)", (), id="keys by guess"),
        pytest.param(
            r"torch\.distributed|os\.environ|import environ",
            ("wan", "model", "pipeline"),
            id="ranks and environment",
        ),
        pytest.param(
            r"sys\.path(?!\.insert\(0, str\(Path\(__file__\)\.resolve\(\)\.parents\[1\]\)\))"
            "|addsitedir",
            (),
            id="search path",
        ),
        pytest.param(r"pickle\.load|allow_pickle=True|weights_only=False", (), id="code in files"),
        pytest.param(r"^from __main__|import_module\(.shapes", (), id="rooms by the back door"),
    ],
)
def test_nowhere(pattern, rooms):
    assert matches(pattern, sources(rooms)) == []


def test_weights_are_loaded_without_code():
    """A pickle runs what it likes when it is loaded: `torch.load` says `weights_only=True`."""
    for file in sources():
        for call in re.findall(r"torch\.load\(([^()]*(?:\([^()]*\)[^()]*)*)\)", file.read_text()):
            assert "weights_only=True" in call, file


def test_config_ends_at_the_door():
    """Below `pipeline/setup.py` code takes a `Setup` or plain numbers, never `Config`."""
    hits = matches(r"config: Config\b", sources(("wan", "model", "pipeline")))
    assert {hit.partition(":")[0] for hit in hits} == {"pipeline/setup.py"}
