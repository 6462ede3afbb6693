"""States on disk: killed while writing, garbage beside them, copies that training cannot reach."""

import json
import os
import pickle
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from pipeline import load_pipeline
from tests.tiny_training import (
    ROOT,
    TrainingWorld,
    assert_same_state,
    course,
    final_state,
    finish,
    read_state,
    start,
    states,
    tensors,
    train,
)
from trainer.checkpoint import RUN_KEYS, CheckpointStore, DamagedStateError, StateWriter
from trainer.sharding import open_world
from trainer.trainer import Trainer
from utils.errors import UserError
from wan.checkpoints import networks_in, read_state_dict

SLOW_WRITER = ROOT / "tests" / "trainer" / "slow_writer.py"


@pytest.mark.slow
def test_only_the_newest_states_are_kept_and_every_export(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    train(
        training_world.config(tmp_path, max_steps=4, log_iters=1, keep_checkpoints=2),
        tmp_path / "run",
    )
    folders = sorted(path.name for path in (tmp_path / "run" / "states").iterdir())
    assert folders == ["step_000003", "step_000004"]
    exports = sorted(path.name for path in (tmp_path / "run").glob("checkpoint_model_*"))
    assert exports == [f"checkpoint_model_{step:06d}" for step in (1, 2, 3, 4)]


def save_states(folder: Path, *steps: int, keep: int = 9) -> list[Path]:
    """Small states of a run that a store finds."""
    run = json.dumps(dict.fromkeys(RUN_KEYS, 0))
    with open_world("cpu") as world:
        store = CheckpointStore(folder, world, keep=keep)
        for step in steps:
            store.save(step, {"run": run, "w": torch.full((1000,), float(step))})
        store.wait()
        return store.states()


def test_only_names_of_ours_are_states(tmp_path: Path) -> None:
    """A copy renamed by a person ended a start in ValueError, and hung a running training."""
    (good,) = save_states(tmp_path, 2)
    folder = good.parent
    for name in (
        "step_000001_best",
        "step_3",
        "step_0000003",
        "step_000004.partial",
        "best",
        "step_٠٠٠٠٠٩",
    ):
        shutil.copytree(good, folder / name)
    (folder / "step_000010").write_text("not a folder", encoding="utf-8")
    (folder / "step_000011").mkdir()
    kept = save_states(tmp_path, 5, 6, keep=2)
    assert [path.name for path in kept] == ["step_000006", "step_000005"]
    assert (folder / "step_000001_best" / ".metadata").is_file(), "a person's copy stays"


def test_what_fails_in_the_background_reaches_who_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error after the writing left the name's future without a result: a wait for ever."""

    def broken(self: Any, keep: int) -> None:
        raise ValueError("a surprise")

    monkeypatch.setattr(StateWriter, "_remove_old", broken)
    with pytest.raises(UserError, match="could not be written: a surprise"):
        save_states(tmp_path, 1)


def test_no_state_stays_half_written_on_a_full_disk(tmp_path: Path) -> None:
    """torch says "unexpected pos 704 vs 598"."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(UserError, match=r"step_000001.*too large for this place"):
            save_states(tmp_path, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert not list((tmp_path / "states").iterdir())


class Malicious:
    """What calls a function when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def truncate(state: Path) -> None:
    (data,) = state.glob("*.distcp")
    os.truncate(data, data.stat().st_size // 2)


def flip_a_byte(state: Path) -> None:
    (data,) = state.glob("*.distcp")
    content = bytearray(data.read_bytes())
    place = content.index(torch.full((9,), 2.0).numpy().tobytes())
    content[place] ^= 1
    data.write_bytes(content)


def run_code_by_metadata(state: Path) -> None:
    (state / ".metadata").write_bytes(pickle.dumps(Malicious(state.parent / "ran")))


def run_code_by_a_value(state: Path) -> None:
    value = {"run": Malicious(state.parent / "ran"), "w": torch.full((1000,), 2.0)}
    with open_world("cpu"):
        dcp.save(value, checkpoint_id=state)


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip_a_byte,
        run_code_by_metadata,
        run_code_by_a_value,
        lambda state: (state / ".metadata").write_bytes(b""),
        lambda state: (state / ".metadata").write_bytes(b"\x80\x04N."),
        lambda state: next(state.glob("*.distcp")).unlink(),
    ],
)
def test_a_damaged_state_is_told_and_runs_no_code(tmp_path: Path, damage: Any) -> None:
    """`.metadata` is a pickle: it ran whatever was in it, and torch checks no checksum."""
    _, older = save_states(tmp_path, 1, 2)
    newest = older.with_name("step_000002")
    damage(newest)
    with open_world("cpu") as world:
        store = CheckpointStore(tmp_path, world, keep=9)
        state: dict[str, Any] = {"run": "", "w": torch.zeros(1000)}
        with pytest.raises(DamagedStateError):
            store.load(newest, state)
        store.load(older, state)
    assert (state["w"] == 1).all()
    assert not (newest.parent / "ran").exists()


@pytest.mark.slow
def test_the_state_before_a_damaged_one_is_gone_on_from(
    training_world: TrainingWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It ended in a traceback; and a state that is not of ours has to say so, not begin anew."""
    run = tmp_path / "run"
    train(training_world.config(tmp_path, max_steps=3, log_iters=1, ema_start_step=3), run)
    truncate(run / "states" / "step_000003")
    trainer = train(training_world.config(tmp_path, max_steps=4, ema_start_step=3), run)
    assert "step_000003 is damaged, the state before it is tried" in caplog.text
    assert trainer.step == 4
    for state in states(run):
        (state / ".metadata").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the states in .* can be loaded"):
        train(training_world.config(tmp_path, max_steps=5, ema_start_step=3), run)


def test_a_saved_state_does_not_follow_the_training(tmp_path: Path) -> None:
    """What is written is what was there when `save` returned: weights, moments, averages."""
    with open_world("cpu") as world:
        store = CheckpointStore(tmp_path, world, keep=2)
        weights = torch.arange(200_000.0)
        state = {"weights": weights, "optimiser": {"exp_avg": weights * 2}, "ema": weights[::2]}
        expected = {"/weights": weights.clone(), "/optimiser/exp_avg": weights * 2}
        expected["/ema"] = weights[::2].clone()
        store.save(1, state)
        weights.fill_(-1)
        state["optimiser"]["exp_avg"].zero_()
        store.wait()
    stored = read_state(tmp_path / "states" / "step_000001")
    for name, value in expected.items():
        assert torch.equal(stored[name], value), name


@pytest.mark.slow
def test_states_in_the_making_do_not_follow_a_real_training(
    training_world: TrainingWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer is held up until two more steps are done."""
    from threading import Event

    from torch.distributed.checkpoint import FileSystemWriter

    go_on = Event()
    write = FileSystemWriter.write_data

    def held_up(self: Any, *arguments: Any) -> Any:
        assert go_on.wait(60)
        return write(self, *arguments)

    monkeypatch.setattr(FileSystemWriter, "write_data", held_up)
    with open_world("cpu") as world:
        config = training_world.config(tmp_path, ema_start_step=1)
        trainer = Trainer(config, world, tmp_path / "run", visualise=False)
        trainer.train_step()
        now = tensors({f"/{k}": v for k, v in _copies(trainer).items()})
        trainer.save()
        trainer.train_step()
        trainer.train_step()
        assert not states(tmp_path / "run")
        moved = _copies(trainer)
        go_on.set()
        trainer.store.wait()
    stored = final_state(tmp_path / "run")
    for name, value in now.items():
        assert torch.equal(stored[name], value), name
        if name.endswith("head.head.weight"):
            assert not torch.equal(moved[name[1:]], value), name
    assert json.loads(stored["/run"])["step"] == 1


def _copies(trainer: Trainer) -> dict[str, Any]:
    """Clones of weights, averages and moments, named as in a state."""
    found: dict[str, Any] = {}
    for name, player in trainer.task.players.items():
        for key, parameter in player.trained.items():
            found[f"players/{name}/weights/{key}"] = parameter.detach().clone()
            moment = player.optimiser.state[parameter]["exp_avg_sq"].clone()
            found[f"players/{name}/optimiser/state/{key}/exp_avg_sq"] = moment
        for key, shadow in (player.ema.shadow if player.ema else {}).items():
            found[f"players/{name}/ema/{key}"] = shadow.clone()
    return found


def test_failing_to_write_is_said_at_the_next_save(
    training_world: TrainingWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.checkpoint import FileSystemWriter

    def full(*arguments: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    with pytest.raises(UserError, match="could not be written: no space left"):
        train(training_world.config(tmp_path, max_steps=1), tmp_path / "run")
    assert not states(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("file", ["model.pt", "safetensors"])
def test_exports_load_as_they_are(file: str, training_world: TrainingWorld, tmp_path: Path) -> None:
    """`model.<official name>` in the .pt, official names in safetensors; both networks."""
    config = training_world.config(tmp_path, max_steps=3, export_safetensors=True)
    train(config, tmp_path / "run")
    state = final_state(tmp_path / "run")
    folder = tmp_path / "run" / "checkpoint_model_000003"
    assert not list((tmp_path / "run").glob("*.partial"))
    if file == "model.pt":
        published = torch.load(folder / "model.pt", weights_only=True)
        assert published.keys() == {"generator", "generator_ema"}
        assert all(name.startswith("model.") for name in published["generator"])
        assert networks_in(folder / "model.pt") == ("generator", "generator_ema")
    official = read_state_dict(training_world.models / "Student").keys()
    for network, part in (("generator", "weights"), ("generator_ema", "ema")):
        source = folder / (file if file == "model.pt" else f"{network}.safetensors")
        named = network == "generator_ema" and file == "model.pt"
        pipe = load_pipeline(tmp_path / "run" / "config.yaml", source, device="cpu", use_ema=named)
        weights = pipe.dit.state_dict()
        assert weights.keys() == official
        for name, value in weights.items():
            assert torch.equal(value, state[f"/players/generator/{part}/{name}"]), name
    ema, plain = (state[f"/players/generator/{p}/head.head.weight"] for p in ("ema", "weights"))
    assert not torch.equal(ema, plain)


@pytest.mark.slow
def test_killed_between_data_and_metadata_of_a_state(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    """kill -9 while the second state has its tensors on disk and not yet its metadata."""
    config = training_world.config(tmp_path, max_steps=5, log_iters=2)
    train(config, tmp_path / "once")
    command = ["--", "--config_path", str(tmp_path / "experiment.yaml"), "--disable-wandb"]
    command += ["--logdir", str(tmp_path / "run")]
    process = start([SLOW_WRITER, "step_000004", *command])
    partial = tmp_path / "run" / "states" / "step_000004.partial"
    try:
        deadline = time.monotonic() + 90
        while not (caught := list(partial.glob("*.distcp"))):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.2)
        assert not (partial / ".metadata").exists()
        os.killpg(process.pid, signal.SIGKILL)
    finally:
        finish(process)
    assert caught
    assert not (partial / ".metadata").exists()
    assert [path.name for path in states(tmp_path / "run")] == ["step_000002"]
    other = partial.with_name("step_000003.partial")  # of a step that is not saved again
    shutil.copytree(partial, other)

    process = start(["train.py", *command])
    code, said = finish(process)
    assert code == 0, said
    assert "going on at step 2" in said
    assert_same_state(final_state(tmp_path / "run"), final_state(tmp_path / "once"))
    assert course(tmp_path / "run") == course(tmp_path / "once")
    assert not partial.exists(), "the new state of that step took its place"
    assert not other.exists()
