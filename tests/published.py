"""A model folder with files of the published sizes, and nothing in them."""

from pathlib import Path

from pipeline.setup import Setup
from tests.golden_cases import load_json
from utils.config import ROOT, load_config
from wan.folders import TEXT_ENCODER_FILE, VAE_FILE, ModelFolder
from wan.geometry import WAN_STRIDES


def manifest_bytes(name: str) -> int:
    """Bytes of the tensors of a published file."""
    width = {"bfloat16": 2, "float32": 4}
    total = 0
    for shape, dtype in load_json(name)["keys"].values():
        size = width[dtype]
        for side in shape:
            size *= side
        total += size
    return total


def published_setup(root: Path, *overrides: str, config: str = "rolling_forcing_dmd") -> Setup:
    """The setup of a published config; its model folder is made below `root`."""
    settings = load_config(f"configs/{config}.yaml", [f"model_root={root}", *overrides])
    folder = root / settings.generator_name
    if not folder.is_dir():
        folder.mkdir()
        preset = ROOT / "configs" / "models" / f"{settings.generator_name}.json"
        (folder / "config.json").write_bytes(preset.read_bytes())
        for name, manifest in (
            (VAE_FILE, "manifest_wan2.1_vae"),
            (TEXT_ENCODER_FILE, "manifest_umt5_xxl_encoder"),
        ):
            with (folder / name).open("wb") as file:
                file.truncate(manifest_bytes(manifest))  # a hole, which takes no room
    return Setup.of(settings, folder=ModelFolder(folder), strides=WAN_STRIDES)
