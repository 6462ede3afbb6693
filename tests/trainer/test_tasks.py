"""What each task makes of its batches, and that its switches do what they say."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from cachetools import LRUCache
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.consistency import consistency_grid
from model.dmd import Scores, dmd_gradient, generator_loss
from model.flow_matching import flow_matching_loss
from model.self_rollout import RolloutDraw
from pipeline.setup import Setup
from tests.tiny_training import (
    FRAMES,
    LATENT,
    TrainingWorld,
    assert_close_states,
    course,
    drawn,
    trained_state,
)
from trainer.data import check_changes
from trainer.metrics import Timer, latent_statistics
from trainer.networks import generator_updates
from trainer.sharding import open_world
from trainer.tasks import Consistency, Distillation, FlowMatching
from trainer.tasks.base import GeneratorTask
from trainer.trainer import Trainer
from utils.datasets import open_dataset, write_shard
from utils.draws import Draws, Purpose
from utils.embeddings import EmbeddingStore
from utils.errors import UserError
from utils.video import VideoWriter
from wan.context import ForcedContext
from wan.dit import WanDiT
from wan.flops import text_flops
from wan.flow import add_noise, denoising_timesteps, shift_timesteps, training_weight
from wan.vae import WanVAE

SWITCHES: dict[str, dict[str, Any]] = {
    "bidirectional": {},
    "block-causal": {"schedule": None, "method": "self_forcing"},
    "diffusion forcing": {
        "schedule": None,
        "method": "self_forcing",
        "diffusion_forcing": True,
    },
    "teacher forcing": {
        "schedule": None,
        "method": "self_forcing",
        "teacher_forcing": True,
        "clean_context_noise": 100,
    },
    "window forcing": {
        "schedule": None,
        "method": "rolling_forcing",
        "denoising_step_list": [1000, 600, 300],
        "window_forcing": True,
    },
}


@contextmanager
def trainer_of(world: TrainingWorld, folder: Path, **changes: Any) -> Iterator[Trainer]:
    config = world.config(folder, **changes)
    with open_world("cpu") as ranks:
        yield Trainer(config, ranks, folder / "run", visualise=False, save=False)


def losses(trainer: Trainer, item: dict[str, Any], update: int, samples: int = 16) -> Tensor:
    """Loss of one item repeated, under draws of an update that is never trained."""
    batch = {
        key: torch.stack([value] * samples) if isinstance(value, Tensor) else [value] * samples
        for key, value in item.items()
    }
    with torch.no_grad():
        draws = Draws(trainer.config.seed, update, tuple(range(samples)))
        return trainer.task.loss("generator", batch, draws).loss


@pytest.mark.slow
@pytest.mark.parametrize("mode", SWITCHES)
def test_flow_matching_learns_a_video(
    mode: str, training_world: TrainingWorld, tmp_path: Path
) -> None:
    (tmp_path / "latents").mkdir()
    video = torch.randn(1, FRAMES, *LATENT, generator=torch.Generator().manual_seed(3))
    write_shard(tmp_path / "latents" / "a.safetensors", video, ["the sea"])
    values = {"data_path": str(tmp_path / "latents"), "lr": 6e-3, "batch_size": 4}
    changes = training_world.flow(**SWITCHES[mode], **values)
    with trainer_of(training_world, tmp_path, **changes) as trainer:
        item = trainer.batches["generator"].dataset[0]
        before = losses(trainer, item, 10**6)
        for _ in range(20):
            trainer.train_step()
        assert losses(trainer, item, 10**6) < 0.8 * before


def test_the_modes_of_flow_matching_are_different_objectives(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    found = {}
    for mode, switches in SWITCHES.items():
        changes = training_world.flow(**switches)
        with trainer_of(training_world, tmp_path, **changes) as trainer:
            item = trainer.batches["generator"].dataset[0]
            found[mode] = losses(trainer, item, 7).item()
    assert len({round(loss, 6) for loss in found.values()}) == len(SWITCHES)


@pytest.mark.parametrize("scheme", ["bell", "none"])
def test_the_scheme_weighs_every_timestep(
    scheme: str, training_world: TrainingWorld, tmp_path: Path
) -> None:
    """Of one video with one timestep, the loss is its error times the weight of that timestep."""
    changes = training_world.flow(weighting_scheme=scheme)
    with trainer_of(training_world, tmp_path, **changes) as trainer:
        shift = trainer.config.generator_shift
        item = trainer.batches["generator"].dataset[0]
        batch = {"latents": item["latents"][None], "prompt": [item["prompt"]]}
        with torch.no_grad():
            result = trainer.task.loss("generator", batch, Draws(0, 7, (0,)))
    at = result.metrics["flow/timestep"]
    expected = training_weight(at, shift) if scheme == "bell" else torch.ones(())
    torch.testing.assert_close(result.loss / result.metrics["flow/error"], expected)


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.5, 5, 27), (1.0, 32, 32)])
def test_prompt_dropout_trains_without_prompt(
    share: float, low: int, high: int, training_world: TrainingWorld, tmp_path: Path
) -> None:
    changes = training_world.flow(prompt_dropout=share)
    with trainer_of(training_world, tmp_path, **changes) as trainer:
        text, seen = trainer.task.text, []  # type: ignore[attr-defined]

        def listening(prompts: list[str]) -> Tensor:
            seen.extend(prompts)
            return text(prompts)

        trainer.task.text = listening  # type: ignore[attr-defined]
        losses(trainer, trainer.batches["generator"].dataset[0], 3, samples=32)
    assert len(seen) == 32
    assert low <= seen.count("") <= high


@pytest.mark.slow
@pytest.mark.parametrize("task", ["distillation", "ode", "diffusion"])
def test_one_batch_equals_its_parts(
    task: str, training_world: TrainingWorld, tmp_path: Path
) -> None:
    """For the ODE loss the denominator is the count of noisy frames of the whole batch."""
    changes = {"ode": training_world.ode(), "diffusion": training_world.flow()}.get(task, {})
    found = []
    for size in (1, 4):
        config = training_world.config(tmp_path, batch_size=size, max_steps=3, **changes)
        found.append(trained_state(config, tmp_path / f"{size}"))
    # Adam makes a step of lr = 1e-3 of any gradient, so rounding near zero is seen in the weights.
    assert_close_states(*found, 1e-4)
    for ours, theirs in zip(course(tmp_path / "1"), course(tmp_path / "4"), strict=True):
        for metric in {"generator/loss", "generator/grad_norm", "critic/loss"} & theirs.keys():
            assert ours[metric] == pytest.approx(theirs[metric], rel=1e-4), metric


@pytest.mark.slow
@pytest.mark.parametrize("task", ["distillation", "diffusion"])
def test_gradient_checkpointing_changes_nothing(
    task: str, training_world: TrainingWorld, tmp_path: Path
) -> None:
    changes = training_world.flow(**SWITCHES["teacher forcing"]) if task == "diffusion" else {}
    found = []
    for on, selective in ((False, False), (True, False), (True, True)):
        keys = {"gradient_checkpointing": on, "selective_checkpointing": selective}
        config = training_world.config(tmp_path, max_steps=3, **keys, **changes)
        found.append(trained_state(config, tmp_path / f"{on}{selective}"))
    assert_close_states(found[0], found[1], 1e-6)
    assert_close_states(found[0], found[2], 1e-6)


@pytest.mark.slow
def test_a_compiled_training_is_the_eager_one(
    training_world: TrainingWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of two updates, with checkpointing; traced as on a GPU, without its kernels."""
    compiled = partialmethod(WanDiT.compile_blocks, backend="aot_eager")
    monkeypatch.setattr(WanDiT, "compile_blocks", compiled)
    eager, traced = (
        trained_state(
            training_world.config(tmp_path, **training_world.flow(), max_steps=2, compile=choice),
            tmp_path / f"{choice}",
        )
        for choice in (False, True)
    )
    assert_close_states(traced, eager)


@pytest.fixture
def videos(tmp_path: Path) -> dict[str, Any]:
    """What makes a training one on a folder with one video of `FRAMES` latent frames."""
    folder = tmp_path / "videos"
    folder.mkdir()
    frames = (255 * torch.rand(9, 16, 32, 3, generator=torch.Generator().manual_seed(1))).byte()
    with VideoWriter(folder / "a.mp4", 16) as writer:
        writer.write(frames.numpy())
    (folder / "a.txt").write_text("the sea", encoding="utf-8")
    return {"data_path": str(folder), "load_raw_video": True}


def test_videos_and_their_latents_give_one_loss(
    training_world: TrainingWorld, videos: dict[str, Any], tmp_path: Path
) -> None:
    latents = tmp_path / "latents"
    latents.mkdir()
    raw = training_world.flow(**videos)
    with trainer_of(training_world, tmp_path / "raw", **raw) as trainer:
        item = trainer.batches["generator"].dataset[0]
        assert item["prompt"] == "the sea"
        of_video = losses(trainer, item, 5, samples=2)
        vae: WanVAE = trainer.task.vae  # type: ignore[attr-defined]
        clip = item["video"].permute(0, 3, 1, 2)[None].float() / 127.5 - 1
        encoded = vae.encode(clip).float()
    assert encoded.shape == (1, FRAMES, *LATENT)
    write_shard(latents / "a.safetensors", encoded, ["the sea"])
    stored = training_world.flow(data_path=str(latents))
    with trainer_of(training_world, tmp_path / "stored", **stored) as trainer:
        assert trainer.task.vae is None  # type: ignore[attr-defined]
        of_latents = losses(trainer, trainer.batches["generator"].dataset[0], 5, samples=2)
    torch.testing.assert_close(of_latents, of_video, atol=1e-5, rtol=1e-5)


# --- distillation -------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_gradient_of_the_generator_loss_is_the_normalised_gradient_of_the_kl(
    masked: bool,
) -> None:
    latents = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    fake, cond, real = torch.randn(3, 2, 4, 3, 2, 2, dtype=torch.float64)
    counts = torch.tensor([False, True, True, True]) if masked else None
    result = generator_loss(latents, Scores(fake, cond, real), counts)
    (gradient,) = torch.autograd.grad(result.loss, latents)
    distance = (latents.detach() - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    expected = (fake - real) / distance
    assert torch.equal(dmd_gradient(latents.detach(), Scores(fake, cond, real)), expected)
    if counts is not None:
        expected = expected * counts[:, None, None, None]
    numel = 2 * (3 if masked else 4) * 3 * 2 * 2
    torch.testing.assert_close(gradient, expected / numel)


def test_a_gradient_step_moves_samples_from_the_critic_to_the_teacher() -> None:
    """The sign: against the gradient is towards what the teacher believes."""
    latents = torch.zeros(1, 2, 1, 1, 1, requires_grad=True)
    scores = Scores(torch.full((1, 2, 1, 1, 1), -1.0), latents.detach(), latents.detach() + 1)
    generator_loss(latents, scores).loss.backward()
    assert latents.grad is not None
    assert (latents.grad < 0).all()


@pytest.mark.parametrize("score", ["fake", "real"])
def test_scores_that_are_not_finite_are_not_taken_for_a_zero_gradient(score: str) -> None:
    """One NaN of the teacher made every gradient zero, and training went on without a word."""
    latents, good = torch.zeros(2, 1, 1, 2, 2), torch.ones(2, 1, 1, 2, 2)
    bad = good.clone()
    bad[0, 0, 0, 0, 0] = float("nan")
    scores = Scores(**{"fake": good, "real_cond": good, "real": good, score: bad})
    assert generator_loss(latents, scores).loss.isnan()
    assert not dmd_gradient(good, Scores(good, good, good)).any(), "0 / 0: nothing to move"


def score_times(trainer: Trainer, updates: int) -> dict[int, list[float]]:
    """Timesteps at which the critic is trained, by the level at which the rollout stopped."""
    task = trainer.task
    assert isinstance(task, Distillation)
    found: dict[int, list[float]] = {}
    for update in range(updates):
        level = drawn(trainer.config, update).exit_levels[0]
        draws = Draws(trainer.config.seed, update, tuple(range(8)))
        with torch.no_grad():
            metrics = task.loss("critic", {"prompt": ["grass"] * 8}, draws).metrics
        found.setdefault(level, []).extend(metrics["critic/timesteps"].tolist())
    return found


@pytest.mark.parametrize("on", [False, True])
def test_ts_schedule_keeps_scores_above_the_next_level(
    on: bool, training_world: TrainingWorld, tmp_path: Path
) -> None:
    changes = {"method": "self_forcing", "ts_schedule": on, "timestep_shift": 3.0}
    with trainer_of(training_world, tmp_path, **changes) as trainer:
        found = score_times(trainer, 8)
    assert set(found) == {0, 1, 2}
    for level, following in ((0, 600), (1, 300)):
        lowest = shift_timesteps(torch.tensor(float(following)), 3.0).item()
        assert (min(found[level]) >= lowest - 1e-3) is on
    assert min(found[2]) < shift_timesteps(torch.tensor(300.0), 3.0), "nothing follows the last"


def test_scores_stay_below_the_highest_timestep(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    changes = {"timestep_shift": 3.0, "max_score_timestep": 400.0}
    with trainer_of(training_world, tmp_path, **changes) as trainer:
        found = [time for times in score_times(trainer, 8).values() for time in times]
    assert 300 < max(found) <= 400
    assert min(found) < 100
    assert len(set(found)) > len(found) / 2, "drawn below it, not cut off there"


def test_ts_schedule_without_warp_and_with_levels_of_their_own(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    """It shifted levels that were shifted already, and took block 0's level for all blocks."""
    changes: dict[str, Any] = {"method": "self_forcing", "ts_schedule": True, "timestep_shift": 3.0}
    stops = RolloutDraw("block", 3, (0, 0, 0))
    with trainer_of(training_world, tmp_path, **changes, warp_denoising_step=False) as trainer:
        assert isinstance(trainer.task, Distillation)
        lowest = torch.tensor(trainer.task._lowest(stops))
    assert shift_timesteps(lowest, 3.0).item() == pytest.approx(600, abs=2)
    changes["same_step_across_blocks"] = False
    with trainer_of(training_world, tmp_path, **changes) as trainer:
        assert isinstance(trainer.task, Distillation)
        assert trainer.task._lowest(stops) == 0


def test_last_step_only_and_levels_of_their_own(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    def levels(**changes: Any) -> list[tuple[int, ...]]:
        config = training_world.config(tmp_path, method="self_forcing", **changes)
        return [drawn(config, update).exit_levels for update in range(50)]

    shared = levels()
    assert all(len(set(each)) == 1 for each in shared)
    assert {each[0] for each in shared} == {0, 1, 2}
    assert {level for each in levels(last_step_only=True) for level in each} == {2}
    own = levels(same_step_across_blocks=False)
    assert any(len(set(each)) > 1 for each in own)
    assert [each[0] for each in own] == [each[0] for each in shared]


@pytest.mark.parametrize("on", [False, True])
def test_reencoding_replaces_the_first_frame_of_longer_rollouts(
    on: bool, training_world: TrainingWorld, tmp_path: Path
) -> None:
    clips = {}
    for reencode in (False, on):
        changes = {"reencode_first_frame": reencode, "num_training_frames": FRAMES + 2}
        with trainer_of(training_world, tmp_path, **changes) as trainer:
            task, config = trainer.task, trainer.config
            assert isinstance(task, Distillation)
            assert (task.vae is not None) is reencode
            update = next(n for n in range(99) if drawn(config, n).num_blocks == 5)
            text = task.text(["grass"])
            clip = task._rollout(text, Draws(0, update, (0,)), grad=False)
            assert clip.counts is not None
            assert clip.counts.tolist() == [False, True, True]
            clips[reencode] = clip.latents
    if on:
        assert torch.equal(clips[True][:, 1:], clips[False][:, 1:])
        assert not torch.allclose(clips[True][:, :1], clips[False][:, :1], atol=1e-3)


def test_a_first_block_of_one_frame_masks_one_frame(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    """All of `num_frame_per_block` frames were masked, as if the first block were a full one."""
    changes = {"independent_first_frame": True, "num_frame_per_block": 2}
    changes |= {"num_training_frames": FRAMES + 2, "max_attention_frames": 9}
    with trainer_of(training_world, tmp_path, **changes) as trainer:
        task = trainer.task
        assert isinstance(task, Distillation)
        update = next(n for n in range(99) if drawn(trainer.config, n).num_blocks == 3)
        counts = task._rollout(task.text(["grass"]), Draws(0, update, (0,)), grad=False).counts
    assert counts is not None
    assert counts.tolist() == [False, True, True]


def test_rollouts_that_whole_blocks_make_longer_are_reencoded_too(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    """Three scored frames in blocks of two are four: without a VAE nothing was re-encoded."""
    changes = {"num_frame_per_block": 2, "num_training_frames": 4, "max_attention_frames": 9}
    changes["reencode_first_frame"] = True
    with trainer_of(training_world, tmp_path, **changes) as trainer:
        assert trainer.task.vae is not None  # type: ignore[attr-defined]
        assert {drawn(trainer.config, n).num_blocks for n in range(20)} == {2}


def test_a_rollout_serves_critic_updates_until_the_student_moves(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    """On the same videos, at noise levels of their own: 2, 1, 2, 1 updates in cycles of three."""
    changes = {"critic_updates_per_rollout": 2, "dfake_gen_update_ratio": 3, "batch_size": 4}
    seen: list[tuple[str, tuple[str, ...], tuple[float, ...]]] = []
    made: list[int] = []
    with trainer_of(training_world, tmp_path, **changes) as trainer:
        task = trainer.task
        assert isinstance(task, Distillation)
        loss, rollout = task.loss, task._rollout

        def watched(player: str, batch: dict[str, Any], draws: Draws) -> Any:
            result = loss(player, batch, draws)
            if player == "critic":
                times = result.metrics["critic/timesteps"].tolist()
                seen.append((player, tuple(batch["prompt"]), tuple(times)))
            return result

        def counted(embeddings: Tensor, draws: Draws, *, grad: bool, prefix: Tensor | None) -> Any:
            if not grad:
                made.append(trainer.step)
            return rollout(embeddings, draws, grad=grad, prefix=prefix)

        task.loss, task._rollout = watched, counted  # type: ignore[method-assign]
        shares = [task.flops("critic", Draws(0, 2 * step + 1, (0,))) for step in range(3)]
        for _ in range(6):
            trainer.train_step()
    assert made == [0, 2, 3, 5]
    prompts = [prompts for _, prompts, _ in seen]
    assert prompts[0] == prompts[1]
    assert prompts[3] == prompts[4]
    assert len(set(prompts)) == 4
    assert len({times for *_, times in seen}) == 6
    assert shares[1] < shares[0]


def test_the_critic_may_be_trained_before_the_student_moves(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    """Turns begin behind its warm-up, whatever that is a multiple of; no rollout is used across."""
    turns = {"dfake_gen_update_ratio": 3, "critic_updates_per_rollout": 2}
    changes = {**turns, "critic_warmup_steps": 4, "max_steps": 11, "batch_size": 4}
    made: list[int] = []
    with trainer_of(training_world, tmp_path, **changes) as trainer:
        task = trainer.task
        assert isinstance(task, Distillation)
        student = trainer.task.players["generator"].module
        before, rollout = deepcopy(student.state_dict()), task._rollout

        def counted(embeddings: Tensor, draws: Draws, *, grad: bool, prefix: Tensor | None) -> Any:
            if not grad:
                made.append(trainer.step)
            return rollout(embeddings, draws, grad=grad, prefix=prefix)

        task._rollout = counted  # type: ignore[method-assign]
        due = [task.due(step) for step in range(11)]
        for _ in range(4):
            trainer.train_step()
        assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
        trainer.train_step()
        assert any(not torch.equal(v, before[name]) for name, v in student.state_dict().items())
        for _ in range(6):
            trainer.train_step()
        updates = {name: player.updates for name, player in task.players.items()}
    assert [step for step, players in enumerate(due) if "generator" in players] == [4, 7, 10]
    assert all("critic" in players for players in due)
    assert updates == {"generator": 3, "critic": 11}
    assert made == [0, 2, 3, 4, 6, 7, 9, 10]
    counted_ahead = [generator_updates(trainer.config, steps) for steps in (0, 4, 5, 8, 11)]
    assert counted_ahead == [0, 0, 1, 2, 3]


@pytest.mark.parametrize("trainer", ["score_distillation", "consistency"])
def test_prompts_are_encoded_once_and_the_negative_one_once_in_a_run(
    trainer: str, training_world: TrainingWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a sharded encoder remembers nothing, the teacher's were encoded once more.

    And those of a rollout that serves two critic updates in each of them. Two steps, two batches.
    """
    changes = training_world.consistency() if trainer == "consistency" else {}
    changes |= {"trainer": trainer, "global_batch_size": 2, "batch_size": 2}
    if trainer == "score_distillation":
        changes |= {"critic_updates_per_rollout": 2}
    read: list[str] = []
    stored = EmbeddingStore.__getitem__
    monkeypatch.setattr(
        EmbeddingStore,
        "__getitem__",
        lambda self, prompt: read.append(prompt) or stored(self, prompt),
    )
    with trainer_of(training_world, tmp_path, **changes) as run:
        run.task.text._remembered = LRUCache(0)  # type: ignore[attr-defined]
        for _ in range(2):
            run.train_step()
    assert read.count("blue") == 1
    assert len(read) == 1 + 2 * 2


def test_more_updates_per_rollout_than_the_student_waits_for_are_refused(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="critic_updates_per_rollout=3 is more than"):
        training_world.config(tmp_path, critic_updates_per_rollout=3)


def test_the_guard_of_motion_adds_the_error_on_true_clips(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    """Of the student in full attention, at its own levels; without clips it is refused."""
    found = []
    for weight in (0.0, 0.5):
        changes = {"motion_guard_weight": weight, "data_path": str(training_world.latents)}
        with trainer_of(training_world, tmp_path / f"{weight}", **changes) as trainer:
            task = trainer.task
            assert isinstance(task, Distillation)
            batch, draws, _ = trainer.batches["generator"].micro_batch(0, Draws(0, 2, ()))
            found.append(task.loss("generator", batch, draws))
            noise = draws.normal(Purpose.GUARD_NOISE, (FRAMES, *LATENT))
            levels = task.setup.levels.tensor()[draws.integers(Purpose.GUARD_LEVEL, 3)]
            flow = task.generator(
                add_noise(batch["latents"], noise, levels[:, None].expand(-1, FRAMES)),
                levels[:, None].expand(-1, FRAMES),
                task.generator.encode_text(task.text(batch["prompt"])),
            )
            error = (flow - (noise - batch["latents"])).square().mean()
    torch.testing.assert_close(found[1].loss, found[0].loss + 0.5 * error)
    assert "guard/error" not in found[0].metrics
    torch.testing.assert_close(found[1].metrics["guard/error"], error.detach())
    with (
        pytest.raises(UserError, match="holds no latents"),
        trainer_of(training_world, tmp_path, motion_guard_weight=0.5),
    ):
        pass


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_guard_sees_windows_behind_clean_frames(
    share: float, training_world: TrainingWorld, tmp_path: Path
) -> None:
    """In the windows of the rollout that the same update makes, as flow matching has them."""
    forced = training_world.flow(**SWITCHES["window forcing"], rolling_probability=share)
    with trainer_of(training_world, tmp_path / "forced", **forced) as trainer:
        assert isinstance(trainer.task, FlowMatching)
        _, draws, _ = trainer.batches["generator"].micro_batch(0, Draws(0, 2, ()))
        timesteps, context = trainer.task._levels(draws, FRAMES)
        flops = trainer.task.phase_flops("generator", draws)["forward"]
    changes = {"motion_guard_weight": 0.5, "motion_guard_attention": "windows"}
    changes |= {"data_path": str(training_world.latents), "rolling_probability": share}
    with trainer_of(training_world, tmp_path / "guard", **changes) as trainer:
        task = trainer.task
        assert isinstance(task, Distillation)
        batch, draws, _ = trainer.batches["generator"].micro_batch(0, Draws(0, 2, ()))
        found = task.loss("generator", batch, draws).metrics["guard/error"]
        assert task.phase_flops("generator", draws)["guard"] == flops
        clip = batch["latents"]
        expected = flow_matching_loss(
            task.generator,
            clip,
            draws.normal(Purpose.GUARD_NOISE, (FRAMES, *LATENT)),
            timesteps,
            task.generator.encode_text(task.text(batch["prompt"])),
            shift=None,
            context=context,
            clean=clip,
            clean_timesteps=torch.zeros(len(clip), FRAMES),
        )
    torch.testing.assert_close(found, expected.loss.detach())


@pytest.mark.parametrize("longer", [0, 2])
def test_rollouts_go_on_from_the_first_block_of_their_clip(
    longer: int, training_world: TrainingWorld, tmp_path: Path
) -> None:
    """Where it lies in the scored clip it is seen, and no gradient is asked of it."""
    changes = {"true_prefix_probability": 1.0, "data_path": str(training_world.latents)}
    changes |= {"num_training_frames": FRAMES + longer, "reencode_first_frame": False}
    with trainer_of(training_world, tmp_path, **changes) as trainer:
        task = trainer.task
        assert isinstance(task, Distillation)
        update = next(
            n for n in range(99) if drawn(trainer.config, n).num_blocks == FRAMES + longer
        )
        batch, draws, _ = trainer.batches["generator"].micro_batch(0, Draws(0, update, ()))
        cond, prefix = task.text(batch["prompt"]), task._prefix(batch, draws)
        assert prefix is not None
        assert torch.equal(prefix, batch["latents"][:, :1])
        clip = task._rollout(cond, draws, grad=True, prefix=prefix)
        assert torch.equal(clip.latents[:, :1], prefix) is (longer == 0)
        assert clip.true_frames == (longer == 0)
        assert clip.counts is not None
        assert clip.counts.tolist() == [False, True, True]
        other = task._rollout(cond, draws, grad=False, prefix=prefix + 1)
        assert not torch.allclose(other.latents[:, 1:], clip.latents[:, 1:], atol=1e-3)
        metrics = task.loss("generator", batch, draws).metrics
        assert metrics["rollout/given_blocks"] == 1
        made = latent_statistics(clip.latents.detach()[:, clip.true_frames :])
        torch.testing.assert_close(metrics["generated/mean"], made["mean"])
        assert task.loss("critic", batch, draws).loss.isfinite()


def test_true_blocks_of_videos_are_encoded(
    training_world: TrainingWorld, videos: dict[str, Any], tmp_path: Path
) -> None:
    """And the VAE that does so re-encodes no rollout that is to stay as it is."""
    changes = {**videos, "true_prefix_probability": 1.0, "num_training_frames": FRAMES + 2}
    with trainer_of(training_world, tmp_path, **changes, reencode_first_frame=False) as trainer:
        task, config = trainer.task, trainer.config
        assert isinstance(task, Distillation)
        assert task.vae is not None
        update = next(n for n in range(99) if drawn(config, n).num_blocks == FRAMES + 2)
        batch, draws, _ = trainer.batches["generator"].micro_batch(0, Draws(0, update, ()))
        whole = task._latents(batch)
        prefix = task._prefix(batch, draws)
        assert prefix is not None
        torch.testing.assert_close(prefix, whole[:, :1])
        clips = []
        for vae in (task.vae, None):
            task.vae = vae
            clips.append(
                task._rollout(task.text(batch["prompt"]), draws, grad=False, prefix=prefix)
            )
    assert torch.equal(clips[0].latents, clips[1].latents)


def test_true_blocks_need_clips_to_train_on(training_world: TrainingWorld, tmp_path: Path) -> None:
    """Held-out rollouts are from noise, so that their prompts are enough for the loss there."""
    changes = {"true_prefix_probability": 1.0, "num_training_frames": FRAMES}
    held = {"heldout_every": 1, "heldout_videos": 2}
    held |= {"heldout_data_path": str(training_world.prompts)}
    latents = {"data_path": str(training_world.latents)}
    with trainer_of(training_world, tmp_path / "held", **changes, **latents, **held) as trainer:
        task, draws = trainer.task, Draws(0, 0, (0,))
        assert isinstance(task, Distillation)
        assert task._drawn(draws).shared.given_blocks == 1
        assert task.heldout_loss({"prompt": ["grass"]}, draws, 1.0).loss.isfinite()
    refused = {
        "holds no latents": changes,
        "true_prefix_probability needs more": {
            **changes,
            **latents,
            **{"num_frame_per_block": FRAMES, "max_attention_frames": 21},
        },
    }
    for sentence, given in refused.items():
        with (
            pytest.raises(UserError, match=sentence),
            trainer_of(training_world, tmp_path / sentence, **given),
        ):
            pass


# --- consistency --------------------------------------------------------------------------------


def test_the_teachers_steps_pass_the_students_levels() -> None:
    """With the published numbers they are even before the shift; 0 is the last."""
    levels = denoising_timesteps([1000, 750, 500, 250], 5.0, warp=True)
    grid = consistency_grid(levels, 48, 5.0)
    even = shift_timesteps(1000 * (1 - torch.arange(49, dtype=torch.float64) / 48), 5.0)
    torch.testing.assert_close(grid, even, atol=1e-3, rtol=0)
    assert torch.equal(grid[:-1:12], levels)
    assert grid[-1] == 0
    uneven = consistency_grid(torch.tensor([900.0, 100.0]), 4, 1.0)
    torch.testing.assert_close(uneven, torch.tensor([900.0, 500.0, 100.0, 50.0, 0.0]))
    with pytest.raises(UserError, match="no multiple of the 4 levels"):
        consistency_grid(levels, 50, 5.0)


@pytest.mark.parametrize("forcing", ["teacher_forcing", "window_forcing"])
def test_consistency_moves_along_the_guided_teacher(
    forcing: str, training_world: TrainingWorld, tmp_path: Path
) -> None:
    """The loss from its formula, once the three networks have become three."""
    changes = training_world.consistency(**{"teacher_forcing": False, forcing: True})
    with trainer_of(training_world, tmp_path, **changes, guidance_scale=2.0) as trainer:
        task = trainer.task
        assert isinstance(task, Consistency)
        for _ in range(4):
            trainer.train_step()
        batch, draws, _ = trainer.batches["generator"].micro_batch(0, Draws(0, 9, ()))
        result = task.loss("generator", batch, draws)
        places, context = task._places(draws, FRAMES)
        x, noise = batch["latents"], draws.normal(Purpose.NOISE, (FRAMES, *LATENT))
        times, after = task.grid[places], task.grid[places + 1]
        s, s_after = (t[..., None, None, None] / 1000 for t in (times, after))

        def flow(dit: WanDiT, noisy: Tensor, at: Tensor, prompts: list[str]) -> Tensor:
            text = dit.encode_text(task.text(prompts))
            both = torch.cat([x, noisy], 1), torch.cat([torch.zeros_like(at), at], 1)
            return dit(*both, text, context)[:, FRAMES:]

        noisy = (1 - s) * x + s * noise
        cond = flow(task.teacher, noisy, times, batch["prompt"])
        uncond = flow(task.teacher, noisy, times, ["blue"] * len(x))
        moved = noisy + (s_after - s) * (uncond + 3 * (cond - uncond))
        end = moved - s_after * flow(task.target, moved, after, batch["prompt"])
        x0 = noisy - s * flow(task.generator, noisy, times, batch["prompt"])
        torch.testing.assert_close(result.loss, (x0 - end).square().mean())
        assert places.max() <= 5
        ema = trainer.task.players["generator"].ema
        assert ema is not None
        for name, value in task.target.named_parameters():
            assert torch.equal(value, ema.shadow[name]), name
        weights = [dict(dit.named_parameters()) for dit in (task.generator, task.teacher)]
        name = "blocks.0.ffn.0.weight"
        assert not torch.equal(weights[0][name], weights[1][name])
        assert not torch.equal(ema.shadow[name], weights[0][name])
        assert result.loss.requires_grad
        assert not any(p.requires_grad for p in (*task.target.parameters(), *weights[1].values()))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher_forcing": False}, "teacher_forcing=true or window_forcing=true"),
        ({"denoising_step_list": None, "schedule": "block"}, "denoising_step_list"),
        ({"consistency_steps": 4}, "no multiple of the 3 levels"),
    ],
)
def test_consistency_says_what_it_lacks(
    changes: dict[str, Any], said: str, training_world: TrainingWorld, tmp_path: Path
) -> None:
    with (
        pytest.raises(UserError, match=said),
        trainer_of(training_world, tmp_path, **training_world.consistency(**changes)),
    ):
        pass


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("frames", [(1, 1, 1), (1, 2)])  # of each block
def test_window_forcing_trains_the_windows_that_a_rollout_ends_with(
    share: float, frames: tuple[int, ...], training_world: TrainingWorld, tmp_path: Path
) -> None:
    changes = {"num_frame_per_block": frames[-1], "independent_first_frame": frames[-1] > 1}
    changes |= {"max_attention_frames": 9, "rolling_probability": share}
    changes = training_world.flow(**(SWITCHES["window forcing"] | changes))
    with trainer_of(training_world, tmp_path, **changes) as trainer:
        task, config = trainer.task, trainer.config
        assert isinstance(task, FlowMatching)
        levels, policy = task.setup.levels.tensor(), task.setup.policy
        for update in range(12):
            timesteps, context = task._levels(Draws(config.seed, update, (0, 1)), FRAMES)
            plan = drawn(replace(config, num_training_frames=FRAMES), update)
            exit_level = plan.exit_levels[0]
            expected = [exit_level] * len(frames)
            if share:
                expected = [(exit_level - block) % len(levels) for block in range(len(frames))]
            per_frame = [level for level, n in zip(expected, frames, strict=True) for _ in range(n)]
            assert timesteps.tolist() == levels[per_frame].expand(2, -1).tolist()
            # blocks stand together in a window while their levels fall, to the last one
            views, start = [], 0
            for number in frames:
                views.append(policy.view(start, number, clean_pass=True))
                start += number
            start = length = 0
            for block, number in enumerate(frames):
                length += number
                if not share or expected[block] == 0 or block == len(frames) - 1:
                    views.append(policy.view(start, length, clean_pass=False))
                    start, length = start + length, 0
            assert isinstance(context, ForcedContext)
            assert context.views == views


def test_window_forcing_has_no_given_blocks(training_world: TrainingWorld, tmp_path: Path) -> None:
    """Its config may be that of the distillation that follows."""
    found = []
    for share in (0.0, 1.0):
        changes = training_world.flow(**SWITCHES["window forcing"], true_prefix_probability=share)
        with trainer_of(training_world, tmp_path / f"{share}", **changes) as trainer:
            found.append(losses(trainer, trainer.batches["generator"].dataset[0], 5))
    assert torch.equal(*found)


def test_a_prompt_that_changes_leaves_another_clip_behind(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    """Up to a block's first frame; whatever the share of a rank is."""
    changes = training_world.flow(
        **SWITCHES["window forcing"], prompt_change_probability=0.5, total_batch_size=16
    )
    with trainer_of(training_world, tmp_path, **changes) as trainer:
        task, data = trainer.task, trainer.batches["generator"].dataset
        assert isinstance(task, FlowMatching)
        ends, changed = set(), 0
        for update in range(8):
            batch, draws, _ = trainer.batches["generator"].micro_batch(0, Draws(0, update, ()))
            seen = task._clean(batch, batch["latents"], draws)[0]
            drawn = draws.uniform(Purpose.PROMPT_CHANGE, (3,)).tolist()
            for row, own, (share, which, _) in zip(seen, batch["latents"], drawn, strict=True):
                other = data[int(which * len(data))]["latents"]
                differ = [not torch.equal(*pair) for pair in zip(row, own, strict=True)]
                if share >= 0.5 or torch.equal(own, other):
                    assert not any(differ)
                    continue
                changed += 1
                end = sum(differ)
                ends.add(end)
                assert differ == [True] * end + [False] * (FRAMES - end)
                assert torch.equal(row[:end], other[:end])
        assert changed > 2
        assert ends == {1, 2}, "the first frames of the later blocks"
        one, of_one = draws.indices[0], draws.for_indices(draws.indices[:1])
        alone = trainer.batches["generator"].micro_batch(0, of_one)[0]
        assert one == 0
        assert torch.equal(alone["before"][0], batch["before"][0])
        plain = {key: value for key, value in batch.items() if key not in ("before", "change")}
        with_it, without = (task.loss("generator", b, draws).loss for b in (batch, plain))
        assert not torch.equal(with_it, without)


def test_prompt_changes_need_latents_and_frames_behind(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    share = {"prompt_change_probability": 0.5}
    with pytest.raises(UserError, match="needs teacher_forcing, window_forcing or"):
        training_world.config(tmp_path, **training_world.flow(**share))
    changes = training_world.flow(**SWITCHES["window forcing"], **share)
    config = training_world.config(tmp_path, **changes)
    size = {"num_frames": 9, "height": 16, "width": 32}
    check_changes(config, open_dataset(training_world.latents, **size))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ball\n")
    with pytest.raises(UserError, match="needs stored latents"):
        check_changes(config, open_dataset(prompts, **size))
    guarded = training_world.config(tmp_path, motion_guard_attention="windows", **share)
    with pytest.raises(UserError, match="needs stored latents"):
        Distillation.check_data(guarded, Setup.of(guarded), open_dataset(prompts, **size))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": None, "schedule": "full"}, "block-causal"),
        ({"denoising_step_list": None}, "denoising_step_list"),
        ({"num_frame_per_block": 2, "max_attention_frames": 9}, "whole blocks"),
    ],
)
def test_window_forcing_needs_levels_and_whole_blocks(
    changes: dict[str, Any], said: str, training_world: TrainingWorld, tmp_path: Path
) -> None:
    changes = training_world.flow(**(SWITCHES["window forcing"] | changes))
    with (
        pytest.raises(UserError, match=said),
        trainer_of(training_world, tmp_path, **changes),
    ):
        pass


class CountingTimer(Timer):
    """Counts operations in the phases of the time."""

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self.counter = counter
        self.counted: Counter[str] = Counter()
        self._before = 0

    def _charge(self) -> None:
        super()._charge()
        now = self.counter.get_total_flops()
        self.counted[self.now] += now - self._before
        self._before = now


TEXTS_OF = {"scores": 3, "teacher": 3}  # encodings in a phase of the generator's; elsewhere one


@pytest.mark.slow
@pytest.mark.parametrize("name", ["options", "consistency", "ode", "flow"])
def test_operations_of_phases_are_those_that_run_in_them(
    name: str, training_world: TrainingWorld, tmp_path: Path
) -> None:
    """Of an update of every player, as PyTorch counts them; texts are made once and left out."""
    changes = {**getattr(training_world, name)(), "gradient_checkpointing": True}
    changes |= {"same_step_across_videos": True, "real_name": "Student", "global_batch_size": 2}
    config = training_world.config(tmp_path, **changes)
    with open_world("cpu") as ranks, FlopCounterMode(display=False) as counter:
        timer = CountingTimer(counter)
        trainer = Trainer(config, ranks, tmp_path / "run", visualise=False, save=False, timer=timer)
        task = trainer.task
        assert isinstance(task, GeneratorTask)
        text = text_flops(task.generator.config)
        for number, player in enumerate(task.players):
            timer.counted.clear()
            with sdpa_kernel(SDPBackend.MATH):
                trainer.update(player)
            ran = {phase: count / 2 for phase, count in timer.counted.items()}  # of two videos
            draws = Draws(config.seed, number, ())
            said = task.phase_flops(player, draws)
            assert said is not None
            assert sum(said.values()) == task.flops(player, draws)
            learnt = 2 if "guard" in said else 1
            backward = said.pop("backward")  # inputs need no gradient; edges are made once
            assert ran.pop("backward") - learnt * 1.6 * text == pytest.approx(backward, rel=0.1)
            texts = TEXTS_OF if player == "generator" else {}
            assert {k: n - texts.get(k, 1) * text for k, n in ran.items() if n} == said
