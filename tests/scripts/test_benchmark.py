"""The figures of the script must agree with each other."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.timing import BlockBar, Stopwatch
from scripts.benchmark import main
from tests.golden_cases import load_json
from tests.tiny_pipeline import TINY_DIT, write_config
from utils.cli import run_main
from wan.dit import DiTConfig
from wan.flops import forward_flops

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


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "alone"])
@pytest.mark.parametrize("method", ["rolling_forcing", "self_forcing"])
def test_figures_agree_with_each_other(tmp_path, files, capsys, method, merged):
    out = tmp_path / "out.json"
    given = ["--json", out, "--blocks", 4, "--warmup", 1, f"method={method}"]
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
    assert passes + seconds["vae_decode"] <= seconds["block_interval"]
    assert seconds["block_interval_p50"] <= seconds["block_interval_p99"]
    assert min(seconds["first_frame"].values()) > 0
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
    assert setting["measured_blocks"] == 4
    for line in ("window pass", "clean pass", "vae decode", "first frame", "end to end"):
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
        ([*files, "schedule=full"], "cannot stream"),
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


def test_blocks_and_passes_are_shown_while_it_runs(capsys):
    """At 1.3B on a CPU it was silent for ten minutes."""
    watch = Stopwatch(torch.device("cpu"))
    with BlockBar(watch, 3) as bar:
        bar.mininterval = 0
        watch.start("window")
        watch.stop()
        bar.update()
    said = capsys.readouterr().err
    assert "0/3" in said
    assert "1/3" in said
    assert "pass 1" in said
