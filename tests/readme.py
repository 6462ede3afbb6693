"""What the README and the pages of docs/ say: their commands, snippets, and the files they name."""

import argparse
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from torch.distributed.run import get_args_parser

from scripts.__main__ import MODULES, commands
from utils.cli import parse_command
from utils.config import ROOT, Config, load_config
from utils.downloads import DOWNLOADS, how_to_get

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
MADE = ("data", "logs", "outputs", "runs", "videos", "LOGDIR")  # what running commands makes
LABORATORY = "shapes"  # what names it is tested beside it, in tests/shapes


def of_laboratory(text: str) -> bool:
    """Whether a command or a file needs the shapes world."""
    return LABORATORY in text


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)


def spans(page: Path) -> list[str]:
    """What stands between single backticks, outside fenced blocks."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S)
    return re.findall(r"`([^`]+)`", prose)


def lines(text: str) -> Iterator[list[str]]:
    """The words of each command of a block; quotes and backslashes join its lines."""
    held = ""
    for line in text.splitlines(keepends=True):
        held += line
        if not held.endswith("\\\n"):
            try:
                words = shlex.split(held.replace("\\\n", " "), comments=True)
            except ValueError:  # within quotes
                continue
            held = ""
            if words:
                yield words


def all_commands() -> list[list[str]]:
    """The commands of all pages: those of blocks, and those in the running text that are whole."""
    found = [words for page in PAGES for text in blocks(page, "bash") for words in lines(text)]
    for page in PAGES:
        for span in spans(page):
            if re.match(r"(python|torchrun|make|pip) \S", span) and "…" not in span:
                words = shlex.split(span)
                bare = re.fullmatch(r"python (-m )?\S+", span)  # named only, not to be run
                found.append([*words, "--help"] if bare else words)
            elif page.name == "README.md" and re.match(r"--\w+ \S", span) and "…" not in span:
                found.append(["python", "inference.py", *shlex.split(span)])
    unique = {shlex.join(words): words for words in found}
    return list(unique.values())


@dataclass(frozen=True)
class Command:
    """A command of ours: its module, its words, and what its own parser made of them."""

    module: str
    argv: list[str]
    args: argparse.Namespace

    @property
    def config(self) -> Config | None:
        """The config that it names, loaded; None for a placeholder such as `C`."""
        path = vars(self.args).get("config_path")
        if path is None or path.isupper():
            return None
        return load_config(path, self.args.overrides)


def parse(words: list[str]) -> Command | None:
    """Check a command as its program would; None if that is not ours. SystemExit if it is wrong."""
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    program, *rest = words
    if program == "torchrun":
        args = get_args_parser().parse_args(rest)
        return parse_ours(args.training_script, args.training_script_args)
    if program == "rolling-forcing":
        return parse_ours(commands()[rest[0]], rest[1:])
    if program == "python" and rest[0] == "-m":
        return parse_ours(rest[1], rest[2:])
    if program == "python" and rest[0] == "-c":
        compile(rest[1], "python -c", "exec")
        return None
    if program == "python":
        return parse_ours(rest[0], rest[1:])
    check_foreign(program, rest)
    return None


def parse_ours(name: str, argv: list[str]) -> Command | None:
    """A command by its file or module."""
    if name in ("setup.py", "scripts"):
        return None
    module = name.removesuffix(".py").replace("/", ".")
    if module.startswith("tests."):  # makes pictures of these pages
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), name
        return None
    assert module in MODULES, name
    assert not name.endswith(".py") or (ROOT / name).is_file(), name
    found = import_module(module)
    if argv == ["--help"]:
        found.build_parser().format_help()
        return None
    if hasattr(found, "verb_parsers"):
        verb = found.build_parser().parse_args(argv[:1]).verb
        return Command(module, argv, parse_command(found.verb_parsers()[verb], argv[1:]))
    return Command(module, argv, parse_command(found.build_parser(), argv))


def check_foreign(program: str, rest: list[str]) -> None:
    """What a program of others is told of ours: goals, files, extras, what to fetch."""
    if program == "make":
        goals = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M)
        assert set(rest) - {"PYTHON=python3.12"} <= set(goals), rest
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        for word in rest:
            if extra := re.fullmatch(r"\.\[(\w+)\]", word):
                assert extra[1] in project["optional-dependencies"], word
            assert not word.endswith(".txt") or (ROOT / word).is_file(), word
    elif program == "hf":
        repository, files = rest[1], [w for w in rest[2:-2] if not w.startswith("-")]
        known = [d for d in DOWNLOADS.values() if (d.repo_id, d.folder) == (repository, rest[-1])]
        assert rest[0] == "download", rest
        assert any(set(files) <= set(download.files) for download in known), rest
    else:
        assert program in ("tensorboard", "source"), program


# --- files and names -----------------------------------------------------------------------------


def named_files() -> set[str]:
    """Paths, and `path:name`, between backticks on any page."""
    found = set()
    for page in PAGES:
        for span in spans(page):
            path = re.fullmatch(r"([\w.*/{},-]+?)(:[\w.]+)?", span)
            top = path[1].partition("/")[0] if path else ""
            looks = path and (path[1].endswith((".py", ".md", ".yaml")) or (ROOT / top).is_dir())
            if looks and top not in ("", *MADE) and ("/" in span or "." in span):
                found.add(span)
    return found


def missing_name(span: str) -> str | None:
    """What is not there of a file, or of a name in a file; None if it is, or can be fetched."""
    path, _, name = span.partition(":")
    files = list(ROOT.glob(path))
    if not files:
        return None if how_to_get(path, ROOT) != "check the path" else path
    for part in name.split(".") if name else ():
        defined = rf"^\s*(def|class) {part}\b|^{part}\b.*="
        if not re.search(defined, files[0].read_text("utf-8"), re.M):
            return span
    return None


def tree_paths() -> list[str]:
    """The paths of the README's tree: names, two spaces, what they are."""
    (tree,) = (block for block in blocks(PAGES[0], "") if "the entry points" in block)
    found, room = [], ""
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        names = re.split("  +", line.strip())[0].split(", ")
        if indent == 0:
            room = names[0] if len(names) == 1 else ""
            found += names
        elif indent == 2:
            found += [room + name for name in names]
    return found
