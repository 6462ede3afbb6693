"""All commands of the project by name: `rolling-forcing NAME …`, or `python -m scripts NAME …`."""

import argparse
import ast
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

if not __package__:  # run by its path: the tree that it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import run_main

MODULES = (
    "app",
    "inference",
    "train",
    "scripts.download",
    "scripts.precompute",
    "scripts.export",
    "scripts.evaluate",
    "scripts.benchmark",
    "scripts.gpu_check",
    "scripts.predict",
    "scripts.quality",
    "scripts.cards",
    "scripts.attention_maps",
    "scripts.plot_run",
    "scripts.live_client",
    "scripts.live_figures",
    "shapes.chain",
    "shapes.ablate",
    "shapes.continuation",
    "shapes.direction",
    "shapes.drift",
    "shapes.picture",
    "shapes.starts",
    "shapes.init",
)


def commands() -> dict[str, str]:
    """The module of each command by its name; a room that was taken out has none."""
    there = (module for module in MODULES if find_spec(module.partition(".")[0]))
    return {module.rpartition(".")[2]: module for module in there}


def build_parser() -> argparse.ArgumentParser:
    """The command line: a name, and what is that command's own."""
    lines = [f"  {name:20}{purpose(module)}" for name, module in commands().items()]
    parser = argparse.ArgumentParser(
        prog="rolling-forcing",
        usage="%(prog)s COMMAND [flags of the command, or --help]",
        description="\n".join(["commands:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=list(commands()), help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def purpose(module: str) -> str:
    """The first line of a module's docstring, read without importing it."""
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").partition("\n")[0]


def main(argv: Sequence[str]) -> int:
    """Run the command that is named."""
    args = build_parser().parse_args(argv)
    sys.argv[0] = f"rolling-forcing {args.command}"  # for the usage line of its own parser
    return import_module(commands()[args.command]).main(args.arguments)


def run() -> int:
    """What the installed `rolling-forcing` calls."""
    return run_main(main)


if __name__ == "__main__":
    sys.exit(run())
