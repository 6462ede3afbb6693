"""Where a student of the shapes world starts: by consistency distillation, and what it costs."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import load_pipeline
from shapes import starts
from shapes.dataset import ShapesVideos
from tests.tiny_training import course, train
from trainer.estimate import dry_run_report
from utils.config import ROOT, load_config
from utils.datasets import write_shard
from utils.video import to_float
from wan.vae import WanVAE

CONFIGS = ROOT / "configs" / "shapes"
FRAMES = 12  # latent ones of a clip


def encoded(folder: Path, split: str, count: int) -> Path:
    """Latents of the first clips of a split."""
    vae = WanVAE.from_official(ROOT / "wan_models" / "Shapes" / "Wan2.1_VAE.pth")
    videos = ShapesVideos(split, 4 * FRAMES - 3, 64, 64)
    items: list[dict[str, Any]] = [videos[index] for index in range(count)]
    latents = [vae.encode(to_float(item["video"])[None]).float()[0] for item in items]
    folder.mkdir()
    write_shard(folder / "a.safetensors", torch.stack(latents), [item["prompt"] for item in items])
    return folder


@pytest.mark.long
def test_a_consistency_start_learns_and_plays(tmp_path: Path) -> None:
    """From a short training of teacher forcing, whose network is also the teacher."""
    words = [
        f"image_or_video_shape=[1,{FRAMES},16,8,8]",
        f"data_path={encoded(tmp_path / 'clips', 'train', 32)}",
        f"heldout_data_path={encoded(tmp_path / 'heldout', 'heldout', 8)}",
        *("heldout_videos=8", "heldout_every=150", "max_steps=150", "log_iters=150"),
        *("total_batch_size=4", "batch_size=4", "device=cpu", "mixed_precision=false"),
    ]
    teacher = load_config(CONFIGS / "teacher_forcing.yaml", words)
    train(teacher, tmp_path / "teacher")
    start = tmp_path / "teacher" / "checkpoint_model_000150" / "model.pt"
    words += [f"generator_ckpt={start}", "max_steps=100", "heldout_every=100", "log_iters=100"]
    config = load_config(CONFIGS / "consistency_init.yaml", words)
    assert "target" in dry_run_report(config, 1)
    train(config, tmp_path / "run")
    losses = [line["heldout/loss"] for line in course(tmp_path / "run") if "heldout/loss" in line]
    assert losses[-1] < 0.96 * losses[0]
    checkpoint = tmp_path / "run" / "checkpoint_model_000100" / "model.pt"
    pipe = load_pipeline(tmp_path / "run" / "config.yaml", checkpoint, device="cpu", use_ema=True)
    video = pipe.generate(["a red square moves left"], 6, seed=0)
    assert video.shape == (1, 21, 64, 64, 3)
    assert video.float().std() > 5


@pytest.mark.long
def test_the_costs_of_all_starts_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Of clips of two blocks; consistency makes three passes beside the one that is trained."""
    size = "image_or_video_shape=[1,6,16,8,8]"
    assert starts.main(["--updates", "1", size]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    rows = {cells[1].strip(): cells[2:5] for cells in (line.split("|") for line in lines)}
    assert rows.keys() == starts.KINDS.keys()
    flops = {name: float(cells[0]) for name, cells in rows.items()}
    for forcing in ("teacher forcing", "window forcing"):
        assert flops[f"consistency, {forcing}"] == pytest.approx(2 * flops[forcing], rel=0.01)
    assert flops["ODE pairs"] < flops["teacher forcing"]
    assert [cells[1].strip() != "–" for cells in rows.values()] == [True] + 4 * [False]
    assert all(math.isfinite(float(cells[2])) for cells in rows.values())
