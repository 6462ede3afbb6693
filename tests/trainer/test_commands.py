"""train.py on the command line, with and without torchrun, and its estimate of memory."""

import re
import signal
import time
from pathlib import Path

import pytest
import torch

import train as entry
from tests.processes import free_port
from tests.tiny_pipeline import TINY_DIT
from tests.tiny_training import (
    PROMPTS,
    TrainingWorld,
    assert_close_states,
    assert_same_state,
    course,
    final_state,
    finish,
    start,
    states,
    train,
    two_nodes,
)
from trainer.estimate import dry_run_report
from utils.cli import run_main
from utils.embeddings import write_shard
from utils.files import locked


def flags(config: Path, logdir: Path) -> list[str]:
    return ["--config_path", str(config), "--logdir", str(logdir), "--disable-wandb"]


# --- without training ---------------------------------------------------------------------------


@pytest.mark.slow
def test_dry_run_says_what_a_rank_will_hold_and_writes_nothing(
    training_world: TrainingWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = training_world.write(tmp_path / "c.yaml", batch_size=1, global_batch_size=16)
    command = [*flags(config, tmp_path / "run"), "--dry_run", "--world_size", "8"]
    assert run_main(entry.main, command) == 0
    said = capsys.readouterr().out
    assert "data: 7 items" in said
    assert "8 ranks x 1 videos x 2 micro-batches = 16 videos per update" in said
    for phase in (
        "generator +rollout",
        "generator +backward",
        "critic +scores",
        "critic +backward",
    ):
        assert re.search(rf"^{phase} +[\d.]+", said, re.MULTILINE), said
    assert re.search(r"at most [\d.]+ GiB per rank", said)
    assert re.search(r"a step: \S+ TFLOP for each video, \S+ s at 400 TFLOP/s per rank", said)
    assert re.search(r"disk: [\d.]+ GiB for each of 3 states", said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("dfake_gen_update_ratios=5", "did you mean 'dfake_gen_update_ratio'"),
        ("global_batch_size=1", "1 videos per update are too few for 2 ranks"),
        ("critic_warmup_steps=4", "leaves the generator no update of max_steps=4"),
        ("real_name=Missing", "Missing does not exist"),
        ("trainer=gan", "trainer"),
        ("trainer=ode", "prompts.txt holds no trajectories"),
        ("trainer=diffusion", "prompts.txt holds no latents"),
        ("negative_prompt=red", "no embedding of the prompt 'red'"),
        ("gradient_accumulation_steps=0", "gradient_accumulation_steps must be at least 1"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    override: str,
    said: str,
    training_world: TrainingWorld,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = training_world.write(tmp_path / "c.yaml")
    command = [*flags(config, tmp_path / "run"), "--dry_run", "--world_size", "2", override]
    assert run_main(entry.main, command) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert said in errors[-1]
    assert errors[-1].startswith("error: ")
    assert not (tmp_path / "run").exists()


# --- training -----------------------------------------------------------------------------------


def test_flags_of_a_dry_run_are_refused_without_it(
    training_world: TrainingWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They did nothing, and the training began."""
    config = training_world.write(tmp_path / "experiment.yaml")
    assert run_main(entry.main, [*flags(config, tmp_path / "run"), "--gpu_gb", "80"]) == 2
    assert "--gpu_gb is of --dry_run" in capsys.readouterr().err
    for flag, value in (("world_size", "0"), ("tflops", "-400"), ("gpu_gb", "nan")):
        command = [*flags(config, tmp_path / "run"), "--dry_run", f"--{flag}={value}"]
        assert run_main(entry.main, command) == 2
        assert f"--{flag} must be a number above 0" in capsys.readouterr().err


def test_a_dry_run_plans_for_any_number_of_ranks(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    """12 ranks were said to be in nodes of 8; a folder of weights was said to be missing."""
    weights = training_world.models / "Student"
    config = training_world.config(tmp_path, global_batch_size=24, generator_ckpt=str(weights))
    report = dry_run_report(config, 12)
    assert "12 ranks x 2 videos" in report
    assert "not here yet" not in report


@pytest.mark.slow
@pytest.mark.parametrize("dashes", [["--"], pytest.param([], marks=pytest.mark.long)])
def test_plain_python_with_and_without_the_lone_dashes(
    dashes: list[str], training_world: TrainingWorld, tmp_path: Path
) -> None:
    """The real text encoder; `--no_save` and `--no_visualize` leave only the log."""
    values = {"text_embeddings": None, "sample_every": 1, "max_steps": 2}
    config = training_world.write(tmp_path / "c.yaml", **values)
    extra = ["--no_save", "--no_visualize", "lr=2e-3"]
    command = ["train.py", *dashes, *flags(config, tmp_path / "run"), *extra]
    code, said = finish(start(command))
    assert code == 0, said
    assert [line["step"] for line in course(tmp_path / "run")] == [1, 2]
    assert course(tmp_path / "run")[0]["generator/lr"] == 2e-3
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "tensorboard"}


@pytest.mark.slow
def test_the_published_command_line(training_world: TrainingWorld, tmp_path: Path) -> None:
    config = training_world.write(tmp_path / "c.yaml", max_steps=2, batch_size=1)
    launch = ["--rdzv_backend=c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}"]
    command = ["train.py", "--", *flags(config, tmp_path / "run")]
    code, said = finish(start(command, 2, *launch))
    assert code == 0, said
    assert said.count("2 ranks x 1 videos x 2 micro-batches") == 1, "only the main rank speaks"
    assert len(states(tmp_path / "run")) == 1


@pytest.mark.slow
def test_a_folder_takes_one_run_at_a_time(
    training_world: TrainingWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second run broke the first one's states and took away its log."""
    command = flags(training_world.write(tmp_path / "c.yaml", max_steps=1), tmp_path / "run")
    with locked(tmp_path / "run", ""):
        assert run_main(entry.main, command) == 2
        assert "another run is writing to" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert run_main(entry.main, command) == 0
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.long
def test_two_nodes(training_world: TrainingWorld, tmp_path: Path) -> None:
    """Two torchrun agents that meet at one address; hybrid means one copy per node then."""
    config = training_world.write(tmp_path / "c.yaml", max_steps=3)
    launch = two_nodes()
    command = ["train.py", "--", *flags(config, tmp_path / "run")]
    nodes = [start(command, 1, *launch) for _ in range(2)]
    ends = [finish(node) for node in nodes]
    assert [code for code, _ in ends] == [0, 0], ends
    train(training_world.config(tmp_path, max_steps=3), tmp_path / "one")
    assert_close_states(final_state(tmp_path / "run"), final_state(tmp_path / "one"))


@pytest.mark.slow
def test_sigterm_ends_with_0_and_the_same_command_goes_on(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    config = training_world.write(tmp_path / "experiment.yaml", max_steps=None)
    command = ["train.py", "--", *flags(config, tmp_path / "run")]
    process = start(command)
    deadline = time.monotonic() + 90
    log = tmp_path / "run" / "metrics.jsonl"
    while not log.exists() or len(log.read_text(encoding="utf-8").splitlines()) < 3:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    code, said = finish(process)
    assert code == 0, said
    (kept,) = states(tmp_path / "run")
    stopped = int(kept.name.removeprefix("step_"))
    assert f"saved at step {stopped}" in said
    code, said = finish(start([*command, f"max_steps={stopped + 1}"]))
    assert code == 0, said
    assert f"going on at step {stopped}" in said
    train(training_world.config(tmp_path, max_steps=stopped + 1), tmp_path / "once")
    assert_same_state(final_state(tmp_path / "run"), final_state(tmp_path / "once"))

    code, said = finish(start([*command, "lr=0.5"]))
    assert code == 2
    assert "lr (0.001 -> 0.5)" in said


def test_a_loss_that_is_not_finite_ends_with_1(
    training_world: TrainingWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    huge = {prompt: torch.full((2, TINY_DIT["text_dim"]), 3e38) for prompt in (*PROMPTS, "blue")}
    (tmp_path / "text").mkdir()
    write_shard(tmp_path / "text" / "a.safetensors", huge)
    config = training_world.write(tmp_path / "c.yaml", text_embeddings=str(tmp_path / "text"))
    assert run_main(entry.main, flags(config, tmp_path / "run")) == 1
    assert "stopped: step" in capsys.readouterr().err
    assert list((tmp_path / "run").glob("emergency_*/diagnosis.json"))


@pytest.mark.slow
def test_a_dry_run_needs_no_data_yet(
    training_world: TrainingWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What has to be fetched first was an error, and "not here yet" was overwritten."""
    config = training_world.write(tmp_path / "c.yaml", generator_ckpt="none.pt")
    command = [*flags(config, tmp_path / "run"), "--dry_run", "data_path=prompts/none.txt"]
    assert run_main(entry.main, command) == 0
    said = capsys.readouterr().out
    assert "not here yet: none.pt" in said
    assert "not here yet: prompts/none.txt" in said
    assert "at most" in said
    vae = training_world.write(tmp_path / "v.yaml", **training_world.vae())
    command = [*flags(vae, tmp_path / "run"), "--dry_run"]
    assert run_main(entry.main, command) == 0
    said = capsys.readouterr().out
    assert "data: items without end in endless:train" in said
    assert "holds no transformer" in said
    assert run_main(entry.main, [*command, "generator_ckpt=none.pt"]) == 2
    assert "generator_ckpt is not read" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [True, None])
@pytest.mark.parametrize("kind", ["ode", "flow", "vae"])
def test_every_objective_trains_in_the_default_precision(
    kind: str,
    mixed: bool | None,
    training_world: TrainingWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The VAE's convolutions got float32 videos beside bf16 weights: a crash, with the defaults."""
    if kind == "vae":  # to plan the first update of its many sharded tensors takes seconds
        monkeypatch.setattr("trainer.updates.clip_grad_norm_", lambda *given: torch.ones(()))
        monkeypatch.setattr("trainer.networks.Player.apply", lambda player: None)
    changes = getattr(training_world, kind)() | {"mixed_precision": mixed, "max_steps": 1}
    changes |= {"batch_size": 1, "global_batch_size": 1}
    train(training_world.config(tmp_path, **changes), tmp_path / "run", save=False)
