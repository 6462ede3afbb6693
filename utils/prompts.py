"""Prompt files, folders of images with prompts, and the names of the videos made from them."""

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.config import ROOT
from utils.downloads import how_to_get
from utils.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_STEM_BYTES = 200  # leaves room for "-<sample>.mp4" and ".part" within 255
PUBLISHED_STEM = 100  # characters of the prompt in a published file name
RESERVED_STEMS = frozenset(  # names of devices on Windows
    ["CON", "PRN", "AUX", "NUL", *(f"{d}{n}" for d in ("COM", "LPT") for n in range(1, 10))]
)


@dataclass(frozen=True)
class ImagePrompt:
    """A first image and what should happen in its video."""

    image_path: Path
    prompt: str


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a UTF-8 text file: one per line, blank lines left out.

    Raises:
        UserError: the file is missing, a folder, empty, or not UTF-8.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(
            f"{path} is a folder: give a text file with one prompt per line, "
            "or add --i2v if the folder holds images and their prompts."
        )
    prompts = [line.strip() for line in _read_text(path).split("\n") if line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompt: write one prompt per line.")
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
    except (json.JSONDecodeError, TypeError, KeyError) as error:
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
    captioned = []
    for image in images:
        caption = image.with_suffix(".txt")
        if not caption.is_file():
            raise UserError(f"{image} has no prompt: write it into {caption}.")
        captioned.append(ImagePrompt(image, " ".join(read_prompts(caption))))
    return captioned


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
    """The text of a UTF-8 file, with or without a byte-order mark, line ends as `\\n`."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: {how_to_get(path, ROOT)}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
