"""The log of a run: what is in the file, what survives a resume, what ranks agree on."""

import json
import logging
import math
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.ranks import on_ranks
from tests.tiny_pipeline import write_config
from trainer.metrics import (
    MetricsLog,
    Timer,
    TimestepBuckets,
    TrainingProgress,
    WandbSettings,
    flatten,
    latent_statistics,
    mean_over_ranks,
    read_metrics,
)
from trainer.sharding import World
from utils.config import load_config
from utils.errors import UserError
from utils.video import VideoWriter

ROOT = Path(__file__).resolve().parents[2]


def open_log(folder, **options):
    return MetricsLog(folder, **{"wandb": None, "tensorboard": False, "is_main": True} | options)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_flat_line_per_step_with_wall_time(tmp_path):
    log = open_log(tmp_path / "run")
    before = time.time()
    log.write(
        3, {"loss": torch.tensor(0.5), "seconds": {"data": 1}, "by": [1.0, 2.0], "word": "ok"}
    )
    line = lines_of(tmp_path / "run")[0]  # flushed: readable before close
    assert before - 1 <= line.pop("time") <= time.time() + 1
    assert line == {
        "step": 3,
        "loss": 0.5,
        "seconds/data": 1,
        "by/0": 1.0,
        "by/1": 2.0,
        "word": "ok",
    }


def test_numbers_that_are_not_finite_become_null(tmp_path):
    log = open_log(tmp_path, tensorboard=find_spec("tensorboard") is not None)
    log.write(0, {"a": math.nan, "b": math.inf, "c": torch.tensor(-math.inf), "d": 1.0})
    log.close()
    line = lines_of(tmp_path)[0]
    assert (line["a"], line["b"], line["c"], line["d"]) == (None, None, None, 1.0)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_resume_drops_the_steps_that_are_done_again(tmp_path):
    log = open_log(tmp_path)
    for step in range(6):
        log.write(step, {"loss": step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # the process died here
    log = open_log(tmp_path)
    log.resume(4)
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 1, 2, 3]
    log.write(4, {"loss": 40})
    log.close()
    assert [(line["step"], line["loss"]) for line in lines_of(tmp_path)][3:] == [(3, 3), (4, 40)]


def test_without_resume_no_step_is_there_twice_either(tmp_path):
    for value in (1, 2):
        log = open_log(tmp_path)
        for step in range(3):
            log.write(step, {"loss": value})
        log.close()
    assert [(line["step"], line["loss"]) for line in lines_of(tmp_path)] == [(0, 2), (1, 2), (2, 2)]


def test_a_step_cannot_be_written_twice(tmp_path):
    log = open_log(tmp_path)
    log.write(1, {})
    with pytest.raises(ValueError, match="step 1 was written already"):
        log.write(1, {})


def test_other_ranks_write_nothing(tmp_path):
    log = open_log(tmp_path / "run", is_main=False, tensorboard=True, wandb=WandbSettings("p"))
    log.resume(0)
    log.write(0, {"loss": 1.0})
    log.video(0, "sample", tmp_path / "absent.mp4")
    log.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_warning(tmp_path, monkeypatch, caplog, package):
    missing = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}[package]
    monkeypatch.setitem(sys.modules, missing, None)  # makes its import fail
    wanted = {"tensorboard": {"tensorboard": True}, "wandb": {"wandb": WandbSettings("p")}}
    log = open_log(tmp_path, **wanted[package])
    with caplog.at_level(logging.WARNING):
        log.write(0, {"loss": 1.0})
        log.write(1, {"loss": 1.0})
    assert [f"pip install {package}" in record.message for record in caplog.records] == [True]
    assert len(lines_of(tmp_path)) == 2


def test_a_log_that_cannot_be_opened_ends_no_training(tmp_path, monkeypatch, caplog):
    """Libraries raise more than missing modules and full disks."""

    def broken(*_args, **_options):
        raise RuntimeError("no reply from the service\nand more")

    monkeypatch.setattr("trainer.metrics._TensorBoard.__init__", broken)
    monkeypatch.setattr("trainer.metrics._Wandb.__init__", broken)
    log = open_log(tmp_path, tensorboard=True, wandb=WandbSettings("p"))
    log.write(0, {"loss": 1.0})
    said = [record.message for record in caplog.records]
    assert said == [f"no {name} log: no reply from the service" for name in ("TensorBoard", "W&B")]
    assert len(lines_of(tmp_path)) == 1


def test_read_metrics_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"holds no metrics\.jsonl"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b"\x89PNG\n\x00\xff\n")
    with pytest.raises(UserError, match="holds no step"):
        read_metrics(tmp_path)


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_gets_numbers_and_videos_and_hides_what_is_done_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with VideoWriter(tmp_path / "a.mp4", fps=16) as writer:
        writer.write(torch.randint(0, 255, (9, 32, 48, 3), dtype=torch.uint8))
    log = open_log(tmp_path, tensorboard=True)
    for step in range(4):
        log.write(step, {"critic": {"loss": step, "none": math.nan}})
    log.resume(2)
    log.write(2, {"critic/loss": 20.0})
    log.video(2, "sample", tmp_path / "a.mp4", "a red ball")
    figure = np.zeros((20, 30, 3), dtype=np.uint8)
    Image.fromarray(figure).save(tmp_path / "f.png")
    log.figure(2, "health", tmp_path / "f.png", "healthy: so far")
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("critic/loss")] == [(0, 0), (1, 1), (2, 20)]
    assert events.Tags()["scalars"] == ["critic/loss"]
    image = events.Images("sample")[0]
    assert (image.step, image.width, image.height) == (2, 48, 32)
    assert image.encoded_image_string.startswith(b"GIF89a")
    assert (events.Images("health")[0].width, events.Images("health")[0].height) == (30, 20)
    told = {tag: events.SummaryMetadata(tag).summary_description for tag in ("sample", "health")}
    assert told == {"sample": "a red ball", "health": "healthy: so far"}, "captions"


WANDB_RUN = """
import sys
from pathlib import Path
from trainer.metrics import MetricsLog, WandbSettings
log = MetricsLog(Path(sys.argv[1]), wandb=WandbSettings("p", config={"lr": 1}),
                 tensorboard=False, is_main=True)
log.write(0, {"loss": 1.0})
log.close()
first = Path(sys.argv[1], "wandb_run_id.txt").read_text()
log.resume(1)
log.write(1, {"loss": 2.0})
log.close()
assert Path(sys.argv[1], "wandb_run_id.txt").read_text() == first, "resumed in another run"
log.write(0, {"loss": 3.0})
log.close()
assert Path(sys.argv[1], "wandb_run_id.txt").read_text() != first, "started over in the old run"
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_works_offline_and_a_resumed_run_keeps_its_id(tmp_path):
    """Without a login, and without asking for one: a prompt would hang every other rank."""
    drop = ("WANDB_", "NETRC")
    env = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
    env |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WANDB_RUN, str(tmp_path / "run")]
    subprocess.run(command, env=env, check=True, timeout=120, stdin=subprocess.DEVNULL)
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 3


def test_an_unreachable_wandb_server_leaves_the_run_offline(tmp_path, monkeypatch, caplog):
    """The failed start kept the run's id, so that starting it again offline failed as well."""
    calls = []

    def init(**options):
        calls.append(options.get("mode"))
        if "teardown" not in calls:
            raise ConnectionError("no route\nto the host")
        return SimpleNamespace(define_metric=lambda *_, **__: None, log=calls.append)

    wandb = SimpleNamespace(
        init=init,
        teardown=lambda: calls.append("teardown"),
        Settings=dict,
        errors=SimpleNamespace(Error=ConnectionError),
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = open_log(tmp_path / "run", wandb=WandbSettings("p", key="k" * 40))
    log.write(0, {"loss": 1.0, "none": math.nan})
    assert calls == [None, "teardown", "offline", {"step": 0, "loss": 1.0}]
    assert "W&B: no route; the run is kept offline" in caplog.text


def test_wandb_settings_come_from_the_config_and_keep_the_key_to_themselves(tmp_path):
    base = write_config(tmp_path / "rolling_forcing.yaml", denoising_step_list=[1000, 500])
    assert WandbSettings.from_config(load_config(base)) is None
    config = load_config(base, ["wandb_project=films", "wandb_key=secret"])
    settings = WandbSettings.from_config(config, tmp_path)
    assert settings is not None
    assert (settings.project, settings.key, settings.save_dir) == ("films", "secret", tmp_path)
    assert settings.config["lr"] == config.lr
    assert "secret" not in repr(settings) + repr(settings.config)


def test_flatten_joins_names():
    assert flatten({"a": {"b": [1, {"c": 2}]}, "d": 3}) == {"a/b/0": 1, "a/b/1/c": 2, "d": 3}


def test_mean_over_ranks_alone_only_reads():
    metrics = {"a": torch.tensor(1.5), "b": {"c": 2}, "n": math.nan, "word": "x", "none": None}
    read = mean_over_ranks(metrics)
    assert math.isnan(read.pop("n"))
    assert read == {"a": 1.5, "b/c": 2.0, "word": "x", "none": None}
    assert all(not isinstance(value, torch.Tensor) for value in read.values())
    assert mean_over_ranks({}) == {}


def of_a_rank(world: World) -> dict[str, float]:
    rank = world.ranks.rank
    buckets = TimestepBuckets()
    # three losses on rank 0 and one on rank 1: each counts as much as any other
    buckets.add(torch.full((3 if rank == 0 else 1,), 50.0), torch.full((3 - 2 * rank,), rank + 1.0))
    metrics = {"t": torch.tensor(1.0 + rank), "x": {"y": 10.0 * rank}, "word": "same"}
    return mean_over_ranks(metrics) | {"bucket": buckets.read()["0-100"]}


@pytest.mark.slow
def test_mean_over_two_ranks():
    first, second = on_ranks(2, of_a_rank)
    assert first == second
    assert first == {"t": 1.5, "x/y": 5.0, "word": "same", "bucket": 1.25}


def test_latent_statistics_of_known_latents():
    x = torch.randn(2, 6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x += torch.tensor([0.0, 0.0, 4.0, 4.0]).view(1, 1, 4, 1, 1)
    stats = latent_statistics(3 * x)
    assert float(stats["mean"]) == pytest.approx(6, abs=0.2)
    assert float(stats["std"]) == pytest.approx(3 * math.sqrt(1 + 4), rel=0.03)
    assert float(stats["channel_std"]) == pytest.approx(6, abs=0.2)
    # the mean absolute difference of two unit normals is 2 / sqrt(pi)
    assert float(stats["motion"]) == pytest.approx(2 / math.sqrt(math.pi * 5), rel=0.03)
    still = x[:, :1].expand(-1, 6, -1, -1, -1)
    assert float(latent_statistics(still)["motion"]) == 0
    assert float(latent_statistics(torch.ones_like(x))["motion"]) == 0
    assert math.isnan(latent_statistics(x[:, :1])["motion"])


def test_timestep_buckets_average_each_interval():
    buckets = TimestepBuckets()
    buckets.add(torch.tensor([[0.0, 99.0], [100.0, 1000.0]]), torch.tensor([[1.0, 3], [5, 7]]))
    buckets.add(torch.tensor([950.0]), torch.tensor([9.0], dtype=torch.bfloat16))
    means = buckets.read()
    assert len(means) == 10
    assert (means["0-100"], means["100-200"], means["900-1000"]) == (2.0, 5.0, 8.0)
    assert math.isnan(means["400-500"])
    assert all(math.isnan(value) for value in buckets.read().values())  # `read` starts anew
    with pytest.raises(ValueError, match="timesteps"):
        buckets.add(torch.zeros(2, 3), torch.zeros(2))


def test_phases_never_count_time_twice(monkeypatch):
    clock = iter([0, 1, 3, 6, 10, 15, 20, 21])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    timer = Timer()
    with timer.phase("rollout"), timer.phase("data"):  # 1..15; inside 3..6
        pass
    with timer.phase("rollout"):
        pass
    assert timer.read() == {"rollout": 2 + 4 + 5, "data": 3, "step": 21}
    monkeypatch.setattr(time, "perf_counter", lambda: 30)
    assert timer.read() == {"step": 9}


def test_a_whole_phase_keeps_what_is_inside(monkeypatch):
    clock = iter([0, 1, 3, 6, 10, 15, 20, 21])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    timer = Timer()
    with timer.phase("heldout", whole=True), timer.phase("rollout"):  # 1..10; inside 3..6
        pass
    with timer.phase("rollout"):  # 15..20
        pass
    assert timer.read() == {"heldout": 9, "rollout": 5, "step": 21}


def test_a_phase_ends_with_an_error_too():
    timer = Timer()
    with pytest.raises(RuntimeError), timer.phase("data"):
        raise RuntimeError
    time.sleep(0.02)
    assert timer.read()["data"] < 0.02


def test_progress_shows_the_newest_losses_and_the_verdict(capsys):
    progress = TrainingProgress(10, start=4)
    progress.update({"generator/loss": 0.25, "critic/loss": 0.5, "lr": 1.0})
    progress.update({"critic/loss": 0.125}, "static")
    progress.close()
    line = capsys.readouterr().err
    assert "6/10" in line
    assert "generator 0.25, critic 0.125, static" in line
    TrainingProgress(10, enabled=False).update({"critic/loss": 1.0})
    assert capsys.readouterr().err == ""


def test_a_failing_tensorboard_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk in its thread came out of the training step; one warning is enough."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    log = MetricsLog(tmp_path, wandb=None, tensorboard=True, is_main=True)
    log.write(1, {"loss": 1.0})
    monkeypatch.setattr("trainer.metrics._TensorBoard.write", full)
    log.write(2, {"loss": 1.0})
    log.write(3, {"loss": 1.0})
    log.close()
    assert caplog.text.count("no TensorBoard log from here on") == 1
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
