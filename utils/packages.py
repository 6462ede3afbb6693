"""Packages that plug in by name: in `shapes:train` the package stands before the colon.

A package is a folder with code that Python can import. It offers what it has as functions of its
own name space, each imported and called only where it is asked for:

    open_dataset(split, *, num_frames, height, width) -> Dataset   data_path: package:split
    open_task(name) -> type[Task]                                  trainer: package:name
    open_meter() -> Meter                                          evaluate.py --meter package
    held_out_prompts(count) -> list[str]                           evaluate.py without --data_path
    open_demo() -> module                                          inference.py without flags
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from utils.errors import UserError


def split_name(text: str) -> tuple[str, str] | None:
    """`package:name` as its two parts; None for anything else, such as a path without a colon."""
    package, colon, name = text.partition(":")
    return (package, name) if colon and "/" not in package and "\\" not in package else None


def offers(package: str, function: str) -> bool:
    """Whether a package is there and has such a function."""
    try:
        offered(package, function)
    except UserError:
        return False
    return True


def offered(package: str, function: str) -> Callable[..., Any]:
    """A function that a package offers.

    Raises:
        UserError: the name is none of a top-level package, there is none, or it has no such
            function.
    """
    if not package.isidentifier():
        raise UserError(f"'{package}' is no name of a package: write package:name, as shapes:train")
    spec = None if package.startswith("__") else importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None or spec.origin is None:
        raise UserError(f"there is no package '{package}'; check the name before the colon")
    found = getattr(importlib.import_module(package), function, None)
    if not callable(found):
        raise UserError(f"the package '{package}' offers no {function}; name another one")
    return found
