"""Model folders: where the parts of one are, in the official or the diffusers layout."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from utils.config import ROOT, find_file
from utils.downloads import how_to_get
from utils.errors import UserError
from wan.checkpoints import load_dit_config
from wan.dit import DiTConfig
from wan.geometry import WAN_STRIDES, Strides

VAE_FILE = "Wan2.1_VAE.pth"
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER_FOLDER = Path("google") / "umt5-xxl"


@dataclass(frozen=True)
class ModelFolder:
    """One model on disk. What its files say is read once, when it is first asked for."""

    path: Path

    @classmethod
    def find(cls, root: str, name: str) -> "ModelFolder":
        """The folder `name` below `root` (from here or from the project's root).

        Raises UserError, saying how to get it, if it is in neither place.
        """
        places = [base / root / name for base in (Path(), ROOT)]
        folder = next((place for place in places if place.is_dir()), None)
        if folder is None:
            raise UserError(
                f"the model folder {places[0]} does not exist; {how_to_get(places[0], ROOT)}, "
                "or set model_root=… (`python scripts/download.py --list` names what there is)"
            )
        return cls(folder)

    @property
    def vae(self) -> Path:
        """Weights of the VAE: a file, or a folder in the diffusers layout."""
        return self.path / ("vae" if self._is_diffusers else VAE_FILE)

    @property
    def text_encoder(self) -> Path:
        """Weights of the text encoder: a file, or a folder in the diffusers layout."""
        return self.path / ("text_encoder" if self._is_diffusers else TEXT_ENCODER_FILE)

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's folder."""
        return self.path / ("tokenizer" if self._is_diffusers else TOKENIZER_FOLDER)

    @cached_property
    def sizes(self) -> DiTConfig:
        """Sizes of the transformer, from its `config.json`; UserError if there is none."""
        return load_dit_config(self.path)

    @cached_property
    def strides(self) -> Strides:
        """Strides of the VAE, from the shapes of its weights; Wan2.1's own where it has none."""
        from wan.vae import read_strides  # late: with it comes all of diffusers

        return read_strides(self.vae) if self.vae.exists() else WAN_STRIDES

    def require(self, *paths: Path) -> None:
        """Raise UserError for the first of these that is missing."""
        for path in paths:
            if not path.exists():
                raise UserError(f"{path} is missing; {how_to_get(path, ROOT)}")

    @property
    def _is_diffusers(self) -> bool:
        return (self.path / "transformer").is_dir()


def file_bytes(path: Path) -> int:
    """Bytes of a weights file, or of the shards in a folder; 0 where there is none."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return path.stat().st_size if path.is_file() else 0


def find_checkpoint(path: str | Path) -> Path:
    """A weights file, or a folder of safetensors (from here or from the project's root)."""
    for place in (Path(path), ROOT / path):
        if place.is_dir() and any(place.glob("**/*.safetensors")):
            return place
    if Path(path).is_dir():
        raise UserError(
            f"checkpoint {path} is a folder without .safetensors; give a file of weights"
        )
    return find_file(path, "checkpoint")
