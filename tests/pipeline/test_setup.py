"""The door of configuration: what a start reads, and geometry that follows from the weights."""

import json
from pathlib import Path

import pytest
import torch

import wan.folders
from inference import main as inference
from pipeline import VideoPipeline, load_pipeline
from pipeline.setup import Setup
from tests.conftest import TinyWorld
from tests.tiny_pipeline import TINY_DIT, random_dit, write_config, write_dit_folder
from utils.cli import run_main
from utils.config import load_config
from utils.errors import UserError
from wan.geometry import Strides
from wan.vae import WanVAE


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The model folders whose `config.json` is read from now on."""
    read: list[str] = []
    real = wan.folders.load_dit_config

    def counted(folder: Path) -> object:
        read.append(folder.name)
        return real(folder)

    monkeypatch.setattr(wan.folders, "load_dit_config", counted)
    return read


def test_an_inference_reads_its_model_folder_once(
    tiny_world: TinyWorld, tmp_path: Path, reads: list[str]
) -> None:
    """It was read five times."""
    flags = [
        "--config_path",
        str(tiny_world.config),
        "--checkpoint_path",
        str(tiny_world.checkpoint),
    ]
    flags += ["--prompt", "a ball", "--num_output_frames", "3", "--device", "cpu"]
    assert run_main(inference, [*flags, "--output_folder", str(tmp_path / "out")]) == 0
    assert reads == ["Tiny"]


def test_a_vae_of_other_strides_gives_its_own_geometry(tmp_path: Path) -> None:
    """Frames were counted with strides of 4 and 8: the rest of the video was never written."""
    vae = WanVAE.random(4, dim_mult=(1, 1, 1), temporal_downsample=(False, True))
    assert vae.strides == Strides(space=4, time=2)
    folder = tmp_path / "models" / "Other"
    write_dit_folder(folder, TINY_DIT, random_dit().state_dict())
    vae.save_official(folder / "Wan2.1_VAE.pth")
    values = {"method": "self_forcing", "height": 16, "width": 32}
    values |= {"denoising_step_list": [1000, 500], "model_root": str(tmp_path / "models")}
    path = write_config(tmp_path / "c.yaml", generator_name="Other", **values)
    pipe = load_pipeline(path, device="cpu")
    assert pipe.shape.strides == vae.strides
    assert pipe.shape.latent == (16, 4, 8)
    assert [pipe.setup.block_video_frames(block) for block in (0, 1)] == [5, 6]
    text = torch.zeros(1, 3, TINY_DIT["text_dim"])
    with pipe.open_stream(text, num_latent_frames=7) as stream:
        assert [block.shape for block in stream] == [(n, 16, 32, 3) for n in (5, 6, 2)]
    with pytest.raises(UserError, match="make the setup for this VAE"):
        VideoPipeline(pipe.setup, pipe.dit, vae=WanVAE.random(4))


def test_a_setup_holds_plain_values_alone(tiny_world: TinyWorld) -> None:
    """What is kept beside a video: JSON can hold it, and the secret is not among it."""
    config = load_config(tiny_world.config, ["wandb_key=secret"])
    resolved = Setup.of(config).resolved
    assert "secret" not in json.dumps(resolved)
    assert resolved["height"] == config.height
