"""What is written down of the configuration: `configs/default_config.yaml` and `docs/config.md`.

python -m utils.config_docs  # writes both anew
"""

import textwrap
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from utils.config import ROOT, group_of
from utils.config_schema import METHOD_DEFAULTS, Config, Key, default_of

DEFAULTS = ROOT / "configs" / "default_config.yaml"
PAGE = ROOT / "docs" / "config.md"
COLUMN, WIDTH = 32, 110  # where comments begin, where lines end

YAML_HEAD = """\
# Every key with its default; an experiment file says only what differs. Written by
# `make docs` from utils/config_schema.py: to read, not to change. docs/config.md says more.
# Order of precedence: defaults < those of the method < `base` < the file < key=value.
"""
PAGE_HEAD = """\
# Every key of an experiment file

Written by `make docs` from `utils/config_schema.py`, where each key is declared once. An
experiment file says only what differs. In rising precedence: these defaults, those of the method,
`base: other.yaml`, the file, `key=value` on the command line (of a key below another:
`model_kwargs.sink_size=3`). Numbers are finite.

A value that decides what a **video** shows makes another video of it; of `dtype` the one counts
that is computed in. One that decides the **weights** that a training ends with makes another
training of it: the run is not gone on with, unless the value is also one of its **course**, that is
how long it is, how it is split up, what it saves, measures and shows on its way. A key of
**rounding** moves the last bits of a video and no more; records say it. A key that decides nothing
is of the machine and its logs.
"""


def main() -> None:
    """Write both files."""
    DEFAULTS.write_text(default_yaml(), encoding="utf-8")
    PAGE.write_text(config_page(), encoding="utf-8")


def default_yaml() -> str:
    """`configs/default_config.yaml`: all defaults, with choices and meaning behind each."""
    lines = [YAML_HEAD.rstrip()]
    hints = get_type_hints(Config)
    for each in fields(Config):
        lines += _yaml_lines(each, hints[each.name], "")
    return "\n".join(lines) + "\n"


def _yaml_lines(each: "Field[Any]", hint: Any, indent: str) -> Iterator[str]:
    key: Key = each.metadata["key"]
    if key.section:
        yield ""
        yield f"# --- {key.section} ".ljust(WIDTH - 1, "-")
    value = default_of(each)
    group = is_dataclass(value)
    text = f"{indent}{each.name}:" if group else f"{indent}{each.name}: {_as_yaml(value)}"
    choices = " | ".join(_choices(hint)) or key.form
    comment = "; ".join(filter(None, (choices, key.meaning))).replace("`", "")
    if len(text) > WIDTH - COLUMN:
        yield from textwrap.wrap(comment, WIDTH, initial_indent="# ", subsequent_indent="# ")
        yield text
    else:
        first, *more = textwrap.wrap(comment, max(30, WIDTH - max(COLUMN, len(text) + 2) - 2))
        yield f"{text.ljust(COLUMN - 2)}  # {first}"
        yield from (f"{' ' * max(COLUMN, len(text) + 2)}# {line}" for line in more)
    if group:
        hints = get_type_hints(type(value))
        for inner in fields(value):
            yield from _yaml_lines(inner, hints[inner.name], f"{indent}  ")


def _as_yaml(value: Any) -> str:
    text = yaml.safe_dump(value, allow_unicode=True, default_flow_style=True, width=10**6)
    return text.removesuffix("\n...\n").rstrip("\n")


def config_page() -> str:
    """`docs/config.md`: a table for each section, and the defaults of the methods."""
    lines = [PAGE_HEAD.rstrip()]
    hints = get_type_hints(Config)
    for each in fields(Config):
        lines += _rows(each, hints[each.name], "", ())
    lines += ["\n## defaults of the methods\n", *_method_rows()]
    return "\n".join(lines) + "\n"


def _rows(each: "Field[Any]", hint: Any, group: str, inherited: tuple[str, ...]) -> Iterator[str]:
    key: Key = each.metadata["key"]
    if key.section:
        yield f"\n## {key.section}\n"
        yield "| key | default | possible values | decides | meaning |"
        yield "|---|---|---|---|---|"
    decides = key.decides or inherited
    value, inner = default_of(each), group_of(hint)
    shown = "" if is_dataclass(value) else f"`{_as_yaml(value)}`"
    possible = ", ".join((*_choices(hint), *_limits(key)))
    cells = (f"`{group}{each.name}`", shown, possible, ", ".join(decides), key.meaning)
    yield f"| {' | '.join(cells)} |"
    if inner is not None:
        hints = get_type_hints(inner)
        for below in fields(inner):
            yield from _rows(below, hints[below.name], f"{group}{each.name}.", decides)


def _method_rows() -> Iterator[str]:
    yield f"| key | {' | '.join(METHOD_DEFAULTS)} |"
    yield "|---|" + "---|" * len(METHOD_DEFAULTS)
    flat = {
        method: {
            **{name: value for name, value in values.items() if not isinstance(value, dict)},
            **{f"model_kwargs.{k}": v for k, v in values["model_kwargs"].items()},
        }
        for method, values in METHOD_DEFAULTS.items()
    }
    for name in next(iter(flat.values())):
        cells = (f"`{_as_yaml(values[name])}`" for values in flat.values())
        yield f"| `{name}` | {' | '.join(cells)} |"


def _choices(hint: Any) -> list[str]:
    arms = [arm for arm in (hint, *get_args(hint)) if get_origin(arm) is Literal]
    return [str(choice) for arm in arms for choice in get_args(arm)]


def _limits(key: Key) -> list[str]:
    """What a value has to be, in words."""
    bounds, words = key.bounds, []
    if bounds.length is not None:
        fewest, most = bounds.length
        words.append(f"{fewest} values" if fewest == most else f"{fewest} to {most} values")
    if bounds.is_set:
        words.append(bounds.words())
    if bounds.falling:
        words.append("falling")
    if key.form:
        words.append(key.form)
    return words


if __name__ == "__main__":
    main()
