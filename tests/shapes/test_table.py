"""The page of the ablations, from results whose truth is known."""

import pytest

from shapes.stored import POINTS, Measured, read_run, write_run
from shapes.table import SPEED, UNKNOWN, compare, difference_table, make_page, read_results, verdict
from shapes.variants import EQUAL_SINK
from tests.shapes.tiny_results import write_core, write_row
from utils.errors import UserError
from utils.files import write_json

WINNING = {
    "rolling_forcing": 0.1,
    "self_forcing_sink": 0.5,
    "rolling_no_sink": 0.8,
    "self_forcing": 1.2,
}
EQUAL = {**WINNING, "rolling_forcing": 0.5}


def read(folder):
    return read_results(folder, lambda path, key, settings: True)


def rows(text):
    """Of every table the cells of each row, by the column's title."""
    tables, found = text.split("\n\n"), []
    for part in tables:
        lines = [line.strip("| ").split(" | ") for line in part.splitlines() if "|" in line]
        if len(lines) > 2:
            found.append({ln[0]: dict(zip(lines[0][1:], ln[1:], strict=True)) for ln in lines[2:]})
    return found


@pytest.mark.slow
def test_what_is_claimed_of_the_window_follows_from_the_results(tmp_path):
    """It is said in the first paragraph if the window does not help, as the rows then are."""
    write_core(tmp_path, **WINNING)
    said = make_page(read(tmp_path)).splitlines()[0]
    all_of_them = "tint, phase, direction, shade and size"
    drifts_less = f"rolling drifts less than block by block in {all_of_them}** (at 60x; less: tint"
    assert said.startswith(f"**Without a sink, {drifts_less} -0.40 [")
    assert f"**With a sink, {drifts_less} -0.40 [" in said
    write_core(tmp_path, **EQUAL)
    said = make_page(read(tmp_path)).splitlines()[0]
    lost = "**With a sink, rolling does not beat block by block here in what it keeps** (at 60x;"
    assert f"{lost} not distinguished: tint +0.00 [" in said
    write_row(tmp_path, "rolling_forcing", 0.5, motion=0.8)
    assert "beside it: motion -0.20 [" in verdict(read(tmp_path)).rpartition(lost)[2]
    write_row(tmp_path, "rolling_forcing", 0.1, seed_shift=0.3)
    assert "With a sink, rolling does not" in verdict(read(tmp_path)), "one training seed of three"


@pytest.mark.slow
def test_what_is_lost_within_the_first_clip_is_shown_and_not_compared(tmp_path):
    """Of every property by itself."""
    write_core(tmp_path, **WINNING)
    assert "²" not in make_page(read(tmp_path)).replace("marked ²", "")
    write_row(tmp_path, "rolling_forcing", 0.1, first={"tint": 0.2})
    results = read(tmp_path)
    text = make_page(results)
    assert "A property that a row does not keep within the first clip" in text
    assert text.count("| Rolling Forcing ² | 0.20 [") == 1
    said = verdict(results)
    kept = "phase, direction, shade and size"
    assert f"**With a sink, rolling drifts less than block by block in {kept}**" in said
    assert said.endswith(
        "Nothing is claimed of tint, with a sink: a row loses 0.15 or more within the first clip."
    )
    (*_, differences) = rows(difference_table(results))
    with_sink = differences["the rolling window, with a sink"]
    assert with_sink["tint"].startswith("-0.40 [")
    assert with_sink["tint"].endswith("] ²")
    assert with_sink["phase"].startswith("**-0.40** [")
    assert differences["the rolling window, without a sink"]["tint"].startswith("**-")
    write_row(tmp_path, "rolling_forcing", 0.1, first=0.2)
    assert "With a sink, nothing is compared: a row loses 0.15" in verdict(read(tmp_path))


def test_seeds_of_another_length_are_left_out(tmp_path, caplog):
    """Or a mean of one seed would pass for one of three."""
    write_row(tmp_path, "rolling_forcing", 0.1)
    (shorter := tmp_path / "shorter").mkdir()
    write_row(shorter, "rolling_forcing", 0.1, times=12)
    (shorter / "rolling_forcing-1-true.json").replace(tmp_path / "rolling_forcing-1-true.json")
    found = read(tmp_path).primary("rolling_forcing")
    assert len(found.seeds) == 1
    assert "rolling_forcing-1-true.json has another length" in caplog.text


def test_a_row_without_a_grating_is_marked_and_one_that_is_missing_named(tmp_path):
    write_core(tmp_path, **WINNING)
    assert "³" not in make_page(read(tmp_path))
    for seed in range(3):
        path = tmp_path / f"self_forcing-{seed}-true.json"
        run = read_run(path)
        for video in run["videos"]:
            video["curves"]["grating"] = [0.4] * len(video["curves"]["grating"])
        write_run(path, run["settings"], run["videos"])
    text = make_page(read(tmp_path))
    assert text.count("| Self Forcing ³ |") == 2, "of phase and direction"
    (*_, differences) = rows(text)
    bare = differences["the rolling window, without a sink"]
    assert bare["phase"].endswith("] ³"), (
        "where there is hardly a grating, nothing is claimed of it"
    )
    assert bare["tint"].startswith("**")
    assert "phase" not in verdict(read(tmp_path)).partition("**With a sink")[0]
    assert "Infinite-Forcing (V-sink) (`infinite_forcing`)" in text.rpartition("Not measured")[2]


def test_every_table_has_every_row_that_is_there(tmp_path):
    write_core(tmp_path, **WINNING)
    write_row(tmp_path, "infinite_forcing", 0.35, times=12, motion=0.5)
    results = read(tmp_path)
    *properties, beside, formulas, differences = rows(make_page(results))
    assert len(properties) == 5
    for table in properties:
        truth = table.pop("the true prefixes")
        assert {title for title, cell in truth.items() if cell != UNKNOWN} == {"variety, 10x"}
    for table in (*properties, beside, formulas):
        assert list(table) == [
            *("Rolling Forcing", "Rolling Forcing, no sink", "Self Forcing with a sink"),
            *("Self Forcing", "Infinite-Forcing (V-sink)¹"),
        ]
    tint = properties[0]["Infinite-Forcing (V-sink)¹"]
    assert tint["1x"] == "0.02 [0.02, 0.02]"
    assert tint["10x"].startswith("0.3")
    assert tint["20x"] == tint["60x"] == tint["from noise, 10x"] == UNKNOWN
    assert tint["gain, 10x"] == "0.50"
    assert beside["Self Forcing"]["steps"] == "300"
    assert beside["Self Forcing"]["motion, 60x"] == "1.00 [1.00, 1.00]"
    key = "Infinite-Forcing (V-sink), against Self Forcing with a sink"
    assert differences[key]["at"] == "10x"
    assert differences[key]["seeds"] == "1"
    assert differences[key]["motion"] == "**-0.50** [-0.50, -0.50]"
    assert differences[key]["path"] == "not distinguished, +0.00 [+0.00, +0.00]"


def test_a_fifth_of_the_drift_is_asked_of_the_intervals(tmp_path):
    write_core(tmp_path, **WINNING)
    said = make_page(read(tmp_path)).partition("### A fifth of the drift")[2]
    assert "minus a fifth of that of Self Forcing, at 60x: tint -0.14 [" in said
    assert "Motion: 1.00 [1.00, 1.00]." in said


@pytest.mark.slow
def test_rates_are_those_of_the_config_that_the_figures_are_of(tmp_path):
    write_core(tmp_path, **WINNING)
    runs = {key: read_run(tmp_path / f"{key}-0-true.json") for key in WINNING}
    of = {key: run["settings"]["config_hash"] for key, run in runs.items()}
    of["self_forcing"] = "another"
    rates = {key: [20.0, 30.0, 25.0] for key in of}
    write_json(tmp_path / SPEED, {"of": of, "device": "cpu", "frames_per_second": rates})
    beside = rows(make_page(read(tmp_path)))[5]
    assert beside["Rolling Forcing"]["frames/s"] == "25 [20, 30]"
    assert beside["Self Forcing"]["frames/s"] == UNKNOWN


def test_a_difference_below_three_times_the_meters_error_is_none(tmp_path):
    """However sure: the same shift in every video is above the error of the phase alone."""
    write_core(tmp_path, **{**WINNING, "rolling_forcing": 0.44})
    found = compare(read(tmp_path), EQUAL_SINK[1])
    assert found.differences["tint"].leaves_out_zero()
    assert found.less(["tint", "phase"]) == ["phase"]


def test_training_seeds_count_from_the_first_without_a_gap(tmp_path):
    write_row(tmp_path, "self_forcing", 0.5)
    (tmp_path / "self_forcing-1-true.json").unlink()
    results = read(tmp_path)
    assert len(results.measured["self_forcing", "true"].seeds) == 1
    assert "Self Forcing¹" in make_page(results)
    write_row(tmp_path, "rolling_forcing", 0.1)
    for seed in (1, 2):
        (tmp_path / f"rolling_forcing-{seed}-noise.json").unlink(missing_ok=True)
    write_row(tmp_path / "more", "rolling_forcing", 0.1, seeds=1, start="noise", times=12)
    (tmp_path / "more" / "rolling_forcing-0-noise.json").rename(
        tmp_path / "rolling_forcing-0-noise.json"
    )
    text = make_page(read(tmp_path))
    assert "| Rolling Forcing | 0.02" in text
    cell = next(line for line in text.splitlines() if line.startswith("| Rolling Forcing | 0.02"))
    assert cell.endswith("]¹ |"), "from noise, there is one training seed"
    assert "Without a sink, nothing is known yet: a row is missing." in verdict(results)
    assert read_results(tmp_path, lambda path, key, settings: False) is None
    (tmp_path / SPEED).write_text("{")
    with pytest.raises(UserError, match=r"speed.json holds no frames per second"):
        read(tmp_path)
    for content in ("{}", '{"settings": {}, "videos": [{}]}'):
        (tmp_path / "self_forcing-0-true.json").write_text(content)
        with pytest.raises(UserError, match=r"self_forcing-0-true.json holds no results"):
            read(tmp_path)


def test_values_lie_where_their_scene_and_point_are(tmp_path):
    write_row(tmp_path, "self_forcing", 0.5, times=12)
    path = tmp_path / "self_forcing-0-true.json"
    videos = read_run(path)["videos"]
    seen = Measured([[videos[2]], videos])
    values = seen.curve("tint")
    assert values.shape == (2, 8, len(POINTS))
    assert values[0, 2, 1] == values[1, 2, 1] == videos[2]["kept"]["tint"]["drift"][1]
    assert seen.reaches(10)
    assert not seen.reaches(20)
    assert path.stat().st_size < 12_000, "eight videos of a minute"
