"""Make a video again from its record, and from nothing else that the record names.

The record is data from anywhere: its values are checked like those of an experiment file, its names
are looked up among the models and checkpoints here, and no path in it is opened.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pipeline.changes import BRANCH, CAUSES, LONGEST_BLEND, POLICIES, Change
from pipeline.records import Record
from pipeline.stream import PrefixFrames
from utils.config import ROOT, ROUNDING_KEYS, VIDEO_KEYS, Config, config_of
from utils.errors import UserError
from utils.prompts import check_text

CHECKPOINTS = "checkpoints"
LONGEST = 10_000_000  # video frames, a week: more is no video
WEIGHTS = {
    "checkpoint_hash": "generator",
    "weights_hash": "generator",
    "network": "network (EMA or not)",
    "vae_hash": "VAE",
    "text_encoder_hash": "text encoder",
    "sizes_hash": "size of the model",
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_MODELS = re.compile(rf"{_NAME.pattern}(/{_NAME.pattern})?")  # of a hub, with its owner


@dataclass(frozen=True)
class Replay:
    """What a record says of how its video was made."""

    prompt: str
    seed: int
    sample: int
    number: int
    video_frames: int
    latent_frames: int | None
    prefix_frames: PrefixFrames
    changes: tuple[Change, ...]
    config: Mapping[str, Any]
    checkpoint: str | None
    use_ema: bool
    settings: Mapping[str, Any]
    frames_hash: str
    device: str

    def read_config(self, what: str, overrides: Sequence[str] = ()) -> Config:
        """The config of the record, with overrides of what does not decide the video.

        `what` names the record.
        """
        own = {"dtype", "text_embeddings"}  # the same may be had in another way here
        for item in overrides:
            if item.partition("=")[0].strip().split(".")[0] in VIDEO_KEYS - own:
                raise UserError(f"{item}: this is as in {what}; a replay cannot change it")
        return config_of(self.config, what, overrides)

    def find_checkpoint(self, given: str | None) -> str | None:
        """The checkpoint's path: as it is given, else by its name among those here."""
        if given is not None or self.checkpoint is None:
            return given
        for folder in (Path(CHECKPOINTS), ROOT / CHECKPOINTS):
            path = folder / self.checkpoint
            if path.exists():
                return str(path)
        raise UserError(
            f"this video was made with {self.checkpoint}, which is not in {CHECKPOINTS}/: say with "
            "--checkpoint_path where it is"
        )

    def check(self, ours: Mapping[str, Any]) -> None:
        """UserError unless the same video would be made with `ours` (see `video_settings_of`)."""
        for kind, thing in (("image", "an image"), ("video", "a video")):
            was, is_now = self.settings.get(kind), ours.get(kind)
            if was is not None and is_now is None:
                raise UserError(f"this video continues {thing}: give it with --{kind}")
            if was is None and is_now is not None:
                raise UserError(f"this video does not continue {thing}: leave --{kind} out")
            if was != is_now:
                raise UserError(f"this video continues another {kind} than the one given")
        others = [
            words for name, words in WEIGHTS.items() if ours.get(name) != self.settings.get(name)
        ]
        if others:
            raise UserError(
                f"this video was made with another {' and another '.join(others)}: "
                "these weights would make another video"
            )

    def compared(self, record: Record) -> str:
        """In words, whether the video of `record` is the one of this."""
        where = f"{self.device} in {self.config['dtype']}"
        here = f"{record['device']} in {record['config']['dtype']}"
        if record["frames_hash"] == self.frames_hash:
            return "the same, frame for frame"
        if where != here:
            return f"made on {here}, the recorded one on {where}: frames differ by rounding"
        return "not the same frames as recorded; torch or the code has changed since"


def read_replay(path: str | Path) -> Replay:
    """Read the record that stands beside a video; UserError where it is none."""
    record = _read(Path(path))
    what = f"{path} cannot be replayed"
    for name in ("changes", "config", "latent_frames", "frames_hash"):
        if name not in record:
            raise UserError(f"{what}: it says nothing of '{name}'; make the video once more")
    settings = _of(record, "settings", dict, what)
    prompt = _of(record, "prompt", str, what)
    check_text(prompt, f"the prompt of {path}")
    checkpoint = record.get("checkpoint")
    if checkpoint is not None and not _is_name(checkpoint):
        raise UserError(f"{what}: 'checkpoint' must be the name of a file, without a path")
    prefix_frames = settings.get("prefix_frames", "reconstructed")
    if prefix_frames not in get_args(PrefixFrames):
        raise UserError(f"{what}: 'prefix_frames' must be one of {get_args(PrefixFrames)}")
    latent_frames = record["latent_frames"]
    if latent_frames is not None:
        latent_frames = _number(record, "latent_frames", what, 1, LONGEST)
    return Replay(
        prompt=prompt,
        seed=_number(settings, "seed", what, 0, 2**64 - 1),
        sample=_number(settings, "sample", what, 0, 2**32),
        number=_number(record, "sample", what, 0, 2**32),
        video_frames=_number(record, "frames", what, 1, LONGEST),
        latent_frames=latent_frames,
        prefix_frames=prefix_frames,
        changes=_changes(record["changes"], what),
        config=_config(record["config"], what),
        checkpoint=checkpoint,
        use_ema=settings.get("network") == "generator_ema",
        settings=settings,
        frames_hash=_of(record, "frames_hash", str, what),
        device=_of(record, "device", str, what),
    )


def _read(path: Path) -> Record:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON; give the .json that stands beside a video") from error
    if not isinstance(record, dict):
        raise UserError(f"{path} is no record of a video; give the .json that stands beside one")
    return record


def _config(values: Any, what: str) -> dict[str, Any]:
    """The config of a record: keys that decide a video alone, and names without paths."""
    if not isinstance(values, dict):
        raise UserError(f"{what}: 'config' must hold keys with their values")
    others = sorted(str(key) for key in values.keys() - VIDEO_KEYS - ROUNDING_KEYS)
    if others:
        raise UserError(f"{what}: its config says '{others[0]}', which does not decide a video")
    if not _is_name(values.get("generator_name"), _MODELS):
        raise UserError(f"{what}: 'generator_name' must be the name of a model, without a path")
    if "${" in json.dumps(values):  # else it would stand for what the environment says
        raise UserError(f"{what}: its config holds a '${{', which nothing here replaces")
    config_of(values | {"text_embeddings": None}, what)
    return values | {"text_embeddings": None}


def _changes(values: Any, what: str) -> tuple[Change, ...]:
    if not isinstance(values, list):
        raise UserError(f"{what}: 'changes' must be a list")
    changes = [_change(value, f"{what}: change {i}") for i, value in enumerate(values)]
    blocks = [change.block for change in changes]
    if blocks != sorted(blocks):
        raise UserError(f"{what}: its changes are not in the order of their blocks")
    return tuple(changes)


def _change(value: Any, what: str) -> Change:
    if not isinstance(value, dict) or not value.keys() <= set(CAUSES):
        raise UserError(f"{what} must hold {', '.join(CAUSES)} alone")
    policy = value.get("policy", "keep")
    if policy not in (*POLICIES, BRANCH):
        raise UserError(f"{what} has the policy {policy!r}, which is none")
    prompt, seed, row = value.get("prompt"), value.get("seed"), value.get("row")
    if prompt is not None:
        check_text(_of(value, "prompt", str, what), what)
    if row not in (None, 0):
        raise UserError(f"{what} is of another video of a batch")
    return Change(
        block=_number(value, "block", what, 0, LONGEST),
        prompt=prompt,
        policy=policy,
        blend_blocks=_number({"blend_blocks": 0} | value, "blend_blocks", what, 0, LONGEST_BLEND),
        seed=None if seed is None else _number(value, "seed", what, 0, 2**64 - 1),
    )


def _is_name(value: Any, form: re.Pattern[str] = _NAME) -> bool:
    return isinstance(value, str) and form.fullmatch(value) is not None and ".." not in value


def _of(values: Mapping[str, Any], name: str, form: type, what: str) -> Any:
    if not isinstance(values.get(name), form):
        raise UserError(f"{what}: '{name}' must be a {form.__name__}")
    return values[name]


def _number(values: Mapping[str, Any], name: str, what: str, least: int, most: int) -> int:
    value = values.get(name)
    if type(value) is not int or not least <= value <= most:
        raise UserError(f"{what}: '{name}' must be a whole number from {least} to {most}")
    return value
