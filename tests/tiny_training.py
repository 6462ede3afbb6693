"""Trainings of tiny networks: in this process, or under torchrun."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from model.self_rollout import RolloutDraw
from pipeline.schedule import BlockLayout
from tests.processes import free_port
from tests.tiny_models import write_tiny_text_encoder, write_tiny_vae
from tests.tiny_pipeline import TINY_DIT, random_dit, write_config, write_dit_folder
from trainer.checkpoint import is_whole
from trainer.heldout import heldout_draws
from trainer.metrics import mean_over_ranks, read_metrics
from trainer.sharding import open_world
from trainer.tasks.base import rollout_recipe
from trainer.trainer import Trainer
from utils.config import Config, load_config
from utils.datasets import collate, write_shard
from utils.embeddings import write_shard as write_embeddings
from wan.flow import denoising_timesteps

ROOT = Path(__file__).resolve().parent.parent

PROMPTS = ["a red ball", "a blue cat", "the sky", "the sea", "a dog", "grass", "a square"]
SIZES = {"dim": 24, "ffn_dim": 48, "num_heads": 2, "num_layers": 2}
FRAMES, LATENT = 3, (16, 2, 4)  # of a scored clip; one token is 2 x 2
UNEQUAL = ("seconds", "time", "tflops_per_second", "memory_gib")  # metrics of the machine


@dataclass(frozen=True)
class TrainingWorld:
    """Model folders and one data set of each kind."""

    root: Path

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def prompts(self) -> Path:
        return self.root / "prompts.txt"

    @property
    def embeddings(self) -> Path:
        return self.root / "embeddings"

    @property
    def latents(self) -> Path:
        return self.root / "latents"

    @property
    def trajectories(self) -> Path:
        return self.root / "trajectories"

    def values(self, **changes: Any) -> dict[str, Any]:
        """An experiment: distillation of three blocks of one frame, in fp32."""
        return {
            "method": "rolling_forcing",
            "device": "cpu",
            "model_root": str(self.models),
            "generator_name": "Student",
            "real_name": "Teacher",
            "fake_name": "Critic",
            "text_embeddings": str(self.embeddings),
            "data_path": str(self.prompts),
            "image_or_video_shape": [1, FRAMES, *LATENT],
            "num_training_frames": FRAMES + 1,
            "num_frame_per_block": 1,
            "max_attention_frames": 6,
            "model_kwargs": {"sink_size": 1},
            "denoising_step_list": [1000, 600, 300],
            "warp_denoising_step": True,
            "negative_prompt": "blue",
            "batch_size": 2,
            "global_batch_size": 4,
            "recipe_batch_size": None,
            "max_steps": 4,
            "log_iters": 100,
            "lr": 1e-3,
            "lr_critic": 1e-3,
            "ema_start_step": 2,
            "ema_weight": 0.9,
            "dfake_gen_update_ratio": 2,
            "mixed_precision": False,
            "reencode_first_frame": False,
            "sample_latent_frames": 4,
            **changes,
        }

    def write(self, path: Path, **changes: Any) -> Path:
        """The experiment as a file."""
        return write_config(path, **self.values(**changes))

    def config(self, folder: Path, **changes: Any) -> Config:
        """The experiment, loaded."""
        folder.mkdir(parents=True, exist_ok=True)
        return load_config(self.write(folder / "experiment.yaml", **changes))

    def ode(self) -> dict[str, Any]:
        """What makes the experiment an ODE initialisation."""
        return {"trainer": "ode", "data_path": str(self.trajectories), "ema_start_step": 2}

    def flow(self, **changes: Any) -> dict[str, Any]:
        """What makes the experiment flow matching of a bidirectional network."""
        return {
            "trainer": "diffusion",
            "method": None,
            "schedule": "full",
            "denoising_step_list": None,
            "data_path": str(self.latents),
            **changes,
        }

    def consistency(self, **changes: Any) -> dict[str, Any]:
        """What makes the experiment a consistency distillation."""
        return {
            "trainer": "consistency",
            "teacher_forcing": True,
            "consistency_steps": 6,
            "data_path": str(self.latents),
            **changes,
        }

    def options(self) -> dict[str, Any]:
        """All options of distillation that are off by default."""
        return {
            "replayed_backward": True,
            "num_training_frames": FRAMES + 3,
            "scored_clip": "anywhere",
            "same_step_across_videos": False,
            "critic_updates_per_rollout": 2,
            "motion_guard_weight": 0.5,
            "true_prefix_probability": 0.5,
            "data_path": str(self.latents),
        }

    def vae(self) -> dict[str, Any]:
        """What makes the experiment the training of a VAE, on single frames."""
        sizes = {"base_dim": 2, "dim_mult": [1, 1, 1, 1], "kl_weight": 0.1, "edge_weight": 0.5}
        return self.of_package("vae") | {"random_init": True, "vae": sizes}

    def of_package(self, trainer: str, package: str = "endless") -> dict[str, Any]:
        """What makes the experiment a training on the videos of a package, one frame each."""
        return {
            "trainer": trainer,
            "method": None,
            "schedule": "full",
            "denoising_step_list": None,
            "text_embeddings": None,
            "data_path": f"{package}:train",
            "heldout_data_path": f"{package}:heldout",
            "image_or_video_shape": [1, 1, 16, 2, 2],
        }


def write_training_world(root: Path) -> TrainingWorld:
    """Student (with text encoder and VAE), teacher and critic, and data."""
    world = TrainingWorld(root)
    for seed, name in enumerate(("Student", "Teacher", "Critic"), start=1):
        sizes = SIZES | ({"num_layers": 3} if name == "Teacher" else {})
        folder = world.models / name
        write_dit_folder(folder, TINY_DIT | sizes, random_dit(seed, **sizes).state_dict())
    write_tiny_vae(world.models / "Student" / "Wan2.1_VAE.pth")
    write_tiny_text_encoder(world.models / "Student", dim=TINY_DIT["text_dim"])
    world.prompts.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    draw = torch.Generator().manual_seed(5)
    texts = {
        prompt: torch.randn(3, TINY_DIT["text_dim"], generator=draw)
        for prompt in (*PROMPTS, "blue", "")
    }
    for folder in (world.embeddings, world.latents, world.trajectories):
        folder.mkdir()
    write_embeddings(world.embeddings / "a.safetensors", texts)
    data = torch.randn(len(PROMPTS), FRAMES, *LATENT, generator=draw)
    write_shard(world.latents / "a.safetensors", data, PROMPTS)
    paths = torch.randn(len(PROMPTS), 4, FRAMES, *LATENT, generator=draw)
    steps = [*denoising_timesteps([1000, 600, 300], 5.0, warp=True).tolist(), 0.0]
    write_shard(world.trajectories / "a.safetensors", paths, PROMPTS, timesteps=steps)
    return world


def layout_of(config: Config) -> BlockLayout:
    """The blocks of a config."""
    return BlockLayout(config.num_frame_per_block, config.independent_first_frame)


def drawn(config: Config, update: int) -> RolloutDraw:
    """The rollout that a config draws for an update."""
    return rollout_recipe(config).draw(layout_of(config), update)


def train(config: Config, logdir: Path, **options: Any) -> Trainer:
    """A whole training on one rank, in this process."""
    with open_world("cpu") as world:
        trainer = Trainer(config, world, logdir, **{"visualise": False, **options})
        trainer.train()
    return trainer


def trained_state(config: Config, logdir: Path) -> dict[str, Any]:
    """What `final_state` would be of a training that is not saved."""
    with open_world("cpu") as world:
        trainer = Trainer(config, world, logdir, visualise=False, save=False)
        trainer.train()
        return dict(_flatten(trainer._state(), ""))


def states(logdir: Path) -> list[Path]:
    """The whole states of a run."""
    return sorted(path for path in (logdir / "states").glob("step_*") if is_whole(path))


def read_state(folder: Path) -> dict[str, Any]:
    """A state as flat names to whole tensors and plain values."""
    file = folder.parent / f"{folder.name}.pt"
    dcp_to_torch_save(folder, file)
    nested = torch.load(file, weights_only=False)
    file.unlink()
    return dict(_flatten(nested, ""))


def _flatten(value: Any, name: str) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        return [(name, value)]
    return [item for key, inner in value.items() for item in _flatten(inner, f"{name}/{key}")]


def final_state(logdir: Path) -> dict[str, Any]:
    """The newest state of a run."""
    return read_state(states(logdir)[-1])


def tensors(state: Mapping[str, Any], *parts: str) -> dict[str, Tensor]:
    """The tensors of a state with all of `parts` in their names."""
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor) and all(part in name for part in parts)
    }


def assert_same_state(left: Mapping[str, Any], right: Mapping[str, Any]) -> None:
    """Bit for bit; `run` includes step, data positions and the health monitor's memory."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, right[name]), name
        elif name == "/run":
            assert json.loads(value) == json.loads(right[name])
        else:
            assert value == right[name], name


def assert_close_states(
    left: Mapping[str, Any], right: Mapping[str, Any], atol: float = 1e-5
) -> None:
    """The same training up to rounding."""
    ours, theirs = tensors(left), tensors(right)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=atol, rtol=0, msg=name)


def course(logdir: Path) -> list[dict[str, Any]]:
    """What a run logged, without what depends on the machine."""
    return [
        {name: value for name, value in line.items() if name.partition("/")[0] not in UNEQUAL}
        for line in read_metrics(logdir)
    ]


def assert_same_course(left: Path, right: Path) -> None:
    """Up to rounding; gradient norms tell what Adam, which forgets the scale, hides in weights."""
    for ours, theirs in zip(course(left), course(right), strict=True):
        assert ours.keys() == theirs.keys()
        for metric, value in theirs.items():
            if isinstance(value, float):
                assert ours[metric] == pytest.approx(value, abs=1e-5, rel=1e-4), metric


def assert_goes_on_bit_for_bit(
    world: TrainingWorld,
    folder: Path,
    values: Mapping[str, Any],
    players: Sequence[str],
    *,
    ema: bool = True,
    batches: int = 4,
) -> None:
    """A training of four steps, stopped after two, against one that was not stopped.

    `batches`: how many the last player has done with at the end.
    """
    values = {**values, "lr_warmup_steps": 3}
    once = world.config(folder, max_steps=4, **values)
    left = trained_state(once, folder / "once")
    train(world.config(folder, max_steps=2, **values), folder / "twice")
    assert [path.name for path in states(folder / "twice")] == ["step_000002"]
    right = trained_state(once, folder / "twice")
    assert_same_state(left, right)
    assert course(folder / "once") == course(folder / "twice")
    for player in players:
        assert tensors(left, f"/{player}/weights")
        assert tensors(left, f"/{player}/optimiser", "exp_avg_sq")
    assert bool(tensors(left, f"/{players[0]}/ema")) is ema
    assert json.loads(left["/run"])["positions"][players[-1]] == 4 * batches


def heldout_against_one_batch(
    world: TrainingWorld, folder: Path, values: Mapping[str, Any]
) -> tuple[str, dict[str, float], dict[str, float]]:
    """The player that is measured on four items, the numbers found, and those of one batch."""
    config = world.config(folder, **{**values, "batch_size": 4})
    with open_world("cpu") as ranks:
        trainer = Trainer(config, ranks, folder / "run", visualise=False, save=False)
        heldout = trainer.heldout
        assert heldout is not None
        found = mean_over_ranks(heldout.measure())
        batch = collate([heldout.data[index] for index in range(4)])
        for player in trainer.task.players.values():
            player.module.eval()
        with torch.no_grad():
            measured = trainer.task.heldout_player
            expected = trainer.task.loss(measured, batch, heldout_draws(range(4)))
    single = {"loss": expected.loss, **expected.metrics}
    return (
        measured,
        found,
        {f"heldout/{name}": value.item() for name, value in single.items() if value.ndim == 0},
    )


def assert_heldout_changes_nothing(
    world: TrainingWorld, folder: Path, values: Mapping[str, Any]
) -> None:
    """The same training with and without, bit for bit and in every number of the log."""
    values = {**values, "max_steps": 3, "global_batch_size": 2}
    found = []
    for name, changes in (("with", {}), ("without", {"heldout_every": 0})):
        torch.manual_seed(0)
        found.append(trained_state(world.config(folder, **{**values, **changes}), folder / name))
        del found[-1]["/run"]  # its config says which is which
    assert_same_state(*found)
    rows = [
        {key: value for key, value in line.items() if not key.startswith("heldout/")}
        for line in course(folder / "with")
    ]
    assert rows == [{"step": 0}, *course(folder / "without")]


def start(
    command: Sequence[str | Path], ranks: int | None = None, *launch: str, **environment: str
) -> subprocess.Popen[str]:
    """Start a Python file of the repository, under torchrun if `ranks` is given."""
    launcher = (
        ["-m", "torch.distributed.run", *(launch or ["--standalone"]), f"--nproc_per_node={ranks}"]
        if ranks
        else []
    )
    names = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, *launcher, *map(str, command)],
        cwd=ROOT,
        env=names
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'plugins'}"}
        | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def two_nodes() -> list[str]:
    """What torchrun is told on each of two nodes."""
    launch = ["--nnodes=2", "--rdzv_backend=c10d", "--rdzv_id=tiny"]
    return [*launch, "--rdzv_endpoint", f"127.0.0.1:{free_port()}"]


def finish(process: subprocess.Popen[str], timeout: float = 120) -> tuple[int, str]:
    """Exit code and everything said; the process and its children never outlive the test."""
    try:
        said, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said
