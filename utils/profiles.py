"""Profiles: what to set so that the published 1.3B model fits a card; one table.

docs/performance.md shows it with what each needs (`scripts/cards.py`). A profile only sets keys of
the config that nobody has set: none that the command line names, and none that the experiment file
has changed.
"""

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.config import Config, load_config, to_dict

logger = logging.getLogger(__name__)

Profile = Mapping[str, Any]

PROFILES: dict[str, Profile] = {
    "24gb": {},
    "16gb": {"vae_frugal": True},
    "12gb": {
        "text_encoder_device": "cpu",
        "vae_frugal": True,
        "kv_cache_dtype": "float8",
        "linear_dtype": "float8",
    },
    "8gb": {
        "text_encoder_device": "cpu",
        "vae_frugal": True,
        "kv_cache_dtype": "float8",
        "linear_dtype": "float8",
        "height": 320,
        "width": 576,
    },
}
"""By the memory of the card, largest first. 24gb is for larger ones, too, and sets nothing."""

PICTURE = {"height", "width"}  # whoever gives one of them has chosen both


def overrides_of(profile: Profile) -> list[str]:
    """The keys of a profile as overrides of a config."""
    return [f"{name}={str(value).lower()}" for name, value in profile.items()]


def add_profile_choice(group: argparse._ArgumentGroup) -> None:
    """The flag `--profile`."""
    group.add_argument(
        "--profile",
        choices=PROFILES,
        help="settings that fit a card, below those that are given (see docs/performance.md)",
    )


def load_with_profile(path: str | Path, overrides: Sequence[str], name: str | None) -> Config:
    """An experiment file under overrides, and under a profile where they leave keys alone; said."""
    config = load_config(path, overrides)
    if name is None:
        return config
    default, values = to_dict(Config()), to_dict(config)
    given = {item.partition("=")[0].strip() for item in overrides}
    profile = PROFILES[name]
    own = {key for key in profile if key in given or values[key] != default[key]}
    if own & PICTURE or "image_or_video_shape" in given:
        own |= PICTURE
    kept = [key for key in profile if key in own]
    taken = overrides_of({key: value for key, value in profile.items() if key not in kept})
    left = f"; as they were: {', '.join(kept)}" if kept else ""
    logger.info("profile %s sets %s%s", name, ", ".join(taken) or "nothing", left)
    return load_config(path, [*taken, *overrides])
