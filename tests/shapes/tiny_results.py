"""Stored results of the ablations without any video: each row drifts as it is told to."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from shapes.drift import TEST_SEED, Protocol
from shapes.kept import PROPERTIES
from shapes.plan import played, protocol_settings, training_hash, weights_hashes
from shapes.stored import BESIDE, COLUMNS, POINTS, write_run
from shapes.variants import ROWS, training_of
from utils.config import load_config

CLIP = 81 / 16
STEPS = 300


def write_row(
    folder: Path,
    key: str,
    drift: float,
    *,
    seeds: int = 3,
    scenes: int = 8,
    times: int = 60,
    first: float | Mapping[str, float] = 0.02,
    motion: float = 1.0,
    start: str = "true",
    seed_shift: float = 0.0,
) -> None:
    """Drift grows from `first` at 1x to `drift`, by each scene's own; `seed_shift` to a seed.

    Of properties that `first` does not name it begins with 0.02.
    """
    row = ROWS[key]
    points = [point for point in POINTS if point <= times]
    told = [column for column in COLUMNS if column <= times]
    for seed in range(min(seeds, len(row.seeds))):
        videos = []
        for scene in range(scenes):
            own = np.random.default_rng((seed, scene)).normal(0, 0.01)
            own += 0.05 * np.sin(scene) + seed_shift * seed
            value = float(np.cos(3 * scene))
            kept = {}
            for name in PROPERTIES:
                begun = first if isinstance(first, float) else first.get(name, 0.02)
                curve = [begun if point == 1 else max(0.0, drift + own) for point in points]
                kept[name] = {
                    "drift": curve,
                    "first": [[value]],
                    "later": [[[0.5 * value]]] * len(told),
                    "first_last_5s": curve[-1],
                    "first_last_15_percent": curve[-1],
                }
            curves = {name: [motion if name == "motion" else 1.0] * len(points) for name in BESIDE}
            of_all = {"kept": kept, "curves": curves}
            videos.append({"scene": scene, **of_all, "flicker": 1.1})
        config = load_config(f"configs/shapes/{row.config}.yaml", row.overrides)
        protocol = Protocol(given=int(start == "true"), times=times, scene_seed=TEST_SEED)
        training = training_of(key)
        path = f"configs/shapes/{training.config}.yaml"
        trained = load_config(path, [*training.overrides, f"max_steps={STEPS}"])
        trained = replace(trained, seed=trained.seed + seed)
        settings = {
            **{"row": key, "training_seed": seed, "start": start, "clip_seconds": CLIP},
            **{"config": f"configs/shapes/{row.config}.yaml", "overrides": list(row.overrides)},
            **weights_hashes(config, Path("not-here")),
            **{"weights": f"shapes_{key}.pt", "checkpoint_hash": "0123456789abcdef"},
            **{"trained": "", "training": training_hash(trained, None)},
            **{"steps": STEPS, "operations": 30e12},
            **played(config),
            **protocol_settings(protocol),
        }
        write_run(folder / f"{key}-{seed}-{start}.json", settings, videos)


def write_core(folder: Path, **drifts: float) -> None:
    """The four core rows from both beginnings, with these drifts at last."""
    for key, drift in drifts.items():
        write_row(folder, key, drift)
        write_row(folder, key, drift, start="noise", times=12)
