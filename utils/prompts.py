"""Prompt files, folders of images with prompts, and the names of the videos made from them."""

import codecs
import csv
import io
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.config import ROOT
from utils.downloads import how_to_get
from utils.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_STEM_BYTES = 200  # leaves room for "-<sample>.mp4" and ".part" within 255
PUBLISHED_STEM = 100  # characters of the prompt in a published file name
RESERVED_STEMS = frozenset(  # names of devices on Windows
    ["CON", "PRN", "AUX", "NUL", *(f"{d}{n}" for d in ("COM", "LPT") for n in range(1, 10))]
)

PROMPT_COLUMNS = frozenset({"prompt", "caption", "text", "prompt_en"})  # the last is VBench's
DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")
PROMPT_SUFFIXES = (".txt", ".json", *JSON_LINES, *DELIMITERS)
OTHER_SUFFIXES = frozenset(
    {
        *(".yaml", ".yml", ".toml", ".ini", ".json5", ".jsonc", ".xml", ".html", ".htm", ".ipynb"),
        *(".md", ".rst", ".rtf", ".doc", ".docx", ".odt", ".pdf", ".srt", ".vtt"),
        *(".xls", ".xlsx", ".ods", ".parquet", ".arrow", ".pkl", ".npy", ".npz", ".pt"),
        *(".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".7z", ".safetensors", ".py"),
    }
)
PROMPT_FORMS = (
    "give lines of text, a JSON list of texts or of objects with a prompt, "
    '{"prompts": […]}, JSON lines, or a CSV or TSV table, where the key or column of the prompt is '
    "called prompt, caption, text or prompt_en"
)
BYTE_ORDER_MARKS = {  # the longer ones first: UTF-32's begins as UTF-16's
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@dataclass(frozen=True)
class ImagePrompt:
    """A first image and what should happen in its video."""

    image_path: Path
    prompt: str


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file in one of the usual forms (`PROMPT_FORMS`), outer spaces left out.

    The form goes by the suffix (`.json`, `.jsonl`, `.csv`, `.tsv`); any other file is lines of
    text, blank ones left out, unless what stands in it is JSON. UTF-8, and UTF-16 and UTF-32 with
    their byte-order mark.

    Raises:
        UserError: the file is missing, a folder, empty, no text, or in none of the forms.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(
            f"{path} is a folder: give a text file with one prompt per line, "
            "or add --i2v if the folder holds images and their prompts."
        )
    suffix = path.suffix.lower()
    if suffix in OTHER_SUFFIXES:
        raise UserError(f"{path} is no prompt file: {PROMPT_FORMS}.")
    text = _read_text(path)
    if suffix in DELIMITERS:
        prompts = _table_prompts(path, text, DELIMITERS[suffix])
    elif suffix in JSON_LINES or (suffix != ".json" and _is_json_lines(text)):
        prompts = _json_lines(path, text)
    elif suffix == ".json" or _is_json(text):
        prompts = _json_prompts(path, _parse(path, text))
    else:
        prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompt: write one prompt per line.")
    for number, prompt in enumerate(prompts, 1):
        check_text(prompt, f"{path}: prompt {number}")
    return prompts


def check_text(prompt: str, what: str = "the prompt") -> None:
    """UserError for a text that no encoder can read: halves of characters (lone surrogates)."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        shown = prompt[:60].encode("utf-8", "replace").decode()
        raise UserError(
            f"{what}, '{shown}', holds half a character (at {error.start}): write it as UTF-8"
        ) from error


def _is_json(text: str) -> bool:
    """Whether a text without a telling suffix is JSON, whole or broken, and no lines of prompts.

    A prompt may begin with a bracket, too: "[wide shot] a sailing boat".
    """
    text = text.strip()
    if text[:1] not in ("{", "["):
        return False
    try:
        json.loads(text)
    except RecursionError:
        return True
    except ValueError:
        return re.match(r'\{\s*["}]|\[\s*["{\[\]]', text) is not None
    return True


def _is_json_lines(text: str) -> bool:
    """Whether every line of a text is a JSON object."""
    lines = [line for line in text.split("\n") if line.strip()]
    try:
        return bool(lines) and all(isinstance(json.loads(line), dict) for line in lines)
    except (ValueError, RecursionError):
        return False


def _parse(path: Path, text: str, line: int | None = None) -> Any:
    """JSON; UserError that names the place where it is broken."""
    try:
        return json.loads(text, object_pairs_hook=_without_doubles)
    except json.JSONDecodeError as error:
        place = line or error.lineno
        raise UserError(f"{path} is not valid JSON (line {place}): {error.msg}.") from error
    except KeyError as error:
        raise UserError(f"{path} has the key {error} twice in one object: remove one.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable as JSON: {PROMPT_FORMS}.") from error


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; KeyError for a key that stands in it twice, where one value would be lost."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise KeyError(key)
        values[key] = value
    return values


def _json_prompts(path: Path, value: Any) -> list[str]:
    if isinstance(value, dict) and isinstance(value.get("prompts"), list):
        value = value["prompts"]
    if not isinstance(value, list):
        raise UserError(f"{path} is JSON of another form: {PROMPT_FORMS}.")
    return [_prompt_of(path, entry, f"entry {number}") for number, entry in enumerate(value, 1)]


def _json_lines(path: Path, text: str) -> list[str]:
    return [
        _prompt_of(path, _parse(path, line, number), f"line {number}")
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]


def _prompt_of(path: Path, entry: Any, place: str) -> str:
    """The prompt of one JSON entry: a text, or an object with one key that says so."""
    if isinstance(entry, dict):
        entry = entry.get(_only_column(path, list(entry), place))
    if not isinstance(entry, str) or not entry.strip():
        raise UserError(f"{path}: {place} has no prompt: {PROMPT_FORMS}.")
    return entry.strip()


def _only_column(path: Path, names: Sequence[str], place: str) -> str:
    """Which of an entry's keys (or a table's columns) holds the prompt."""
    known = [name for name in names if name.strip().lower() in PROMPT_COLUMNS]
    if len(known) > 1:
        both = " and ".join(f'"{name}"' for name in known)
        raise UserError(f"{path}: {place} has {both}: keep the one that is the prompt.")
    if not known:
        raise UserError(f"{path}: {place} names no prompt: {PROMPT_FORMS}.")
    return known[0]


def _table_prompts(path: Path, text: str, delimiters: str) -> list[str]:
    """The column of a table; the delimiter is the first that makes its header name one."""
    head = next((line for line in text.split("\n") if line.strip()), "")
    fitting = (
        mark
        for mark in delimiters
        if {name.strip().strip('"').lower() for name in head.split(mark)} & PROMPT_COLUMNS
    )
    rows = csv.reader(io.StringIO(text), delimiter=next(fitting, delimiters[0]), strict=True)
    prompts: list[str] = []
    header: list[str] = []
    column = 0
    try:
        for row in rows:
            place = f"line {rows.line_num}"
            if not any(cell.strip() for cell in row):
                continue
            if not header:
                header, place = row, "the header"
                column = header.index(_only_column(path, header, place))
                continue
            if len(row) > len(header):
                raise UserError(
                    f"{path}: {place} has {len(row)} cells for {len(header)} columns; put quotes "
                    "around a prompt that holds the delimiter"
                )
            if column >= len(row) or not row[column].strip():
                raise UserError(f"{path}: {place} has no prompt; write it, or leave the line out")
            prompts.append(row[column].strip())
    except csv.Error as error:
        raise UserError(f"{path} is no readable table (line {rows.line_num}): {error}") from error
    return prompts


def read_extended_prompts(path: str | Path, prompts: Sequence[str]) -> list[str]:
    """The longer wordings of `prompts`, line by line.

    Raises:
        UserError: as `read_prompts`, or the number of prompts differs.
    """
    extended = read_prompts(path)
    if len(extended) != len(prompts):
        raise UserError(
            f"{path} holds {len(extended)} extended prompts for {len(prompts)} prompts: "
            "it needs one line for each prompt, in the same order."
        )
    return extended


def read_image_prompts(folder: str | Path) -> list[ImagePrompt]:
    """Images and prompts of an `--i2v` folder, in either published form.

    - `target_crop_info_<ratio>.json`, a list of objects with "file_name" and "caption", and the
      images, cropped already, in the sub folder `<ratio>` (for example `26-15`); in the order of
      the list, which is the published index. Other keys (the crop's origin) are not needed.
    - Images, each with a text file of the same name that holds its prompt; sorted by name.

    Raises:
        UserError: the folder, an image or a prompt is missing, or the list is not of this form.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: --i2v takes a folder of images and prompts.")
    lists = sorted(folder.glob("target_crop_info_*.json"))
    if len(lists) > 1:
        names = ", ".join(path.name for path in lists)
        raise UserError(f"{folder} holds several lists ({names}): keep one.")
    return _listed_images(lists[0]) if lists else _captioned_images(folder)


def _listed_images(path: Path) -> list[ImagePrompt]:
    try:
        entries = json.loads(_read_text(path))
        listed = [(entry["file_name"], entry["caption"]) for entry in entries]
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise UserError(
            f'{path} must be a JSON list of objects with "file_name" and "caption".'
        ) from error
    if not listed:
        raise UserError(f"{path} lists no image: add at least one.")
    images = path.parent / path.stem.removeprefix("target_crop_info_")
    for name, caption in listed:
        if not isinstance(caption, str) or not caption.strip():
            raise UserError(f'{path} has no "caption" for {name}: write its prompt there.')
        if not isinstance(name, str) or not (images / name).is_file():
            raise UserError(f"{path} lists {name}, but there is no image {images / str(name)}.")
    return [ImagePrompt(images / name, caption.strip()) for name, caption in listed]


def _captioned_images(folder: Path) -> list[ImagePrompt]:
    images = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise UserError(
            f"{folder} holds no image: put images there, each with a .txt of the same name, "
            "or a target_crop_info_<ratio>.json and its images in <ratio>/."
        )
    missing = [image for image in images if not image.with_suffix(".txt").is_file()]
    if missing:
        more = f", nor have {len(missing) - 1} others" if len(missing) > 1 else ""
        raise UserError(
            f"{missing[0]} has no prompt{more}: write it into {missing[0].with_suffix('.txt')}."
        )
    return [ImagePrompt(image, read_caption(image.with_suffix(".txt"))) for image in images]


def read_caption(path: Path) -> str:
    """The text of a file that holds one prompt, in any number of lines; UserError if empty."""
    caption = " ".join(line.strip() for line in _read_text(path).split("\n") if line.strip())
    if not caption:
        raise UserError(f"{path} holds no prompt: write it there.")
    check_text(caption, str(path))
    return caption


def output_names(
    prompts: Sequence[str], num_samples: int, *, with_index: bool, ema: bool
) -> list[list[str]]:
    """The published file names, for each prompt one per sample: `names[prompt][sample]`.

    `{prompt[:100]}-{sample}.mp4`, or with index `{index}-{sample}_{ema|regular}.mp4`. Prompts
    that would share a name (on a file system that ignores case, too) get `_2`, `_3`, ... after
    the stem, except the first. So pass all prompts of a run, not one rank's share.
    """
    if with_index:
        kind = "ema" if ema else "regular"
        tails = [f"{sample}_{kind}" for sample in range(num_samples)]
        stems = [str(index) for index in range(len(prompts))]
    else:
        tails = [str(sample) for sample in range(num_samples)]
        stems = _distinct([safe_stem(prompt) for prompt in prompts])
    return [[f"{stem}-{tail}.mp4" for tail in tails] for stem in stems]


def safe_stem(prompt: str, limit: int = PUBLISHED_STEM) -> str:
    """The first `limit` characters of a prompt, made fit to be a file name's stem.

    Slashes, control characters and line separators become `_`; leading and trailing dots and
    spaces go; a device name of Windows gets a `_` in front; at most 200 bytes of UTF-8, cut
    between characters. Any other prompt is unchanged.
    """
    stem = "".join("_" if _breaks_names(char) else char for char in prompt[:limit])
    stem = clip_utf8(stem.lstrip(". "), MAX_STEM_BYTES).rstrip(". ")
    if not stem or stem.split(".")[0].rstrip().upper() in RESERVED_STEMS:
        stem = f"_{stem}"
    return stem


def clip_utf8(text: str, max_bytes: int) -> str:
    """The longest start of `text` that takes at most `max_bytes` bytes of UTF-8."""
    return text.encode("utf-8", "surrogatepass")[:max_bytes].decode("utf-8", "ignore")


def _breaks_names(char: str) -> bool:
    # Cc: control characters, Cs: lone surrogates, Zl and Zp: line and paragraph separators
    return char in "/\\" or unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")


def _distinct(stems: Sequence[str]) -> list[str]:
    """Number the repeated stems; a number never takes a name that another prompt has by itself."""
    taken = {_folded(stem) for stem in stems}
    seen: dict[str, int] = {}
    distinct = []
    for stem in stems:
        key = _folded(stem)
        count = seen.get(key, 0) + 1
        name = stem
        while count > 1 and _folded(name := f"{stem}_{count}") in taken:
            count += 1
        seen[key] = count
        taken.add(_folded(name))
        distinct.append(name)
    return distinct


def _folded(stem: str) -> str:
    """Equal for stems that some file system takes for one name."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", stem).casefold())


def _read_text(path: Path) -> str:
    """The text of a file, without its byte-order mark, line ends as `\\n`."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: {how_to_get(path, ROOT)}.") from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    encoding = next(
        (name for mark, name in BYTE_ORDER_MARKS.items() if data[:4].startswith(mark)), "utf-8"
    )
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        raise UserError(f"{path} is not {name} (byte {error.start}): save it as UTF-8.") from error
    if "\0" in text:
        raise UserError(f"{path} is no text (it holds zero bytes): save it as UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n")
