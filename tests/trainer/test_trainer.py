"""The loop: resuming bit for bit, who is updated when, averages, stopping on what is not finite."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_training import (
    TrainingWorld,
    assert_goes_on_bit_for_bit,
    assert_same_state,
    course,
    final_state,
    read_state,
    states,
    tensors,
    train,
)
from trainer.sharding import open_world
from trainer.trainer import Trainer
from trainer.updates import NonFiniteError
from utils.errors import UserError


def tasks(world: TrainingWorld) -> dict[str, dict[str, Any]]:
    return {
        "distillation": {"dfake_gen_update_ratio": 3},
        "options": world.options() | {"dfake_gen_update_ratio": 3, "critic_updates_per_rollout": 3},
        "consistency": world.consistency(window_forcing=True, teacher_forcing=False),
        "ode": world.ode(),
        "diffusion": world.flow(prompt_dropout=0.5),
        "block-causal": world.flow(
            schedule=None, method="self_forcing", teacher_forcing=True, clean_context_noise=100
        ),
        "vae": world.vae() | {"ema_start_step": 2},
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "task",
    [
        *("distillation", "options", "diffusion"),
        *(
            pytest.param(task, marks=pytest.mark.slow)
            for task in ("ode", "block-causal", "consistency", "vae")
        ),
    ],
)
def test_stopping_and_going_on_changes_no_bit(
    task: str, training_world: TrainingWorld, tmp_path: Path
) -> None:
    """With accumulation; stopped inside a 3:1 cycle, after the average has started.

    With all options also between two updates of the critic on the same rollouts.
    """
    both = ["generator", "critic"]
    players = {"distillation": both, "options": both, "vae": ["vae"]}.get(task, ["generator"])
    values, batches = tasks(training_world)[task], 1 if task == "options" else 4
    assert_goes_on_bit_for_bit(training_world, tmp_path, values, players, batches=batches)


@pytest.mark.slow
def test_every_state_of_a_run_is_the_one_of_its_step(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    """States are written while training goes on; they must not follow it."""
    for name, every in (("often", 1), ("rarely", 100)):
        config = training_world.config(tmp_path, log_iters=every, keep_checkpoints=4)
        train(config, tmp_path / name)
    kept = states(tmp_path / "often")
    assert [path.name for path in kept] == [f"step_{step:06d}" for step in (1, 2, 3, 4)]
    for steps in (1, 2):
        config = training_world.config(tmp_path, max_steps=steps)
        train(config, tmp_path / f"{steps}")
        left, right = final_state(tmp_path / f"{steps}"), read_state(kept[steps - 1])
        for state in (left, right):
            del state["/run"]
        assert_same_state(left, right)
    assert tensors(final_state(tmp_path / "rarely")).keys() == tensors(read_state(kept[3])).keys()


def test_generator_comes_before_the_critic_every_n_steps_on_batches_of_its_own(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    config = training_world.config(
        tmp_path, max_steps=11, dfake_gen_update_ratio=5, batch_size=1, global_batch_size=1
    )
    seen: list[tuple[int, str, tuple[str, ...]]] = []
    with open_world("cpu") as world:
        trainer = Trainer(config, world, tmp_path / "run", visualise=False, save=False)
        loss = trainer.task.loss

        def watched(phase: str, batch: dict[str, Any], draws: Any) -> Any:
            seen.append((trainer.step, phase, tuple(batch["prompt"])))
            return loss(phase, batch, draws)

        trainer.task.loss = watched  # type: ignore[method-assign]
        trainer.train()
    generator_steps = [step for step, phase, _ in seen if phase == "generator"]
    assert generator_steps == [0, 5, 10]
    assert [phase for step, phase, _ in seen if step in (0, 1)] == ["generator", "critic", "critic"]
    assert trainer.task.players["generator"].updates == 3
    assert trainer.task.players["critic"].updates == 11
    last = course(tmp_path / "run")[-1]
    assert (last["generator/updates"], last["critic/updates"]) == (3, 11)
    own = {
        phase: [prompts for _, p, prompts in seen if p == phase]
        for phase in ("generator", "critic")
    }
    assert trainer.batches["generator"].position == 3
    assert len(set(own["critic"][:7])) == 7, "an epoch of the critic has every prompt once"
    assert own["generator"] != own["critic"][:3], "the two have orders of their own"


def test_average_starts_at_its_step_and_follows_the_generator_updates(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    """As published: made at the first step >= ema_start_step, of the weights as they are then,
    though the generator is not updated in that step; later it follows generator updates only.
    """
    config = training_world.config(
        tmp_path, max_steps=7, dfake_gen_update_ratio=3, ema_start_step=2, ema_weight=0.9
    )
    weights, averages = [], []
    with open_world("cpu") as world:
        trainer = Trainer(config, world, tmp_path / "run", visualise=False, save=False)
        player = trainer.task.players["generator"]
        while trainer.step < 7:
            trainer.train_step()
            weights.append(player.module.head.head.weight.detach().clone())  # type: ignore[union-attr]
            ema = player.ema
            averages.append(ema.shadow["head.head.weight"].clone() if ema else None)
        assert trainer.task.players["critic"].ema is None
    first, second, third = weights[0], weights[3], weights[6]
    assert not torch.equal(first, second)
    assert averages[0] is None
    expected = first
    for step, average in enumerate(averages[1:], start=2):
        if step == 4:
            expected = 0.9 * expected + 0.1 * second
        if step == 7:
            expected = 0.9 * expected + 0.1 * third
        assert average is not None, step
        torch.testing.assert_close(average, expected)


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_optimiser(
    broken: str, training_world: TrainingWorld, tmp_path: Path
) -> None:
    config = training_world.config(tmp_path, max_steps=4, log_iters=1)
    with open_world("cpu") as world:
        trainer = Trainer(config, world, tmp_path / "run", visualise=False)
        player = trainer.task.players["critic"]
        trainer.train_step()
        before = {name: p.detach().clone() for name, p in player.module.named_parameters()}
        poison(trainer, broken)
        with pytest.raises(NonFiniteError, match="critic loss"):
            trainer.train()
        for name, parameter in player.module.named_parameters():
            assert torch.equal(parameter, before[name]), name
        assert player.updates == 1
    (folder,) = (tmp_path / "run").glob("emergency_*")
    diagnosis = json.loads((folder / "diagnosis.json").read_text(encoding="utf-8"))
    assert (diagnosis["step"], diagnosis["player"]) == (1, "critic")
    assert diagnosis["loss" if broken == "loss" else "grad_norm"] == "nan"
    assert diagnosis["gradients_not_finite"]
    state = read_state(folder / "state")
    for name, value in before.items():
        assert torch.equal(state[f"/players/critic/weights/{name}"], value)


def test_the_very_first_update_may_already_be_broken(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    """There is no optimiser state to keep yet."""
    config = training_world.config(tmp_path, max_steps=4)
    with open_world("cpu") as world:
        trainer = Trainer(config, world, tmp_path / "run", visualise=False)
        poison(trainer, "loss", phase="generator")
        with pytest.raises(NonFiniteError, match="step 0: generator"):
            trainer.train()
    assert (tmp_path / "run" / "emergency_000000_generator" / "state" / ".metadata").is_file()


def poison(trainer: Trainer, what: str, phase: str = "critic") -> None:
    """From now on this player's loss, or only one of its gradients, is NaN."""
    loss = trainer.task.loss
    module = trainer.task.players[phase].module

    def broken_loss(name: str, batch: dict[str, Any], draws: Any) -> Any:
        result = loss(name, batch, draws)
        if what == "gradient" or name != phase:
            return result
        return type(result)(result.loss * float("nan"), result.metrics)

    trainer.task.loss = broken_loss  # type: ignore[method-assign]
    if what == "gradient":
        parameter = next(iter(module.parameters()))
        parameter.register_hook(lambda gradient: gradient * float("nan"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_ctrl_c_is_not_waited_for(
    number: signal.Signals,
    training_world: TrainingWorld,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C lost everything since the last save; without --no_save, what is left is said."""
    config = training_world.config(tmp_path, max_steps=2)
    before = signal.getsignal(number)
    with open_world("cpu") as world:
        trainer = Trainer(config, world, tmp_path / "run", visualise=False, save=False)
        loss = trainer.task.loss

        def interrupted(*arguments: Any) -> Any:
            os.kill(os.getpid(), number)
            second = signal.getsignal(number)
            assert (second == signal.SIG_DFL) == (number == signal.SIGINT)
            return loss(*arguments)

        trainer.task.loss = interrupted  # type: ignore[method-assign]
        trainer.train()
    assert (trainer.step, trainer.stopped_by) == (0, number)
    assert signal.getsignal(number) is before
    said = capfd.readouterr().err
    assert f"{number.name}: stopping before the next pass" in said
    assert ("Ctrl-C once more" in said) == (number == signal.SIGINT)
    assert not states(tmp_path / "run")


@pytest.mark.slow
def test_an_error_leaves_the_state_its_name_and_the_log_closed(
    training_world: TrainingWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A state that was just saved stayed `.partial` for ever."""
    config = training_world.config(tmp_path, max_steps=4, log_iters=1)
    with open_world("cpu") as world:
        trainer = Trainer(config, world, tmp_path / "run", visualise=False)
        save = trainer.save

        def save_and_fail() -> None:
            save()
            raise KeyError("of a user's own code")

        trainer.save = save_and_fail  # type: ignore[method-assign]
        with pytest.raises(KeyError, match="own code"):
            trainer.train()
        assert trainer.log._file is None
    assert [path.name for path in states(tmp_path / "run")] == ["step_000001"]


def test_what_cannot_be_written_is_told_before_weights_are_loaded(
    training_world: TrainingWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in the way was found after the first hour."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "states").touch()
    monkeypatch.delattr("trainer.trainer.open_training_data")
    with pytest.raises(UserError, match="states is a file where a folder should be"):
        train(training_world.config(tmp_path), run)


@pytest.mark.slow
def test_another_config_is_refused_by_the_names_of_its_keys(
    training_world: TrainingWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = training_world.config(tmp_path, max_steps=1)
    train(config, tmp_path / "run")
    changed = {"lr": 2e-3, "guidance_scale": 7.0, "max_steps": 2, "log_iters": 7}
    with pytest.raises(UserError) as error:
        train(training_world.config(tmp_path, **changed), tmp_path / "run")
    said = str(error.value)
    assert "lr (0.001 -> 0.002)" in said
    assert "guidance_scale (3.0 -> 7.0)" in said
    assert "max_steps" not in said
    assert "log_iters" not in said
    with pytest.raises(UserError, match=r"videos per update \(4 -> 8; global_batch_size=4"):
        train(training_world.config(tmp_path, global_batch_size=8), tmp_path / "run")
    free = {"sampling_steps": 7, "step_rule": "renoise", "dtype": "bfloat16", "device": "auto"}
    train(training_world.config(tmp_path, max_steps=1, **free), tmp_path / "run", save=False)
    forced = training_world.config(tmp_path, resume={"force": True}, **changed)
    trainer = train(forced, tmp_path / "run")
    assert trainer.step == 2
    assert "going on, as resume.force says" in caplog.text
    # the run is now one of the new config
    train(training_world.config(tmp_path, **changed), tmp_path / "run", save=False)


@pytest.mark.slow
def test_a_forced_run_follows_its_own_config(
    training_world: TrainingWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The optimiser's stored settings came back with its moments; a run that no longer averages
    ended in an assertion.
    """
    train(training_world.config(tmp_path, max_steps=2, ema_start_step=1), tmp_path / "run")
    changed = {"weight_decay": 0.5, "beta1": 0.5, "ema_weight": 0.0, "max_steps": 3}
    forced = training_world.config(tmp_path, resume={"force": True}, **changed)
    trainer = train(forced, tmp_path / "run")
    player = trainer.task.players["generator"]
    (group,) = player.optimiser.param_groups
    assert (group["weight_decay"], group["betas"][0]) == (0.5, 0.5)
    assert player.optimiser.state, "the moments are the stored ones"
    assert player.ema is None
    trainer.step, trainer.begun = 0, ["critic"]
    trainer._follow_up(saved=True)
    assert "not exported" not in caplog.text, "there are no weights of step 0"


@pytest.mark.slow
def test_another_run_is_refused_before_a_network_is_built(
    training_world: TrainingWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was found after all networks, the largest one last, had been loaded."""
    train(training_world.config(tmp_path, max_steps=1), tmp_path / "run")
    monkeypatch.setattr("trainer.trainer.find_task", lambda name: pytest.fail("too late"))
    with pytest.raises(UserError, match="holds a run of another config: lr"):
        train(training_world.config(tmp_path, lr=0.5), tmp_path / "run")
    # `mixed_precision: null` is another dtype on another machine
    monkeypatch.setattr("trainer.trainer.compute_dtype", lambda config, device: torch.bfloat16)
    with pytest.raises(UserError, match=r"computed in \(torch\.float32 -> torch\.bfloat16\)"):
        train(training_world.config(tmp_path, max_steps=1), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_training_frames": 2}, "num_training_frames=2 is too few"),
        ({"step_rule": "ode"}, "set step_rule=renoise or null"),
        ({"schedule": "full"}, "score_distillation is for a student that looks back"),
        ({"schedule": "full", "trainer": "ode"}, "ode is for a student that looks back at a past"),
        (
            {
                "trainer": "diffusion",
                "schedule": "block",
                "window_forcing": True,
                "max_attention_frames": 3,
            },
            "3 frames in one attention are too few: a window has 3 frames beside 1 sink",
        ),
        ({"attention_backend": "flash3"}, "attention_backend=flash3 needs a CUDA device"),
    ],
)
def test_what_a_training_cannot_do_is_refused(
    changes: dict[str, Any], sentence: str, training_world: TrainingWorld, tmp_path: Path
) -> None:
    """They were passed over, or ended in the attention of the first step."""
    with pytest.raises(UserError, match=sentence):
        train(training_world.config(tmp_path, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_end_of_a_cosine_belongs_to_the_course_of_a_run(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    """Another max_steps is another learning rate in every step, so it is no free key then."""
    values = {"lr_schedule": "cosine"}
    train(training_world.config(tmp_path, max_steps=2, **values), tmp_path / "run")
    with pytest.raises(UserError, match=r"max_steps \(2 -> 4\)"):
        train(training_world.config(tmp_path, max_steps=4, **values), tmp_path / "run")


@pytest.mark.slow
def test_a_finished_run_started_again_does_nothing(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    config = training_world.config(tmp_path, max_steps=1)
    train(config, tmp_path / "run")
    before, lines = final_state(tmp_path / "run"), course(tmp_path / "run")
    train(config, tmp_path / "run")
    assert_same_state(final_state(tmp_path / "run"), before)
    assert course(tmp_path / "run") == lines


@pytest.mark.slow
def test_weights_that_a_kill_kept_from_being_exported_are_when_the_run_goes_on(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    """Killed between the last state and its export, a finished run never had its weights."""
    config = training_world.config(tmp_path, max_steps=1)
    train(config, tmp_path / "run")
    export = tmp_path / "run" / "checkpoint_model_000001" / "model.pt"
    whole = export.read_bytes()
    shutil.rmtree(export.parent)
    train(config, tmp_path / "run", save=False)
    assert not export.parent.exists()
    train(config, tmp_path / "run")
    assert export.read_bytes() == whole


@pytest.mark.slow
def test_sample_videos_leave_the_training_as_it_is(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    """Sampling shares the student; it must not freeze it, draw from it or keep a cache."""
    train(training_world.config(tmp_path, max_steps=3), tmp_path / "without")
    config = training_world.config(
        tmp_path, max_steps=3, sample_every=1, sample_prompts=["a dog", "grass"]
    )
    train(config, tmp_path / "with", visualise=True)
    videos = sorted((tmp_path / "with" / "samples").rglob("*.mp4"))
    assert [f"{video.parent.name}/{video.name}" for video in videos] == [
        f"step_{step:06d}/{name}.mp4" for step in (1, 2, 3) for name in ("00 a dog", "01 grass")
    ]
    left, right = final_state(tmp_path / "with"), final_state(tmp_path / "without")
    for state in (left, right):
        del state["/run"]
    assert_same_state(left, right)


def test_with_no_save_a_broken_update_leaves_nothing_either(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    """A whole state was written in spite of it."""
    with open_world("cpu") as world:
        config = training_world.config(tmp_path)
        trainer = Trainer(config, world, tmp_path / "run", visualise=False, save=False)
        poison(trainer, "loss", phase="generator")
        with pytest.raises(NonFiniteError, match=r"Nothing was saved \(--no_save\)") as error:
            trainer.train()
    assert "anew" not in str(error.value), "nothing remembers which draw was broken"
    assert not list((tmp_path / "run").glob("emergency_*"))


def test_nothing_is_saved_with_no_save(training_world: TrainingWorld, tmp_path: Path) -> None:
    train(training_world.config(tmp_path, max_steps=2, log_iters=1), tmp_path / "run", save=False)
    assert not (tmp_path / "run" / "states").exists()
    assert not list((tmp_path / "run").glob("checkpoint_model_*"))
    assert len(course(tmp_path / "run")) == 2
