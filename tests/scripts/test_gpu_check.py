"""The check of a GPU machine, rehearsed on a CPU at tiny size."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from scripts import _gpu_stages as gpu_stages
from scripts import benchmark, gpu_check
from scripts.gpu_check import Stage
from tests.tiny_pipeline import TINY_DIT, write_config
from utils.cli import parse_command, run_main


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    config = write_config(
        tmp_path / "config.yaml",
        method="rolling_forcing",
        height=32,
        width=32,
        denoising_step_list=[1000, 500],
    )
    preset = tmp_path / "preset.json"
    preset.write_text(json.dumps({**TINY_DIT, "num_layers": 1, "vae": {"base_dim": 4}}))
    return ["--config_path", str(config), "--model", str(preset), "--device", "cpu"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", gpu_stages.STAGES)
def test_a_stage_gives_figures(tmp_path: Path, tiny: list[str], stage: str) -> None:
    file = tmp_path / "out.json"
    assert run_main(gpu_stages.main, [stage, *tiny, "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert figures
    if "seconds" in figures:
        assert min(figures["seconds"].values()) > 0


def test_commands_of_the_stages_are_understood(tmp_path: Path, tiny: list[str]) -> None:
    given = ["--out", str(tmp_path), *tiny, "seed=1"]
    args = parse_command(gpu_check.build_parser(), given)
    parsers = {
        "scripts/benchmark.py": benchmark.build_parser(),
        "scripts/_gpu_stages.py": gpu_stages.build_parser(),
    }
    last = gpu_check.long_run(args, left=100)
    assert last is not None
    planned = gpu_check.stages(args)
    assert sum(stage.limit for stage in planned) <= 600
    for stage in [*planned, last]:
        if stage.command[0] in parsers:
            found = parse_command(parsers[stage.command[0]], stage.command[1:])
            assert "seed=1" in found.overrides
            if stage.name == "training":
                benchmark.check(found)
            if stage.name == "variants":
                assert tuple(found.compare) == gpu_check.VARIANTS
    minutes = parse_command(parsers["scripts/benchmark.py"], last.command[1:]).long
    assert 0 < 60 * minutes < 50
    assert gpu_check.long_run(args, left=1) is None


FIGURES = {
    "fps": {"dit_only": 2.5, "end_to_end": 2},
    "long": {"blocks": 90, "against_the_first": 1.25},
    "peak_memory_bytes": 1,
}
SPREAD = {"median": 2, "min": 1, "max": 3}
SUMMARY = {
    "summary": {
        "compile=true": {
            **dict.fromkeys(("block_interval_p50", "fps_end_to_end", "fps_dit_only"), SPREAD),
            **dict.fromkeys(("faster_than_the_first", "start_seconds", "compile_seconds"), SPREAD),
            "peak_memory_bytes": 1,
            "same_frames_as_the_first": True,
        }
    }
}
COUNTED = {"update": {"tflop": 8, "predicted_seconds": 4, "peak_memory_bytes": 2**30}}
MEASURED = {
    "update": {
        "seconds": {"median": 2},
        "tflop": 8,
        "tflops_per_second": 4,
        "peak_memory_bytes": 2**31,
    }
}


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"predicted": {"updates": {"critic": COUNTED}}}, "critic counted: 8 TFLOP, 1.00 GiB"),
        ({"updates": {"critic": MEASURED}, "step": {}}, "critic 2.00 s (4 TFLOP/s), 2.00 GiB"),
    ],
)
def test_a_training_is_told(figures: dict[str, Any], said: str) -> None:
    """Counted alone without a GPU; measured, where time was over before it was counted, too."""
    assert gpu_check.told(figures) == [said]


HANGS = f"import json, sys, time; json.dump({SUMMARY}, open(sys.argv[-1], 'w')); time.sleep(60)"
WRITES = f"import json, sys; json.dump({FIGURES}, open(sys.argv[-1], 'w'))"


@pytest.mark.slow
def test_a_stage_takes_no_time_of_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Results are there after each stage, whatever became of it."""
    args = parse_command(gpu_check.build_parser(), ["--out", str(tmp_path), "--minutes", "0.1"])
    planned = [
        Stage("long", 5, ("-c", WRITES)),
        Stage("fails", 5, ("-c", "raise SystemExit(3)")),
        Stage("variants", 1, ("-c", HANGS)),
    ]
    begin = time.monotonic()
    assert gpu_check.check(args, planned) == 1
    assert time.monotonic() - begin < 10
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [one["state"] for one in results] == ["done", "failed", "out of time"]
    assert results[0]["figures"]["fps"]["end_to_end"] == 2
    variants = results[2]["figures"]["summary"]["compile=true"]
    assert variants["fps_dit_only"]["median"] == 2  # what was there when its time was over
    said = capsys.readouterr().out
    assert "2.50 FPS DiT" in said
    assert "block 90 takes 1.250 of the first" in said
    assert "compile=true: 2000.00 ms a block" in said
    assert (tmp_path / "gpu_check.png").is_file()
