"""Several ranks give the training of one: sharded, copied, in bf16, for every task."""

import json
import random
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline import load_pipeline
from tests.tiny_training import (
    ROOT,
    TrainingWorld,
    assert_close_states,
    assert_same_course,
    assert_same_state,
    course,
    final_state,
    finish,
    read_state,
    start,
    states,
    tensors,
    train,
    two_nodes,
)
from trainer.metrics import read_metrics

pytestmark = pytest.mark.slow

SMALL = {"batch_size": 1}  # four ranks share a batch of four; two accumulate
LORA = {"lora": {"rank": 2, "alpha": 4, "targets": ["q", "v", "ffn.0"]}}
WORKER = ROOT / "tests" / "trainer" / "run_jobs.py"


@dataclass(frozen=True)
class Runs:
    """Folders of finished runs, how each ended, and what the processes said."""

    folder: Path
    ends: dict[str, str]
    said: str

    def state(self, name: str) -> dict[str, Any]:
        return final_state(self.folder / name)


def run_jobs(
    world: TrainingWorld, folder: Path, ranks: int, jobs: dict[str, dict[str, Any]]
) -> Runs:
    """Each job: changes of the experiment; `job` holds what is for the worker."""
    file = write_jobs(world, folder, jobs)
    code, said = finish(start([WORKER, file], ranks), timeout=200)
    assert code == 0, said
    ends = json.loads(file.with_suffix(".done").read_text(encoding="utf-8"))
    return Runs(folder, dict(zip(jobs, ends, strict=True)), said)


def write_jobs(world: TrainingWorld, folder: Path, jobs: dict[str, dict[str, Any]]) -> Path:
    """What `run_jobs.py` reads."""
    listed = []
    for name, changes in jobs.items():
        for_worker = changes.get("job", {})
        values = {key: value for key, value in changes.items() if key != "job"}
        config = world.write(folder / f"{name}.yaml", **SMALL, **values)
        listed.append({"config": str(config), "logdir": str(folder / name), **for_worker})
    file = folder / "jobs.json"
    file.write_text(json.dumps(listed), encoding="utf-8")
    return file


def variants(world: TrainingWorld) -> dict[str, dict[str, Any]]:
    """The same trainings on one rank and on two, some with five items measured beside them."""
    measured = {"heldout_every": 2, "heldout_videos": 5}
    return {
        "full": {"sharding_strategy": "full"},
        "none": {"sharding_strategy": "none"},
        "mixed": {
            "sharding_strategy": "full",
            "sharding": {"generator": "none", "real_score": "full", "fake_score": "hybrid"},
            "reshard_after_forward": "never",
            "reencode_first_frame": True,
            "method": "self_forcing",
            "same_step_across_blocks": False,
            **measured,
            "heldout_data_path": str(world.prompts),
        },
        "lora": LORA,
        "ode": world.ode() | measured | {"heldout_data_path": str(world.trajectories)},
        "diffusion": world.flow(prompt_dropout=0.5, diffusion_forcing=True),
        "options": {**world.options(), "sharding_strategy": "full"},
        "consistency": world.consistency(
            **LORA, sharding_strategy="full", heldout_data_path=str(world.latents), **measured
        ),
        "uneven": {"sharding_strategy": "full", "global_batch_size": 3, **measured}
        | {"heldout_data_path": str(world.prompts), "reshard_after_forward": "always"},
        "uneven ode": world.ode()
        | {"global_batch_size": 3, "sharding_strategy": "full", "text_embeddings": None},
    }


@pytest.fixture(scope="module")
def two(training_world: TrainingWorld, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("two")
    bf16 = {"mixed_precision": True, "max_steps": 3}
    sampling = {"sample_every": 1, "sample_prompts": ["grass", "the sea"]}
    jobs = variants(training_world) | {
        "bf16": bf16 | sampling | {"job": {"visualise": True}},
        "poisoned": {"log_iters": 1, "job": {"poison": "critic"}},
        "sampled": sampling | {"sharding_strategy": "full", "job": {"visualise": True}},
    }
    return run_jobs(training_world, folder, 2, jobs)


@pytest.fixture(scope="module")
def one(training_world: TrainingWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    for name, changes in variants(training_world).items():
        train(training_world.config(folder / name, **SMALL, **changes), folder / name / "run")
    return folder


@pytest.mark.parametrize(
    "name",
    [
        *("full", "none", "mixed", "lora", "ode", "diffusion", "uneven", "uneven ode"),
        *("options", "consistency"),
    ],
)
def test_two_ranks_train_as_one_with_accumulation(name: str, one: Path, two: Runs) -> None:
    assert two.ends[name] == "step 4"
    expected, found = final_state(one / name / "run"), two.state(name)
    assert_close_states(found, expected)
    assert tensors(expected, "/generator/ema")
    assert_same_course(two.folder / name, one / name / "run")


def test_optimisers_have_moved(one: Path) -> None:
    """So that equal states mean equal trainings, not networks left alone."""
    for name in ("full", "lora", "ode", "diffusion"):
        state = final_state(one / name / "run")
        moments = tensors(state, "/optimiser", "exp_avg_sq")
        assert sum(bool(value.any()) for value in moments.values()) > len(moments) // 2


@pytest.fixture(scope="module")
def four(training_world: TrainingWorld, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("four")
    hybrid = {"sharding_strategy": "hybrid_full", "hybrid_shard_size": 2}
    return run_jobs(training_world, folder, 4, {"hybrid": hybrid})


@pytest.mark.long
def test_two_copies_of_two_shards_train_as_one_rank(one: Path, four: Runs) -> None:
    assert_close_states(four.state("hybrid"), final_state(one / "full" / "run"))


def test_a_sharded_state_goes_on_on_one_rank(
    two: Runs,
    training_world: TrainingWorld,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    config = training_world.config(tmp_path, **SMALL, max_steps=6)
    train(config, tmp_path / "once")
    shutil.copytree(two.folder / "full", tmp_path / "run")
    train(config, tmp_path / "run")
    assert "going on at step 4" in caplog.text
    assert "1 ranks instead of 2" in caplog.text
    assert_close_states(final_state(tmp_path / "run"), final_state(tmp_path / "once"))


def test_a_state_of_one_rank_goes_on_on_two(
    one: Path, training_world: TrainingWorld, tmp_path: Path
) -> None:
    jobs = {"full": {"max_steps": 6}, "lora": {**LORA, "max_steps": 6}}
    for name in jobs:
        shutil.copytree(one / name / "run", tmp_path / name)
    runs = run_jobs(training_world, tmp_path, 2, jobs)
    assert "2 ranks instead of 1" in runs.said
    for name, changes in jobs.items():
        train(training_world.config(tmp_path, **SMALL, **changes), tmp_path / f"{name} once")
        assert_close_states(runs.state(name), final_state(tmp_path / f"{name} once"))


def test_bf16_compute_trains_fp32_weights_that_inference_loads(
    two: Runs, training_world: TrainingWorld
) -> None:
    assert two.ends["bf16"] == "step 3"
    state = two.state("bf16")
    for name, value in tensors(state, "/players/").items():
        assert value.dtype == torch.float32, name
    losses = [line["critic/loss"] for line in course(two.folder / "bf16")]
    assert all(0 < loss < 100 for loss in losses)
    run = two.folder / "bf16"
    checkpoint = run / "checkpoint_model_000003" / "model.pt"
    for use_ema in (False, True):
        pipe = load_pipeline(run / "config.yaml", checkpoint, device="cpu", use_ema=use_ema)
        part = "ema" if use_ema else "weights"
        for name, value in pipe.dit.state_dict().items():
            assert torch.equal(value, state[f"/players/generator/{part}/{name}"]), name
        assert pipe.generate(["grass"], 3, seed=0).shape == (1, 9, 16, 32, 3)


def test_ranks_share_out_the_sample_videos(two: Runs) -> None:
    """Two ranks, two prompts: the main one writes and logs both, with the average's weights.

    The second rank's videos were in no log. Samples change nothing, bit for bit: weights that a
    pass had gathered stayed those of the average.
    """
    expected = tensors(two.state("full"))
    for name, value in tensors(two.state("sampled")).items():
        assert torch.equal(value, expected[name]), name
    assert course(two.folder / "sampled") == course(two.folder / "full")
    tags = EventAccumulator(str(two.folder / "sampled" / "tensorboard")).Reload().Tags()["images"]
    assert {"samples/00 grass", "samples/01 the sea"} <= set(tags)
    videos = sorted(path.name for path in (two.folder / "bf16" / "samples").rglob("*"))
    steps = [f"step_{step:06d}" for step in (1, 2, 3)]
    assert videos == sorted(["00 grass.mp4", "01 the sea.mp4"] * 3 + steps)


def test_one_bad_rank_stops_all_before_the_optimiser(two: Runs, one: Path) -> None:
    assert "step 1: critic" in two.ends["poisoned"]
    folder = two.folder / "poisoned" / "emergency_000001_critic"
    diagnosis = json.loads((folder / "diagnosis.json").read_text(encoding="utf-8"))
    assert diagnosis["gradients_not_finite"]
    (kept,) = states(two.folder / "poisoned")
    before, after = read_state(kept), read_state(folder / "state")
    for name, value in tensors(before, "/players/critic/weights").items():
        assert torch.equal(after[name], value), name


def test_nobody_is_warned_of_views(two: Runs) -> None:
    assert "view tensor" not in two.said
    assert "UserWarning" not in two.said, two.said


@pytest.mark.parametrize(
    ("how", "sentences"),
    [
        ("dead", ["rank 0 lost another one in "]),
        pytest.param(
            "stuck",
            ["waiting for rank 1, which is in", "rank 1 has stood in "],
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_lost_rank_ends_the_others_within_the_limit(
    how: str, sentences: list[str], training_world: TrainingWorld, tmp_path: Path
) -> None:
    """They waited for half an hour, and then told the address of a socket."""
    jobs = {"lost": {"log_iters": 1, "collective_timeout": 3, "job": {"lost": how}}}
    file = write_jobs(training_world, tmp_path, jobs)
    began = time.monotonic()
    code, said = finish(start([WORKER, file], 2), timeout=80)
    assert code != 0
    assert time.monotonic() - began < 40
    for sentence in sentences:
        assert sentence in said, said
    assert "step_000001" in said
    assert [path.name for path in states(tmp_path / "lost")] == ["step_000001"]


@pytest.mark.long
def test_sigterm_inside_a_slow_step_under_torchrun(
    one: Path, training_world: TrainingWorld, tmp_path: Path
) -> None:
    """torchrun kills after 30 s; a step of 40 s was finished first, and nothing was saved."""
    changes = {"sharding_strategy": "full", "max_steps": 4}
    file = write_jobs(training_world, tmp_path, {"full": {**changes, "job": {"sleep": 1.0}}})
    process = start([WORKER, file], 2)
    wait_for(tmp_path / "full" / "slow", process)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, said = finish(process, timeout=60)
    assert time.monotonic() - began < 15
    assert "SIGTERM: stopping before the next pass, then a state is written" in said
    assert "asked to stop: saved at step 1" in said
    assert "going on at step 1" in run_jobs(training_world, tmp_path, 2, {"full": changes}).said
    assert_close_states(final_state(tmp_path / "full"), final_state(one / "full" / "run"))


@pytest.mark.long
def test_a_signal_on_one_of_two_nodes_stops_both(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    """Only the ranks of the node that goes away are told; the others have to learn of it."""
    changes = {"max_steps": 4, "job": {"sleep": 1.0}}
    file, launch = write_jobs(training_world, tmp_path, {"run": changes}), two_nodes()
    nodes = [start([WORKER, file], 1, *launch) for _ in range(2)]
    wait_for(tmp_path / "run" / "slow", nodes[0])
    nodes[1].send_signal(signal.SIGTERM)
    wait_for(file.with_suffix(".done"), nodes[0])
    nodes[0].send_signal(signal.SIGTERM)  # which waits for minutes for the other torchrun
    ends = [finish(node, timeout=60) for node in nodes]
    assert any("asked to stop: saved at step 1" in said for _, said in ends), ends
    assert [path.name for path in states(tmp_path / "run")] == ["step_000001"]


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Until a process has written a file."""
    deadline = time.monotonic() + 90
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.long
def test_sigterm_at_twenty_random_moments_loses_nothing(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    """Each time the same command goes on, and at the end the weights are those of one that ran."""
    changes = {
        "sharding_strategy": "full",
        "max_steps": 60,
        "log_iters": 7,
        "sample_every": 10,
        "sample_prompts": ["grass"],
        "heldout_every": 8,
        "heldout_videos": 2,
        "heldout_data_path": str(training_world.prompts),
        "job": {"visualise": True},
    }
    for name in ("once", "often"):
        (tmp_path / name).mkdir()
    once = run_jobs(training_world, tmp_path / "once", 2, {"run": changes})
    file = write_jobs(training_world, tmp_path / "often", {"run": changes})
    draw, stops = random.Random(5), 0
    step = mean(line["seconds/step"] for line in read_metrics(once.folder / "run")[1:])
    for _ in range(20):
        begun = tmp_path / "often" / "run" / "config.yaml"
        begun.unlink(missing_ok=True)
        process = start([WORKER, file], 2)
        wait_for(begun, process)
        with suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0, 4 * step))
        process.send_signal(signal.SIGTERM)
        _, said = finish(process)
        stops += "asked to stop" in said
    assert stops > 10
    often = run_jobs(training_world, tmp_path / "often", 2, {"run": changes})
    assert_same_state(often.state("run"), once.state("run"))
    assert course(often.folder / "run") == course(once.folder / "run")
