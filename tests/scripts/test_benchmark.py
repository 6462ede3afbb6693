"""The figures of the script must agree with each other."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn

from pipeline import stream, timing
from pipeline.random_weights import random_pipeline
from pipeline.sampling import BlockNoise
from pipeline.setup import Setup
from pipeline.timing import Asked, SteadyState, Stopwatch, Viewing, p99, run
from scripts import _machine, benchmark
from scripts._ceilings import decoder_flops, ideal_seconds
from scripts._compare import Variant, in_turns
from scripts._machine import commit
from scripts._report import figures
from scripts.benchmark import main
from tests.golden_cases import load_json
from tests.tiny_pipeline import TINY_DIT, write_config
from utils.cli import parse_command, run_main
from utils.config import load_config
from utils.video import VideoWriter, probe_video
from wan.dit import DiTConfig
from wan.flops import edge_flops, forward_flops
from wan.vae import StreamingDecoder, WanVAE

ROOT = Path(__file__).parents[2]
BLOCK, LEVELS = 3, 4
TOKENS = 4  # 32x32 pixels


@pytest.fixture
def files(tmp_path):
    config = write_config(
        tmp_path / "experiment.yaml",
        method="rolling_forcing",
        height=32,
        width=32,
        denoising_step_list=[1000, 750, 500, 250],
    )
    preset = tmp_path / "preset.json"
    preset.write_text(json.dumps({**TINY_DIT, "vae": {"base_dim": 4}}))
    return ["--config_path", config, "--random_weights", "--model", preset, "--device", "cpu"]


@pytest.mark.slow
@pytest.mark.parametrize("merged", [True, False], ids=["merged", "alone"])
@pytest.mark.parametrize("method", ["rolling_forcing", "self_forcing"])
def test_figures_agree_with_each_other(tmp_path, files, capsys, method, merged):
    out = tmp_path / "out.json"
    given = ["--json", out, "--blocks", 2, "--warmup", 1, f"method={method}"]
    given += ["--file", tmp_path / "a.mp4", "--long", 0.0001, "--plot", tmp_path / "a.png"]
    given.append(f"merge_clean_pass={str(merged).lower()}")
    assert run_main(main, list(map(str, [*files, *given]))) == 0
    said = capsys.readouterr().out
    report = json.loads(out.read_text())
    seconds, fps, flops = report["seconds"], report["fps"], report["flops"]

    windows = 1 if method == "rolling_forcing" else LEVELS
    assert report["passes_per_block"] == {"window": windows, "clean": 0 if merged else 1}
    assert report["frames_per_block"] == 4 * BLOCK
    passes = windows * seconds["window_pass"] + (seconds["clean_pass"] or 0)
    assert seconds["dit_per_block"] == pytest.approx(passes)
    assert seconds["other"] > 0  # the parts are not more than the whole
    assert seconds["block_interval_p99"] is None  # of two
    assert min(seconds["first_frame"].values()) > 0
    start = report["start"]
    assert start["cold"] == pytest.approx(start["load"] + seconds["first_frame"]["cold"])
    raw = report["raw_seconds"]
    counted = ("block_interval", "block_in_parts", "block_with_file", "long", "decode", "copy")
    assert {len(raw[name]) for name in counted} == {2}
    assert sum(raw["block_interval"]) == pytest.approx(2 * seconds["block_interval"])
    assert probe_video(tmp_path / "a.mp4").frames == 2 * 4 * BLOCK
    assert report["long"]["blocks"] == 2
    assert report["long"]["memory"]["held_bytes"] > 2**26
    assert min(report["share_of_ceiling"].values()) > 0
    (kernel, *_) = report["kernels"]["attention"]
    assert "flash_attention_for_cpu" in kernel  # what SDPA chose, not what was asked for
    assert (tmp_path / "a.png").is_file()
    assert fps["end_to_end"] == pytest.approx(4 * BLOCK / seconds["block_interval"])
    assert fps["dit_only"] == pytest.approx(4 * BLOCK / seconds["dit_per_block"])

    dit = DiTConfig.from_dict(TINY_DIT)
    window = forward_flops(dit, BLOCK * (LEVELS if windows == 1 else 1), 21, TOKENS)
    clean = forward_flops(dit, BLOCK, 21, TOKENS)
    assert flops["window_pass"] == window + (clean / windows if merged else 0)
    assert flops["clean_pass"] == (0 if merged else clean)
    assert flops["dit_per_block"] == windows * window + clean
    rate = report["tflops_per_second"]["dit_per_block"]
    assert rate == pytest.approx(flops["dit_per_block"] / seconds["dit_per_block"] / 1e12)
    assert report["peak_memory_bytes"] > 2**26

    setting = report["setting"]
    assert setting["resolution"] == [32, 32]
    assert setting["dtype"] == "float32"
    assert setting["attention_backend"] == "sdpa"
    assert setting["vae"] == "in (Wan2.1, base_dim 4)"
    assert setting["ramp_up_blocks"] == 7 + merged  # a clean pass sees 21 frames from block 6 on
    assert setting["warmup_blocks"] == 1
    assert setting["measured_blocks"] == 2
    for line in ("window pass", "clean pass", "vae decode", "first frame", "needs --blocks 100"):
        assert line in said


def test_bad_input_is_one_sentence(tmp_path, files, capsys):
    config = files[:2]
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    sizeless = tmp_path / "sizeless.json"
    sizeless.write_text(json.dumps({"vae": {"base_dim": 4}}))
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps(TINY_DIT))
    random = [*config, "--random_weights", "--model"]
    for arguments, message in [
        ([*files, "--blocks", 0], "error: --blocks must be at least 1 and --warmup at least 0"),
        ([*files, "--warmup", -1], "--warmup at least 0"),
        ([*config, "--model", bare], "add that flag"),
        ([*random, "nowhere.json"], "nowhere.json does not exist"),
        ([*random, broken], "not readable as JSON"),
        ([*random, sizeless], "lacks dim"),
        ([*random, bare], "base_dim"),
        ([*files, "heigth=32"], "did you mean 'height'?"),
        ([*files, "--json", "no/such/out.json"], "does not exist"),
        ([*files, "--file", "a.avi"], ".mp4"),
        ([*files, "--buffer", 0], "--buffer"),
        ([*files, "--plot", "a.jpg"], ".png"),
        ([*files, "--compare", "compile=true"], "two variants"),
        ([*files, "--compare", "", "comple=true"], "did you mean 'compile'?"),
        ([*files, "--compare", "", "fast"], "key=value"),
        ([*files, "--compare", "", "compile=true", "--quality"], "speed alone"),
        ([*files, "schedule=full"], "cannot stream"),
        ([*files, "sequence_parallel=2"], "under torchrun"),  # was measured on one rank, unsaid
        ([*files, "vae_device=cuda:99"], "cuda:99"),  # was measured beside the generator, unsaid
        ([*config, "generator_name=Nothing"], "Nothing does not exist"),
    ]:
        assert run_main(main, list(map(str, arguments))) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


@pytest.mark.golden
def test_presets_are_the_published_sizes():
    for name in ("Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B"):
        preset = json.loads((ROOT / "configs" / "models" / f"{name}.json").read_text())
        short = name.removeprefix("Wan2.1-T2V-")
        recorded = load_json(f"manifest_wan2.1_t2v_{short}_dit")["config"]
        assert DiTConfig.from_dict(preset) == DiTConfig.from_dict(recorded)
        weights = load_json("manifest_wan2.1_vae")["keys"]
        assert preset["vae"]["base_dim"] == weights["encoder.conv1.weight"][0][0]


def test_blocks_and_passes_are_shown_while_it_runs(capsys, monkeypatch):
    """At 1.3B on a CPU it was silent for ten minutes."""
    dit = nn.Identity()
    monkeypatch.setattr(timing, "SECONDS_BETWEEN_LINES", 0)
    with timing.shown(dit, 3) as count:
        dit(torch.ones(1))
        count()
        dit(torch.ones(1))
    said = capsys.readouterr().err
    assert "0/3" in said
    assert "1/3" in said
    assert "pass 2" in said


# --- planted faults ------------------------------------------------------------------------------


@pytest.fixture
def pipe(tmp_path):
    return tiny_pipe(tmp_path)


def tiny_pipe(folder, *overrides):
    config = write_config(
        folder / "tiny.yaml",
        method="rolling_forcing",
        height=32,
        width=32,
        denoising_step_list=[1000, 500],
        device="cpu",
    )
    sizes = DiTConfig.from_dict(TINY_DIT | {"num_layers": 1})
    return random_pipeline(Setup.of(load_config(config, list(overrides)), sizes=sizes), 4)


def later(call, seconds):
    def called(*args, **kwargs):
        time.sleep(seconds)
        return call(*args, **kwargs)

    return called


@pytest.mark.slow
def test_a_slow_part_is_in_its_own_row(pipe, monkeypatch):
    """Delays that are longer than what the part takes by itself."""
    pipe.dit.register_forward_hook(later(lambda *_: None, 0.03))
    monkeypatch.setattr(StreamingDecoder, "decode", later(StreamingDecoder.decode, 0.09))
    monkeypatch.setattr(stream, "to_host", later(stream.to_host, 0.05))
    monkeypatch.setattr(BlockNoise, "__call__", later(BlockNoise.__call__, 0.04))
    measured, _ = run(pipe, Asked(skipped=1, blocks=1), last=lambda _: None)
    steady = SteadyState.of(pipe.setup.plan(pipe.setup.schedule(None)))
    found = figures(pipe, steady, measured)["seconds"]
    assert found["window_pass"] >= 0.03
    assert found["vae_decode"] >= 0.09
    assert found["copy_to_host"] >= 0.05
    assert found["other"] >= 0.04
    assert found["block_interval"] >= 0.21


def test_decoding_is_timed_on_the_device_that_decodes(pipe, monkeypatch):
    """Events of the generator's GPU say nothing of what another one does.

    What was still decoded when the last block in parts was there was in no part.
    """
    made = []
    monkeypatch.setattr(
        timing, "Stopwatch", lambda device: made.append(device) or Stopwatch(device)
    )
    monkeypatch.setattr(WanVAE, "device", torch.device("cpu:0"))
    monkeypatch.setattr(StreamingDecoder, "decode", later(StreamingDecoder.decode, 0.02))
    measured, _ = run(pipe, Asked(skipped=1, blocks=2), last=lambda _: None)
    assert made == [torch.device("cpu"), torch.device("cpu:0")]
    assert [len(measured.parts[name]) for name in ("window", "decode", "copy")] == [2, 2, 2]


@pytest.mark.slow
def test_a_file_that_cannot_keep_up_slows_its_blocks(pipe, monkeypatch, tmp_path):
    """The wait for the encoder was in no interval, so a slow one was as fast as none."""
    monkeypatch.setattr(VideoWriter, "write", later(VideoWriter.write, 0.1))
    asked = Asked(skipped=1, blocks=6, file=tmp_path / "a.mp4")
    filed = run(pipe, asked, last=lambda _: None)[0].filed
    assert len(filed.block) == 6
    assert sum(filed.block) + filed.ending >= 0.6
    assert sum(filed.block) >= 0.2  # three may wait for the end


@pytest.mark.parametrize(
    ("intervals", "buffer", "misses", "stalled"),
    [
        ([9.0, 1, 1, 1], 1, 0, 0),  # the wait for the first block is no miss
        ([9.0, 1, 2.5, 1], 1, 1, 1.5),  # one stall, after which all is late by it
        ([9.0, 1, 2.5, 1], 2, 1, 0.5),  # of which a block in reserve takes one second
        ([9.0, 1, 1.5, 0.5, 1.25], 1, 1, 0.5),  # what came early is there to be spent
    ],
)
def test_a_stall_is_a_missed_deadline(intervals, buffer, misses, stalled):
    found = Viewing.of(intervals, frames=16, fps=16, buffer=buffer)
    assert (found.misses, found.stall_seconds) == (misses, pytest.approx(stalled))


def test_a_p99_needs_a_hundred():
    assert p99([1.0] * 99) is None
    assert p99([*[1.0] * 98, 2.0, 3.0]) == pytest.approx(2.01)


def test_the_checksum_is_that_of_the_frames(tmp_path):
    """Of random weights too: these came from nowhere, so no two runs were alike."""
    asked = Asked(skipped=1, blocks=1)
    sums = [
        run(tiny_pipe(tmp_path, f"seed={seed}"), asked, last=lambda _: None)[0].checksum
        for seed in (0, 0, 1)
    ]
    assert sums[0] == sums[1] != sums[2]


@pytest.mark.slow
def test_ceilings_count_all_that_a_block_multiplies(pipe):
    """At one TFLOP/s a block takes as many seconds as it has TFLOP, edges of the network aside."""
    steady = SteadyState.of(pipe.setup.plan(pipe.setup.schedule(None)))
    sizes, tokens = pipe.dit.config, pipe.shape.tokens_per_frame
    parts = [part for own in steady.passes for part in own.parts]
    attended = {
        f"{part.frames * tokens} x {len(part.view.positions) * tokens} tokens": {"sdpa": 1.0}
        for part in parts
    }
    found = {
        "matmul_tflops": dict.fromkeys(("attention", "feed-forward up", "feed-forward down"), 1.0),
        "attention_tflops": attended,
        "conv3d_tflops": {"a": 0.5, "b": 1.0},
        "copy_to_host_gb_per_second": 2.0,
    }
    ideal = ideal_seconds(pipe, steady, found, frame_bytes=10**9)
    flops = sum(steady.flops(sizes, tokens, window=window) for window in (True, False))
    edges = sum(edge_flops(sizes, part.frames, tokens) for part in parts)
    assert ideal["dit"] == pytest.approx((flops - edges) / 1e12)
    assert ideal["vae"] == decoder_flops(pipe) / 1e12
    assert ideal["copy"] == 0.5
    assert ideal["end_to_end"] == ideal["dit"] + ideal["vae"] + 0.5


@pytest.mark.slow
def test_operations_of_the_decoder_are_those_that_were_counted():
    counted = yaml.safe_load((ROOT / "docs" / "counts.yaml").read_text())["vae"]["decode"]["tflop"]
    model = SimpleNamespace(config={"base_dim": 96})
    pipe = SimpleNamespace(
        vae=SimpleNamespace(model=model),
        layout=SimpleNamespace(block_frames=3),
        shape=SimpleNamespace(latent=(16, 60, 104)),
    )
    assert decoder_flops(pipe) / 1e12 == pytest.approx(counted, rel=0.01)


# --- variants in turns ---------------------------------------------------------------------------


def report_of(milliseconds, checksum="a"):
    return {
        "seconds": {"block_interval_p50": milliseconds / 1000},
        "fps": {"end_to_end": 1.0, "dit_only": 2.0},
        "start": {"cold": 1.0, "compile": 0.5},
        "peak_memory_bytes": 1,
        "checksum": checksum,
    }


def test_variants_are_measured_in_turns():
    """A machine that grows slower in one variant's time would be taken for its speed."""
    variants = [Variant.read(""), Variant.read("compile=true")]
    times, kept = iter([10, 5, 20, 10, 40, 16]), []
    result = in_turns(variants, 3, lambda v: report_of(next(times), v.name), kept.append)
    assert result["order"] == ["as it is", "compile=true"] * 3
    assert len(kept) == 6  # what is there is told after each run
    assert list(kept[0]["summary"]) == ["as it is"]
    second = result["summary"]["compile=true"]
    assert second["block_interval_p50"] == {"median": 0.01, "min": 0.005, "max": 0.016}
    assert second["faster_than_the_first"] == {"median": 2.0, "min": 2.0, "max": 2.5}
    assert not second["same_frames_as_the_first"]


def test_runs_of_one_variant_with_other_frames_are_told():
    """Only the first run of each was looked at."""
    sums = iter("aaab")
    variants = [Variant.read(""), Variant.read("compile=true")]
    summary = in_turns(variants, 2, lambda _: report_of(1, next(sums)), lambda _: None)["summary"]
    assert [found["same_frames_as_the_first"] for found in summary.values()] == [True, False]


def test_a_variant_runs_with_the_flags_of_all(files, tmp_path, capsys, monkeypatch):
    ran = []

    def runs(command, **_):
        ran.append(parse_command(benchmark.build_parser(), command[2:]))
        ran[-1].json.write_text(json.dumps(report_of(1)))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(benchmark.subprocess, "run", runs)
    other = write_config(tmp_path / "other.yaml", method="self_forcing", height=32, width=32)
    out = tmp_path / "out.json"
    given = [*files, "--blocks", 7, "--turns", 2, "--json", out, "seed=3"]
    given += ["--compare", "compile=true dtype=bfloat16", str(other)]
    assert run_main(main, list(map(str, given))) == 0
    assert [args.config_path for args in ran] == [str(files[1]), str(other)] * 2
    assert ran[0].overrides == ["seed=3", "compile=true", "dtype=bfloat16"]
    assert all(args.blocks == 7 and args.random_weights and not args.compare for args in ran)
    assert json.loads(out.read_text())["order"][:2] == ["compile=true dtype=bfloat16", str(other)]
    assert "1.000 x (1.000 to 1.000)" in capsys.readouterr().out


def test_the_commit_is_that_of_the_tree(tmp_path, monkeypatch):
    """With a mark if files were changed; that of a project around the tree is another's."""
    assert commit(tmp_path) is None
    said = {"--show-toplevel": str(tmp_path), "HEAD": "0123", "--porcelain": ""}
    monkeypatch.setattr(_machine, "_said", lambda *words: said[words[-1]])
    assert commit(tmp_path) == "0123"
    said["--porcelain"] = " M wan/dit.py"
    assert commit(tmp_path) == "0123-dirty"
    said["--show-toplevel"] = str(tmp_path.parent)
    assert commit(tmp_path) is None
