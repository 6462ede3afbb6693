"""Published distilled checkpoints by name: the file, and the settings that it was made for.

Every entry names the public files that it was read from. What is published without its settings
(Self Forcing's 10-second weights), or needs what this engine has not (other levels for the first
block: Causal Forcing++ in 1 and 2 steps), is not listed.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from utils.errors import UserError

if TYPE_CHECKING:
    from utils.config import Config

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Family:
    """A checkpoint on the hub, and what plays it.

    `file` is a name or a pattern in the repository; it keeps its path below `folder`. `config` and
    `overrides` give method, levels and geometry. `sources` are the public files that say so.
    """

    repo_id: str
    file: str
    folder: str
    config: str
    licence: str
    purpose: str
    sources: tuple[str, ...]
    overrides: tuple[str, ...] = ()

    @property
    def checkpoint(self) -> str | None:
        """Where the download puts the weights; None if the file's name is not known."""
        return None if "*" in self.file else str(PurePosixPath(self.folder, self.file))

    def load_config(self) -> Config:
        """The settings that the weights were made for."""
        from utils.config import load_config  # late: it reads the table of downloads

        return load_config(self.config, self.overrides)


FAMILIES = {
    "rolling-forcing": Family(
        "TencentARC/RollingForcing",
        "checkpoints/rolling_forcing_dmd.pt",
        ".",
        "configs/rolling_forcing_dmd.yaml",
        "MIT (model card)",
        "released Rolling Forcing student",
        (
            "github.com/TencentARC/RollingForcing app.py (config and checkpoint)",
            "github.com/TencentARC/RollingForcing configs/rolling_forcing_dmd.yaml (as in "
            "github.com/yahavb/rolling_forcing: five levels, blocks of 3)",
        ),
    ),
    "self-forcing": Family(
        "gdhe17/Self-Forcing",
        "checkpoints/self_forcing_dmd.pt",
        ".",
        "configs/self_forcing_dmd.yaml",
        "Apache-2.0 (model card)",
        "released Self Forcing student (DMD)",
        ("github.com/guandeh17/Self-Forcing README.md (config and checkpoint)",),
    ),
    "self-forcing-sid": Family(
        "gdhe17/Self-Forcing",
        "checkpoints/self_forcing_sid.pt",
        ".",
        "configs/self_forcing_dmd.yaml",
        "Apache-2.0 (model card)",
        "released Self Forcing student (SiD)",
        (
            "github.com/guandeh17/Self-Forcing configs/self_forcing_sid.yaml (as in "
            "github.com/erenovic/Self-Forcing: levels and blocks of self_forcing_dmd.yaml)",
        ),
    ),
    "infinite-forcing": Family(
        "SOTAMak1r/Infinite-Forcing",
        "*.pt",
        "checkpoints",
        "configs/self_forcing_dmd_vsink1.yaml",
        "see source",
        "released Infinite-Forcing students (V-sink)",
        ("github.com/SOTAMak1r/Infinite-Forcing README.md (config and download)",),
    ),
    "causal-forcing": Family(
        "zhuhz22/Causal-Forcing",
        "chunkwise/causal_forcing.pt",
        "checkpoints",
        "configs/self_forcing_dmd.yaml",
        "see source",
        "released Causal Forcing student, blocks of 3, 4 steps",
        (
            "github.com/thu-ml/Causal-Forcing README.md (checkpoint)",
            "github.com/thu-ml/Causal-Forcing configs/causal_forcing_dmd_chunkwise.yaml (as in "
            "github.com/AshadowZ/PackForcing-Unofficial: levels and blocks of "
            "self_forcing_dmd.yaml)",
        ),
    ),
}


def family(name: str) -> Family:
    """The family of this name; raises UserError for an unknown one."""
    if name not in FAMILIES:
        raise UserError(f"there is no model {name!r}: known are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def fetched_checkpoint(name: str) -> str:
    """Path of a family's weights; raises UserError if they are not there, or have no one name."""
    path = family(name).checkpoint
    if path is None:
        raise UserError(
            f"{name} has weights of several names: fetch them with `python scripts/download.py "
            f"{name}` and give one as --checkpoint_path"
        )
    from utils.config import find_file  # late: it reads the table of downloads

    try:
        return str(find_file(path, "checkpoint"))
    except UserError as error:
        raise UserError(
            f"{path} is missing: fetch it with `python scripts/download.py {name}`, or give "
            "--checkpoint_path"
        ) from error


def warn_of_other_settings(resolved: Mapping[str, Any], checkpoint: Path) -> None:
    """One line if a family's weights are to be played by settings that they were not made for.

    `resolved`: a config as plain values.
    """
    from utils.config import to_dict  # late: it reads the table of downloads

    for name, known in FAMILIES.items():
        if known.checkpoint is None or not _is_named_like(checkpoint, known.file):
            continue
        theirs, ours = _settings(to_dict(known.load_config())), _settings(resolved)
        other = [key for key in theirs if theirs[key] != ours[key]]
        if other:
            described = ", ".join(f"{key} {theirs[key]} (here {ours[key]})" for key in other)
            logger.warning(
                "%s looks like %s, made for %s; use --model %s", checkpoint, name, described, name
            )
        return


def _is_named_like(checkpoint: Path, file: str) -> bool:
    """Whether a path ends as a file of the hub, but for the folder `checkpoints`."""
    words = tuple(word for word in PurePosixPath(file).parts if word != "checkpoints")
    return checkpoint.parts[-len(words) :] == words


def _settings(resolved: Mapping[str, Any]) -> dict[str, object]:
    """What a student cannot be played without, by the names of the keys."""
    names = ("schedule", "denoising_step_list", "warp_denoising_step", "num_frame_per_block")
    own_shift = resolved["model_kwargs"]["timestep_shift"]
    shift = resolved["timestep_shift"] if own_shift is None else own_shift
    return {**{name: resolved[name] for name in names}, "timestep_shift": shift}


def add_model_choice(group: argparse._ArgumentGroup) -> None:
    """The flags `--config_path` and `--model`, of which a command takes one."""
    which = group.add_mutually_exclusive_group()
    which.add_argument("--config_path", help="experiment file (default: the model that ships)")
    which.add_argument(
        "--model",
        metavar="NAME",
        help="a published checkpoint with its settings, instead of --config_path: "
        f"{', '.join(FAMILIES)}; scripts/download.py fetches it by the same name",
    )
