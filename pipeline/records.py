"""Records: the JSON beside a video that says what made it, so that it can be made again."""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.changes import Change
from pipeline.setup import Setup
from utils.config import VIDEO_KEYS, fingerprint
from utils.devices import choose_device, computed_dtype, device_name
from wan.folders import ModelFolder

MIB = 2**20
SHOWN_SETTINGS = ("seed", "sample", "latent_frames", "video_frames", "prefix_frames", "network")
SETTINGS_IN_WORDS = {
    "config_hash": "config",
    "sizes_hash": "size of the model",
    "latent_frames": "number of latent frames",
    "video_frames": "number of frames",
    "vae_hash": "VAE",
    "text": "prompt",
    "changes_hash": "changes of prompt",
}

Record = dict[str, Any]


@dataclass(frozen=True)
class ModelSource:
    """Which generator a pipeline runs: of a checkpoint (None: the model folder's own)."""

    checkpoint: Path | None
    use_ema: bool


def chained_hash(before: str, frames: Tensor) -> str:
    """SHA-256 of frames uint8 `[n, H, W, 3]` one after the other, each with the hash before it."""
    for frame in frames.contiguous().numpy():
        before = hashlib.sha256(before.encode() + frame.tobytes()).hexdigest()
    return before


def describe_video(
    setup: Setup,
    source: ModelSource | None,
    *,
    prompt: str,
    seed: int,
    number: int,
    frames: int,
    latent_frames: int | None,
    frames_hash: str,
    settings: Mapping[str, Any],
    changes: Sequence[Change] = (),
    timings: Mapping[str, float] | None = None,
) -> Record:
    """What made a video, with what, how fast.

    `number`: which of its prompt's videos it is. `latent_frames`: those of the stream that it was
    taken from; None for one without an end. `settings`: all that it depends on, in short;
    `config` and `changes` say it at length. `frames_hash`: see `chained_hash`.
    """
    checkpoint = None if source is None else source.checkpoint
    device = device_name(str(choose_device(setup.machine.device)))
    ranks = setup.machine.sequence_parallel
    return {
        "prompt": prompt,
        "sample": number,
        "seed": seed,
        "frames": frames,
        "latent_frames": latent_frames,
        "changes": [change.record() for change in changes],
        "settings": dict(settings),
        "config": replay_config(setup),
        "checkpoint": None if checkpoint is None else checkpoint.name,
        "frames_hash": frames_hash,
        "timings": {key: round(value, 4) for key, value in (timings or {}).items()},
        "device": f"{ranks} x {device}" if ranks > 1 else device,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "diffusers", "transformers")},
        },
    }


def replay_config(setup: Setup) -> dict[str, Any]:
    """The keys that decide a video, to the last bit, with what was chosen for `auto` and null.

    The seed stands apart.
    """
    decide = {name: value for name, value in setup.resolved.items() if name in VIDEO_KEYS}
    del decide["seed"], decide["i2v"]
    dtype = computed_dtype(setup.machine.dtype, setup.machine.device)
    return {
        **decide,
        "dtype": str(dtype).removeprefix("torch."),
        "merge_clean_pass": setup.merges_clean_pass,
        "vae_frugal": setup.machine.vae_frugal,
    }


def video_settings_of(
    model: Mapping[str, Any],
    *,
    prompt: str,
    seed: int,
    sample: int,
    latent_frames: int | None,
    video_frames: int,
    prefix_frames: str = "reconstructed",
    prefix: Mapping[str, str] | None = None,
    changes: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """What one video depends on: its model (see `model_settings`), and what is its own.

    `latent_frames`: None where it was cut from a stream without an end. `prefix`: hash of the
    image or video that it continues, by kind. `changes` of prompt as plain values.
    """
    return {
        "seed": seed,
        "latent_frames": latent_frames,
        "video_frames": video_frames,
        "prefix_frames": prefix_frames,
        **model,
        **(prefix or {}),
        "text": _text_hash(prompt),
        "sample": sample,
        **({"changes_hash": _text_hash(json.dumps(list(changes)))} if changes else {}),
    }


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_record(video: Path) -> Record | None:
    """The record beside a video; None if there is none, or it is not of this form."""
    try:
        record = json.loads(video.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    forms = {"prompt": str, "frames": int, "settings": dict, "timings": dict, "device": str}
    return record if all(isinstance(record.get(k), form) for k, form in forms.items()) else None


def describe_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """In what settings differ, in words; None if they are the same."""
    names = [name for name in dict.fromkeys((*new, *old)) if old.get(name) != new.get(name)]
    if not names:
        return None
    words = []
    for name in names:
        thing = SETTINGS_IN_WORDS.get(name, name.removesuffix("_hash").replace("_", " "))
        told = name in SHOWN_SETTINGS
        words.append(f"{thing} ({old.get(name)}, now {new.get(name)})" if told else thing)
    return f"made with another {', '.join(words)}"


def network_files(folder: Path) -> list[Path]:
    """The transformer's files of a model folder, in order."""
    return sorted(folder.glob("**/diffusion_pytorch_model*.safetensors"))


def weight_files(path: Path) -> list[Path]:
    """A weights file, or those of a diffusers folder; none if it is not there."""
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))


def text_files(folder: ModelFolder) -> list[Path]:
    """Those of a model folder's text encoder and of its tokenizer, in order."""
    return [*weight_files(folder.text_encoder), *sorted(folder.tokenizer.glob("*.*"))]


def model_settings(setup: Setup, checkpoint: Path | None, *, use_ema: bool) -> dict[str, str]:
    """What all videos of a model depend on: its settings and weights, by their hashes."""
    files = setup.require_folder()
    parts = {
        "sizes": sorted(files.path.glob("**/config.json")),
        "checkpoint": (
            [checkpoint]
            if checkpoint and checkpoint.is_file()
            else network_files(checkpoint or files.path)
        ),
        "vae": weight_files(files.vae),
        "text_encoder": [] if setup.text_embeddings else text_files(files),
    }
    return {
        "config_hash": fingerprint(setup.video_settings()),
        "network": "generator_ema" if use_ema else "generator",
        **{f"{name}_hash": "+".join(map(file_hash, paths)) for name, paths in parts.items()},
    }


def file_hash(path: Path) -> str:
    """A short SHA-256 of a file: of all of it up to 64 MiB, else of its size and 64 samples."""
    status = path.stat()
    return _hash_of(path.absolute(), status.st_size, status.st_mtime_ns)


@lru_cache
def _hash_of(path: Path, size: int, changed: int) -> str:
    """Computed once, as long as size and time of change (nanoseconds) are the same."""
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= 64 * MIB:
            digest.update(file.read())
        else:
            for part in range(64):
                file.seek(part * (size - MIB) // 63)
                digest.update(file.read(MIB))
    return digest.hexdigest()[:16]
