"""Sample videos: what one rank cannot write keeps no other waiting."""

from pathlib import Path

import pytest
import torch

from pipeline import load_pipeline
from tests.conftest import TinyWorld
from tests.tiny_training import TrainingWorld, train
from trainer.samples import SampleVideos
from trainer.sharding import open_world, reshard
from trainer.trainer import Trainer
from utils.errors import UserError
from utils.video import VideoWriter


@pytest.mark.parametrize(
    "fails", ["the temporary file", "the run's folder", "the latents", "nothing"]
)
def test_a_failed_write_keeps_all_passes_and_the_training(
    fails: str,
    tiny_world: TinyWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The other ranks waited for this one's share, and a full disk ended days of training; a
    student that made no numbers did, too.
    """
    pipe = load_pipeline(tiny_world.config, tiny_world.checkpoint, "cpu")
    if fails == "the latents":
        next(pipe.dit.parameters()).data.fill_(float("nan"))

    def write(writer: VideoWriter, frames: object) -> None:
        raise UserError(f"cannot write {writer.path.stem}")

    if fails == "the temporary file":
        monkeypatch.setattr(VideoWriter, "write", write)
    if fails == "the run's folder":
        (tmp_path / "samples").touch()
    with open_world("cpu") as world:
        looks: list[int] = []
        look = lambda: looks.append(1)  # noqa: E731
        samples = SampleVideos(pipe, tmp_path, ["a cat", "a cat"], 6, world, look)
        there = samples(100)
        assert samples.are_there(100) == (fails == "nothing")
    windows = 2 + pipe.setup.levels.num - 1  # of two blocks
    assert len(looks) == 2 * windows
    assert caplog.text.count("no sample video") == (0 if fails == "nothing" else 2)
    names = [path.name for path in sorted(tmp_path.rglob("*.mp4"))]
    assert names == (["00 a cat.mp4", "01 a cat.mp4"] if fails == "nothing" else [])
    assert [prompt for prompt, _ in there] == ["a cat"] * len(names)


@pytest.mark.slow
def test_the_average_is_what_every_layer_computes_with(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    """Sharded, what a pass had gathered stayed: the outer layers were those of other weights."""
    config = training_world.config(tmp_path, max_steps=2, mixed_precision=True, ema_start_step=1)
    latents, times = torch.randn(1, 3, 16, 2, 4), torch.full((1, 3), 500.0)
    with open_world("cpu") as world:
        trainer = Trainer(config, world, tmp_path / "run", visualise=False, save=False)
        trainer.train_step()
        player = trainer.task.players["generator"]
        assert player.ema is not None
        for value in player.ema.shadow.values():
            value.mul_(1.5)

        @torch.no_grad()
        def flow() -> torch.Tensor:
            text = player.module.encode_text(torch.ones(1, 3, 32))  # type: ignore[operator]
            return player.module(latents, times, text)

        found = []
        for _ in range(2):  # of the average, then as it was
            player.ema.swap(player.trained)
            reshard(player.module)
            found.append(flow())
        with player.averaged():
            assert torch.equal(flow(), found[0])
        assert torch.equal(flow(), found[1])
    assert not torch.equal(*found)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["ema", "live"])
def test_samples_are_of_the_average_unless_asked_otherwise(
    weights: str, training_world: TrainingWorld, tmp_path: Path
) -> None:
    """They were always of the weights as they are, though people use the average."""
    sampling = {"sample_every": 2, "sample_prompts": ["grass"], "sample_latent_frames": 2}
    values = {"ema_start_step": 1, "lr": 0.1, "sample_weights": weights, **sampling}
    run = tmp_path / "run"
    config = training_world.config(tmp_path, max_steps=2, dfake_gen_update_ratio=1, **values)
    train(config, run, visualise=True)
    pipe = load_pipeline(
        run / "config.yaml",
        run / "checkpoint_model_000002" / "model.pt",
        device="cpu",
        use_ema=weights == "ema",
    )
    stream = pipe.stream("grass", num_latent_frames=2)
    with VideoWriter(tmp_path / "a.mp4", 16) as writer, stream:
        for block in stream:
            writer.write(block)
    (made,) = (run / "samples" / "step_000002").glob("*.mp4")
    assert made.read_bytes() == (tmp_path / "a.mp4").read_bytes()
