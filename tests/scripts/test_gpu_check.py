"""The check of a GPU machine, rehearsed on a CPU at tiny size."""

import json
import time
from pathlib import Path

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
    interval = {"seconds": {"block_interval": 0.5}}
    done = gpu_check.Outcome("eager 1", "done", 1.0, interval)
    last = gpu_check.long_run(args, [done], left=100)
    assert last is not None
    for stage in [*gpu_check.stages(args), last]:
        if stage.command[0] in parsers:
            found = parse_command(parsers[stage.command[0]], stage.command[1:])
            assert "seed=1" in found.overrides
    assert parse_command(parsers["scripts/benchmark.py"], last.command[1:]).blocks == 100
    assert gpu_check.long_run(args, [done], left=1) is None
    assert gpu_check.long_run(args, [], left=100) is None


FIGURES = {
    "fps": {"dit_only": 2.5, "end_to_end": 2},
    "seconds": {"block_interval": 9, "block_interval_p99": 9},
    "peak_memory_bytes": 1,
}
WRITES = f"import json, sys; json.dump({FIGURES}, open(sys.argv[-1], 'w'))"


def test_a_stage_takes_no_time_of_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Results are there after each stage, whatever became of it."""
    args = parse_command(gpu_check.build_parser(), ["--out", str(tmp_path), "--minutes", "0.1"])
    planned = [
        Stage("eager 1", 5, ("-c", WRITES)),
        Stage("fails", 5, ("-c", "raise SystemExit(3)")),
        Stage("hangs", 0.3, ("-c", "import time; time.sleep(60)"), json=False),
    ]
    begin = time.monotonic()
    assert gpu_check.check(args, planned) == 1
    assert time.monotonic() - begin < 10
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [one["state"] for one in results] == ["done", "failed", "out of time"]
    assert results[0]["figures"]["fps"]["end_to_end"] == 2
    assert "2.50 FPS DiT" in capsys.readouterr().out
    assert (tmp_path / "gpu_check.png").is_file()
