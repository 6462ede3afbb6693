"""YAML for experiment files: every mistake is one sentence with its line; values stand as written.

PyYAML's safe loader with the values of YAML 1.2: `no`, `010`, `1:30` and dates are texts (which a
key that is no text may still read as `false` or 10), 1e-5 is a number. A key is a text and stands
once; there is no interpolation.
"""

import re
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError

BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
INTEGER = re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$")
NUMBER = re.compile(
    r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
        |[-+]?\.[0-9_]+(?:[eE][-+]?[0-9]+)?
        |[-+]?\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
TAG = "tag:yaml.org,2002:"
MERGE, TEXT = f"{TAG}merge", f"{TAG}str"
OF_YAML_1_1 = frozenset(f"{TAG}{name}" for name in ("bool", "int", "float", "timestamp"))
KNOWN = frozenset(f"{TAG}{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map"))


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own form)
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in OF_YAML_1_1]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == MERGE:
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise _Mistake("a key is a list or a mapping; it has to be a text", key)
            if key.tag != TEXT:
                raise _Mistake(
                    f"the key '{key.value}' is no text; put it in quotes if so meant", key
                )
            if key.value in seen:
                raise _Mistake(f"the key '{key.value}' stands there twice; remove one", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag not in KNOWN:
            raise _Mistake(f"{node.tag.replace(TAG, '!!')} is no type of value here", node)
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError) as error:
            raise _Mistake(
                f"'{node.value[:40]}' is no {node.tag.removeprefix(TAG)}", node
            ) from error

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        if isinstance(node.value, str):
            if "${" in node.value:
                raise _Mistake(f"'{node.value}' is not replaced by anything; write the value", node)
            if node.value == "???":
                raise _Mistake("'???' stands for a value that is missing; write the value", node)
            if "\0" in node.value:
                raise _Mistake("a text holds a zero byte; remove it", node)
        return super().construct_scalar(node)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            name = self.peek_event()
            node = self.anchors.get(name.anchor)
            if node is not None and node.end_mark is None:
                raise yaml.composer.ComposerError(
                    None, None, f"'*{name.anchor}' stands within itself", name.start_mark
                )
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(f"{TAG}bool", BOOL, list("tTfF"))
_Loader.add_implicit_resolver(f"{TAG}int", INTEGER, list("-+0123456789"))
_Loader.add_implicit_resolver(f"{TAG}float", NUMBER, list("-+0123456789."))


class _Mistake(yaml.MarkedYAMLError):
    def __init__(self, problem: str, node: yaml.Node) -> None:
        super().__init__(problem=problem, problem_mark=node.start_mark)


def read_yaml(path: Path, rewrite: Callable[[str], str] | None = None) -> dict[str, Any]:
    """The `key: value` lines of a file; nothing in it is none of them.

    `rewrite` makes YAML of a file's own form, line by line.

    Raises:
        UserError: the file cannot be read, is no YAML, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    text = rewrite(text) if rewrite else text
    values = _parse(text, f"{path} is not readable as YAML", lines=True)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold `key: value` lines")
    return values


def parse_value(text: str, what: str) -> Any:
    """The value that a text such as `[1, 2]` stands for; UserError beginning with `what`."""
    return _parse(text, what, lines=False)


def _parse(text: str, what: str, *, lines: bool) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}" if lines and mark is not None else ""
        begun = error.context_mark
        since = f" (begun in line {begun.line + 1})" if lines and begun is not None else ""
        raise UserError(f"{what}{place}: {error.problem or error.context}{since}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, int(error.position)) + 1
        place = f", line {line}" if lines else ""
        raise UserError(f"{what}{place}: a character that no text has") from error
    except RecursionError as error:
        raise UserError(f"{what}: it is nested too deeply") from error
