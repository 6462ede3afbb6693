"""Embeddings, latents and ODE pairs computed before training, on a synthetic model folder."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline import VideoPipeline, load_pipeline
from pipeline.prefix import encode_prefix
from pipeline.setup import Setup
from pipeline.trajectories import ode_grid, solve_trajectories
from scripts import precompute
from tests.conftest import TinyWorld
from tests.processes import in_a_copy, kill_this_process
from tests.tiny_pipeline import TINY_DIT, random_dit, write_dit_folder
from trainer.precompute import ShardRun, list_shards
from utils.cli import run_main
from utils.config import Config, load_config
from utils.datasets import LatentDataset, OdePairDataset, open_dataset
from utils.distributed import Ranks
from utils.embeddings import EmbeddingStore, trim
from utils.embeddings import write_shard as write_embeddings
from utils.noise import CounterNoise
from utils.video import VideoWriter
from wan.dit import DiTConfig, WanDiT
from wan.flow import denoising_timesteps, shift_timesteps
from wan.text_encoder import WanTextEncoder

ROOT = Path(__file__).resolve().parents[2]
LATENT = (16, 4, 6)
FRAMES = 6
PROMPTS = ["the red ball", "a cat jumps", "the sea"]
Main = Callable[[Sequence[str]], int]


def verb(name: str) -> Main:
    return lambda argv: precompute.main([name, *argv])


TEXT, LATENTS, ODE_PAIRS = map(verb, ("text", "latents", "ode_pairs"))


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS), encoding="utf-8")
    return path


def command(world: TinyWorld, out: Path, *arguments: object) -> list[str]:
    """Flags first, then the overrides."""
    fixed = ["--config_path", world.config, "--output_folder", out, "--shard_size", 2]
    given = [str(argument) for argument in (*fixed, *arguments)]
    return sorted(given, key=lambda argument: "=" in argument)


def run(main: Main, world: TinyWorld, out: Path, *arguments: object) -> int:
    return run_main(main, command(world, out, *arguments))


def run_ranks(
    monkeypatch: pytest.MonkeyPatch, job: Callable[[], int], order: Sequence[int]
) -> None:
    """The job as each of several ranks; they need nothing of each other."""
    monkeypatch.setenv("WORLD_SIZE", str(len(order)))
    for rank in order:
        monkeypatch.setenv("RANK", str(rank))
        assert job() == 0
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")


def ode_flags(prompt_file: Path) -> list[object]:
    frames = ["--num_latent_frames", FRAMES, "--num_steps", 4]
    return ["--data_path", prompt_file, *frames, "real_name=Tiny", "height=32", "width=48"]


def contents(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def assert_same(first: Path, second: Path, tolerance: float = 0.0) -> None:
    one, two = contents(first), contents(second)
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].keys() == two[name].keys()
        for key, value in one[name].items():
            assert (value - two[name][key]).abs().max() <= tolerance


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


# --- prompts ------------------------------------------------------------------------------------


def test_stored_embeddings_are_what_the_pipeline_encodes(
    tiny_world: TinyWorld, prompt_file: Path, tmp_path: Path
) -> None:
    more = tmp_path / "more.txt"
    more.write_text("in the sky\nthe sea\n", encoding="utf-8")
    flags = ["--data_path", prompt_file, "--data_path", more, "--negative_prompt"]
    assert run(TEXT, tiny_world, tmp_path / "text", *flags) == 0
    store = EmbeddingStore(tmp_path / "text")
    pipe = load_pipeline(tiny_world.config, tiny_world.checkpoint, device="cpu")
    prompts = [*PROMPTS, "in the sky", pipe.setup.negative_prompt, ""]
    stored = sum(len(shard) for shard in contents(tmp_path / "text").values())
    assert stored == len(store) == len(prompts), "the prompt of both files is stored once"
    for prompt in prompts:
        assert torch.equal(store[prompt], trim(pipe.encode_prompts([prompt])[0]))


def test_extended_prompts_are_the_ones_encoded(
    tiny_world: TinyWorld, prompt_file: Path, tmp_path: Path
) -> None:
    extended = tmp_path / "extended.txt"
    extended.write_text("one\ntwo\nthree\n", encoding="utf-8")
    flags = ["--data_path", prompt_file, "--extended_prompt_path", extended, "--count", 2]
    assert run(TEXT, tiny_world, tmp_path / "text", *flags) == 0
    store = EmbeddingStore(tmp_path / "text")
    assert len(store) == 2
    assert "one" in store
    assert "two" in store


def test_a_run_is_taken_up_and_grows(
    tiny_world: TinyWorld, prompt_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "text"
    flags = ["--data_path", prompt_file]
    assert run(TEXT, tiny_world, out, *flags, "--count", 1) == 0
    assert run(TEXT, tiny_world, out, *flags) == 0
    assert len(EmbeddingStore(out)) == 3, "the last shard had one prompt and grew"
    before, whole = stamps(out), contents(out)
    (out / "000001.safetensors").unlink()
    (out / "000001.0123abcd.part.safetensors").write_bytes(b"half written")
    assert run(TEXT, tiny_world, out, *flags, "--negative_prompt") == 0
    assert stamps(out)["000000.safetensors"] == before["000000.safetensors"]
    assert contents(out)["000001.safetensors"].keys() == whole["000001.safetensors"].keys()
    assert not list(out.glob("*.part*"))


# --- videos -------------------------------------------------------------------------------------


def test_latents_of_videos_are_what_the_vae_encodes(tiny_world: TinyWorld, tmp_path: Path) -> None:
    for name, frames in (("a", 5), ("b", 7), ("c", 5)):
        levels = torch.randint(0, 255, (frames, 32, 48, 3), dtype=torch.uint8)
        with VideoWriter(tmp_path / f"{name}.mp4") as writer:
            writer.write(levels)
        (tmp_path / f"{name}.txt").write_text(name, encoding="utf-8")
    flags = ["--data_path", tmp_path, "--num_frames", 5]
    out = tmp_path / "out"
    assert run(LATENTS, tiny_world, out, *flags) == 0
    stored = LatentDataset(out)
    assert [stored.prompt(index) for index in range(3)] == ["a", "b", "c"]
    assert stored.item_shape == (2, *LATENT)
    vae = load_pipeline(tiny_world.config, tiny_world.checkpoint, device="cpu").vae
    videos = open_dataset(tmp_path, num_frames=5, height=32, width=48)
    for index in range(3):
        expected = encode_prefix(videos[index]["video"], vae).latents[0]
        assert torch.equal(stored[index]["latents"], expected)


@pytest.mark.slow
def test_latents_of_a_package_on_two_ranks(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--data_path", "endless:train", "--count", 3, "--num_frames", 5, "width=32"]
    flags += ["--storage_dtype", "float16"]
    assert run(LATENTS, tiny_world, tmp_path / "one", *flags) == 0
    run_ranks(
        monkeypatch,
        lambda: run(LATENTS, tiny_world, tmp_path / "two", *flags),
        order=[1, 0],
    )
    assert_same(tmp_path / "one", tmp_path / "two")
    tensors = contents(tmp_path / "one")["000000.safetensors"]
    assert tensors["latents"].dtype == torch.float16
    assert tensors["latents"].shape == (2, 2, 16, 4, 4)


# --- trajectories -------------------------------------------------------------------------------


class PointTeacher(WanDiT):
    """The exact velocity where all data is one point: x_t = (1 - s) point + s noise solves it."""

    def forward(self, latents: Tensor, timesteps: Tensor, *_: object) -> Tensor:
        sigma = timesteps[..., None, None, None] / 1000
        return (latents - 3.0) / sigma


def solve(config: Config, teacher: WanDiT, **changes: object) -> tuple[Tensor, Tensor]:
    """(levels, trajectories) of samples 0 and 1, 4 steps and the config's levels."""
    steps = config.denoising_step_list
    assert steps is not None
    levels = denoising_timesteps(steps, config.generator_shift, warp=True)
    arguments: dict = {
        "text": torch.zeros(2, 3, teacher.config.text_dim),
        "levels": levels,
        "grid": ode_grid(levels, 4, config.generator_shift),
        "num_latent_frames": FRAMES,
        "noise": CounterNoise(5, LATENT, 3, 3),
        "samples": (0, 1),
        "guidance_scale": None,
    } | changes
    setup = Setup.of(config, sizes=teacher.config)
    return levels, solve_trajectories(setup, teacher, **arguments)


def initial_noise(seed: int, sample: int) -> Tensor:
    noise = CounterNoise(seed, LATENT, 3, 3)
    return torch.cat([noise(sample, block, 0) for block in range(FRAMES // 3)])


def test_states_lie_on_the_known_solution_at_the_levels(tiny_world: TinyWorld) -> None:
    config = load_config(tiny_world.config)
    levels, states = solve(config, PointTeacher(DiTConfig.from_dict(TINY_DIT)))
    noise = torch.stack([initial_noise(5, sample) for sample in (0, 1)])
    sigma = torch.cat([levels, torch.zeros(1)]) / 1000
    expected = torch.stack([(1 - s) * 3.0 + s * noise for s in sigma], dim=1)
    assert states.shape == (2, 6, FRAMES, *LATENT)
    assert (states - expected).abs().max() < 1e-4


def test_the_grid_holds_even_steps_and_levels_once() -> None:
    four = denoising_timesteps([1000, 750, 500, 250], 5.0, warp=True)
    grid = ode_grid(four, 48, 5.0)
    even = shift_timesteps(torch.arange(48, 0, -1, dtype=torch.float64) * 1000 / 48, 5.0)
    assert torch.equal(grid, grid.sort(descending=True).values)
    assert len(grid) == 48, "the published levels lie on the published 48 steps"
    assert (grid - even).abs().max() < 1e-3
    five = denoising_timesteps([1000, 800, 600, 400, 200], 5.0, warp=True)
    grid = ode_grid(five, 48, 5.0)
    assert len(grid) == 52, "only 1000 is common to both"
    assert set(five.tolist()) <= set(grid.tolist())


def test_trajectory_ends_where_the_pipelines_own_sampling_ends(
    tiny_world: TinyWorld, prompt_file: Path, tmp_path: Path
) -> None:
    flags = [*ode_flags(prompt_file), "guidance_scale=0", "--seed", 9]
    assert run(ODE_PAIRS, tiny_world, tmp_path / "out", *flags) == 0
    pairs = OdePairDataset(tmp_path / "out")
    config = load_config(tiny_world.config)
    levels = denoising_timesteps([1000, 800, 600, 400, 200], config.timestep_shift, warp=True)
    assert pairs.timesteps == (*levels.tolist(), 0.0)
    pipe = load_pipeline(config, device="cpu")
    grid = ode_grid(levels, 4, config.timestep_shift).tolist()
    euler = {"schedule": "full", "step_rule": "ode", "warp_denoising_step": False}
    full = VideoPipeline(Setup.of(replace(config, denoising_step_list=grid, **euler)), pipe.dit)
    for index, prompt in enumerate(PROMPTS):
        item = pairs[index]
        assert item["prompt"] == prompt
        assert torch.equal(item["trajectory"][0], initial_noise(9, index))
        noise = CounterNoise(9, LATENT, 3, 3)
        latents = full.generate_latents(
            pipe.encode_prompts([prompt]),
            FRAMES,
            noise=lambda _, block, level, n=noise, i=index: n(i, block, level),
        )
        assert (item["trajectory"][-1] - latents[0]).abs().max() < 1e-4


def test_guidance_adds_g_times_the_difference_to_the_conditional_velocity(
    tiny_world: TinyWorld, prompt_file: Path, tmp_path: Path
) -> None:
    flags = [*ode_flags(prompt_file), "guidance_scale=2.5", "negative_prompt=the blue cat"]
    assert run(ODE_PAIRS, tiny_world, tmp_path / "out", *flags) == 0
    trajectory = OdePairDataset(tmp_path / "out")[1]["trajectory"]
    pipe = load_pipeline(tiny_world.config, device="cpu")
    cond, uncond = (
        pipe.dit.encode_text(pipe.encode_prompts([p])) for p in (PROMPTS[1], "the blue cat")
    )
    levels = denoising_timesteps([1000, 800, 600, 400, 200], 5.0, warp=True)
    grid = [*ode_grid(levels, 4, 5.0).tolist(), 0.0]
    x = initial_noise(0, 1)[None]
    for now, after in pairwise(grid):
        t = torch.full((1, FRAMES), now)
        with torch.no_grad():
            v_cond, v_uncond = pipe.dit(x, t, cond), pipe.dit(x, t, uncond)
        x = x + (after - now) / 1000 * (v_cond + 2.5 * (v_cond - v_uncond))
    assert (v_cond - v_uncond).abs().max() > 1e-3, "the prompts differ in what they do"
    assert (trajectory[-1] - x[0]).abs().max() < 1e-4


def test_ode_pairs_depend_on_neither_ranks_nor_batches(
    tiny_world: TinyWorld, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ode_flags(prompt_file)
    assert run(ODE_PAIRS, tiny_world, tmp_path / "one", *flags) == 0
    run_ranks(
        monkeypatch,
        lambda: run(ODE_PAIRS, tiny_world, tmp_path / "two", *flags),
        order=[1, 0],
    )
    assert_same(tmp_path / "one", tmp_path / "two")
    batched = [*flags, "--batch_size", 2]
    assert run(ODE_PAIRS, tiny_world, tmp_path / "batch", *batched) == 0
    assert_same(tmp_path / "one", tmp_path / "batch", tolerance=1e-4)


@pytest.mark.slow
def test_stored_text_and_another_checkpoint_are_used(
    tiny_world: TinyWorld, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text"
    flags = ["--data_path", prompt_file, "--negative_prompt"]
    assert run(TEXT, tiny_world, text, *flags) == 0
    write_dit_folder(tmp_path / "weights", TINY_DIT, random_dit(seed=77).state_dict())
    weights = tmp_path / "weights" / "diffusion_pytorch_model.safetensors"
    flags = ode_flags(prompt_file)
    assert run(ODE_PAIRS, tiny_world, tmp_path / "plain", *flags) == 0
    monkeypatch.delattr(WanTextEncoder, "from_official")
    flags += [f"text_embeddings={text}"]
    assert run(ODE_PAIRS, tiny_world, tmp_path / "stored", *flags) == 0
    flags += ["--checkpoint_path", weights]
    assert run(ODE_PAIRS, tiny_world, tmp_path / "other", *flags) == 0
    assert_same(tmp_path / "plain", tmp_path / "stored", tolerance=1e-5)
    plain, other = (OdePairDataset(tmp_path / n)[0]["trajectory"] for n in ("plain", "other"))
    assert torch.equal(plain[0], other[0])
    assert (plain[-1] - other[-1]).abs().max() > 1e-3
    # embeddings made anew at the same place, by another encoder or tokenizer
    flags, stored = flags[:-2], tmp_path / "stored"
    assert run(ODE_PAIRS, tiny_world, stored, *flags) == 0
    store = EmbeddingStore(text)
    again = {prompt: store[prompt] for prompt in PROMPTS}
    for shard in text.glob("0*.safetensors"):
        shard.unlink()
    write_embeddings(text / "000000.safetensors", again, "another encoder")
    assert run(ODE_PAIRS, tiny_world, stored, *flags) == 2


# --- processes ----------------------------------------------------------------------------------


def start(arguments: Sequence[str], launcher: Sequence[str] = ()) -> subprocess.Popen[str]:
    script = str(ROOT / "scripts" / "precompute.py")
    return subprocess.Popen(
        [sys.executable, *launcher, script, "ode_pairs", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def test_killed_run_goes_on_where_it_was(
    tiny_world: TinyWorld, prompt_file: Path, tmp_path: Path
) -> None:
    flags = [*ode_flags(prompt_file), "--shard_size", 1]
    out = tmp_path / "out"

    def is_killed() -> None:
        replace = Path.replace

        def replace_or_die(part: Path, target: Path) -> Path:
            if (out / "000000.safetensors").exists():
                kill_this_process()
            return replace(part, target)

        Path.replace = replace_or_die  # type: ignore[method-assign, assignment]
        run(ODE_PAIRS, tiny_world, out, *flags)

    assert in_a_copy(is_killed) == -signal.SIGKILL
    left = stamps(out)
    assert len(left) == 2, "a whole one, and one without its name"

    assert run(ODE_PAIRS, tiny_world, out, *flags) == 0
    assert run(ODE_PAIRS, tiny_world, tmp_path / "whole", *flags) == 0
    assert_same(out, tmp_path / "whole")
    after = stamps(out)
    assert after["000000.safetensors"] == left["000000.safetensors"], "what was done is kept"
    assert len(after) == len(PROMPTS), "what the killed run left is gone"


@pytest.mark.slow
def test_torchrun_gives_what_one_process_gives(
    tiny_world: TinyWorld, prompt_file: Path, tmp_path: Path
) -> None:
    flags = ode_flags(prompt_file)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = start(command(tiny_world, tmp_path / "two", *flags), launcher)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert run(ODE_PAIRS, tiny_world, tmp_path / "one", *flags) == 0
    assert_same(tmp_path / "one", tmp_path / "two")


def test_a_rank_makes_its_own_shards_whatever_others_have_done_already(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    """A rank that started late left shards to nobody: it dealt out only those still missing."""
    shards = list_shards(tmp_path, [str(n) for n in range(6)], 1)
    config = load_config(tiny_world.config)
    ranks = [ShardRun(config, "x", Ranks(rank, 2, rank)) for rank in (0, 1)]
    early = ranks[1].missing(shards)
    write_embeddings(early[0].path, dict.fromkeys(early[0].prompts, torch.ones(1, 2)), "x")
    late = ranks[0].missing(shards)
    assert [shard.start for shard in early] == [1, 3, 5]
    assert [shard.start for shard in late] == [0, 2, 4]
    assert [shard.start for shard in ranks[1].missing(shards)] == [3, 5]


# --- what can be wrong --------------------------------------------------------------------------

BAD_INPUT = {
    "no_end": (TEXT, ["--data_path", "endless:train"], "--count"),
    "no_items": (TEXT, ["--data_path", "{prompts}", "--count", 0], "--count"),
    "negative_count": (TEXT, ["--data_path", "endless:train", "--count", -1], "1"),
    "shard_size": (TEXT, ["--data_path", "{prompts}", "--shard_size", 0], "shard"),
    "no_videos": (LATENTS, ["--data_path", "{prompts}"], "holds no videos"),
    "frames": (LATENTS, ["--data_path", "{prompts}", "--num_frames", 6], "1, 5, 9"),
    "no_frames": (LATENTS, ["--data_path", "{prompts}", "--num_frames", 0], "1, 5, 9"),
    "blocks": (ODE_PAIRS, ["{ode}", "--num_latent_frames", 5], "whole blocks"),
    "batch": (ODE_PAIRS, ["{ode}", "--batch_size", 0], "--batch_size"),
    "steps": (ODE_PAIRS, ["{ode}", "--num_steps", 0], "--num_steps"),
    "no_levels": (ODE_PAIRS, ["{ode}", "denoising_step_list=null"], "levels"),
    "no_text": (ODE_PAIRS, ["{ode}", "text_embeddings={text}"], "no embedding"),
    "no_teacher": (ODE_PAIRS, ["{ode}", "real_name=Nothing"], "Nothing"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence_and_exit_code_2(
    case: str,
    tiny_world: TinyWorld,
    prompt_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main, arguments, words = BAD_INPUT[case]
    text = tmp_path / "text.safetensors"
    write_embeddings(text, {prompt: torch.ones(1, 32) for prompt in PROMPTS})
    given: list[object] = []
    for argument in arguments:
        whole = {"{prompts}": [prompt_file], "{ode}": ode_flags(prompt_file)}
        given += whole.get(str(argument), [str(argument).replace("{text}", str(tmp_path))])
    assert run(main, tiny_world, tmp_path / "out", *given) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    assert words in said
    assert not (tmp_path / "out").exists()


def test_states_of_other_levels_are_not_taken_for_these(
    tiny_world: TinyWorld, prompt_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where all levels lie on the steps, the steps alone do not tell them apart."""
    flags = [*ode_flags(prompt_file), "timestep_shift=1", "warp_denoising_step=false"]
    three = [*flags, "denoising_step_list=[1000,750,500]"]
    two = [*flags, "denoising_step_list=[1000,500]"]
    assert run(ODE_PAIRS, tiny_world, tmp_path / "out", *three) == 0
    assert run(ODE_PAIRS, tiny_world, tmp_path / "out", *two) == 2
    assert "other settings" in capsys.readouterr().err


def test_shards_of_other_settings_are_not_overwritten(
    tiny_world: TinyWorld,
    prompt_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, flags = tmp_path / "out", ode_flags(prompt_file)
    assert run(ODE_PAIRS, tiny_world, out, *flags) == 0
    before = stamps(out)
    assert run(ODE_PAIRS, tiny_world, out, *flags, "--count", 2) == 0
    for change in (["--seed", 1], ["--num_steps", 5], ["guidance_scale=1"], ["--shard_size", 3]):
        assert run(ODE_PAIRS, tiny_world, out, *flags, *change) == 2
        assert "other settings" in capsys.readouterr().err
    prompt_file.write_text("something else\n", encoding="utf-8")
    assert run(ODE_PAIRS, tiny_world, out, *flags) == 2
    (out / "000000.safetensors").write_bytes(b"nonsense")
    assert run(ODE_PAIRS, tiny_world, out, *flags) == 2
    assert "not a readable" in capsys.readouterr().err
    assert stamps(out)["000001.safetensors"] == before["000001.safetensors"]
