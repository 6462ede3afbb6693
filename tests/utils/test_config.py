"""Experiment files: ours, published ones, and every way to get one wrong."""

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.golden_cases import load_json
from utils.config import (
    FREE_KEYS,
    INERT_KEYS,
    INERT_SUFFIX,
    METHOD_DEFAULTS,
    ROOT,
    ROUNDING_KEYS,
    VIDEO_KEYS,
    Config,
    check_training,
    find_file,
    fingerprint,
    load_config,
    save_config,
    to_dict,
)
from utils.config_docs import DEFAULTS, PAGE, config_page, default_yaml
from utils.config_schema import declared
from utils.errors import UserError

PARTS = {DEFAULTS, *(ROOT / "configs").rglob("base.yaml")}  # no experiments by themselves
OURS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path not in PARTS)
STEPS = {"denoising_step_list": [1000, 500]}  # few enough levels for a rolling window
PUBLISHED: dict[str, Any] = load_json("published_configs")


def write(path: Path, **values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return path


def load(tmp_path: Path, *overrides: str, **values: Any) -> Config:
    values = {"method": "rolling_forcing", **values}
    return load_config(write(tmp_path / "experiment.yaml", **values), overrides)


def refused(tmp_path: Path, sentence: str, *overrides: str, **values: Any) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        load(tmp_path, *overrides, **values)
    assert "\n" not in str(caught.value)


def test_what_keys_decide() -> None:
    """Written out once more: what was a list by position took new keys in without a word."""
    assert {
        *("schedule", "sink_position", "clean_pass_sees_sink", "max_attention_frames"),
        *("num_frame_per_block", "independent_first_frame", "context_noise", "model_kwargs"),
        *("denoising_step_list", "warp_denoising_step", "timestep_shift", "step_rule", "sampler"),
        *("sampling_steps", "sampling_guidance_scale", "negative_prompt", "generator_name"),
        *("text_embeddings", "height", "width", "fps", "seed", "i2v", "dtype", "vae_dtype"),
        *("linear_dtype", "kv_cache_dtype", "sink_ema", "window_attention"),
    } == VIDEO_KEYS
    assert {
        *("max_steps", "log_iters", "keep_checkpoints", "resume", "compile", "device", "dtype"),
        *("sample_every", "sample_prompts", "sample_latent_frames", "attention_backend"),
        *("batch_size", "global_batch_size", "total_batch_size", "gradient_accumulation_steps"),
        *("recipe_batch_size", "sharding_strategy", "sharding", "hybrid_shard_size", "method"),
        *(
            "gradient_checkpointing",
            "selective_checkpointing",
            "text_encoder_device",
            "text_embeddings",
            "num_samples",
        ),
        *("heldout_data_path", "heldout_every", "heldout_videos", "model_root", "i2v"),
        *("wandb_host", "wandb_key", "wandb_entity", "wandb_project"),
        *("step_rule", "sampler", "sampling_steps", "sampling_guidance_scale"),
        *("vae_dtype", "vae_device", "merge_clean_pass", "replayed_backward", "sequence_parallel"),
        "reshard_after_forward",
        *("keep_exports", "export_safetensors", "sample_weights", "metrics_every"),
        *("on_nonfinite", "max_skips_in_a_row", "max_skips"),
        *("collective_timeout", "first_step_timeout"),
        *("linear_dtype", "kv_cache_dtype", "vae_frugal"),
    } == FREE_KEYS
    assert {"merge_clean_pass", "vae_frugal"} == ROUNDING_KEYS


def test_what_is_written_down_is_what_is_declared() -> None:
    """After a change of `utils/config_schema.py`: make docs."""
    assert DEFAULTS.read_text(encoding="utf-8") == default_yaml()
    assert PAGE.read_text(encoding="utf-8") == config_page()
    values = yaml.safe_load(DEFAULTS.read_text(encoding="utf-8"))
    assert values == to_dict(Config())
    assert list(values) == list(declared(Config))


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(ROOT)))
def test_our_files_are_valid(path: Path) -> None:
    load_config(path)


def is_inert(key: str, value: Any) -> bool:
    """By the documented list of keys without effect, written out once more."""
    listed = "gc_interval causal ckpt_step prompt_name prompt_path eval_first_n num_frames"
    if key in listed.split() or key == "discriminator_lr_multiplier":
        return True
    return key.endswith("_fsdp_wrap_strategy") or (key.startswith("wandb_") and value.isupper())


def expected_method(name: str) -> str:
    if name.startswith("rolling_forcing"):
        return "rolling_forcing"
    return "infinite_forcing" if "vsink" in name else "self_forcing"


@pytest.mark.golden
@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("layer", ["file", "both"])
def test_published_files_mean_what_they_say(name: str, layer: str, tmp_path: Path) -> None:
    """Every key of a published file lands in the configuration with its value, or is inert."""
    values = dict(PUBLISHED[name]["file"])
    if layer == "both":
        values = PUBLISHED[name]["default_config"] | values
    config = load_config(write(tmp_path / f"{name}.yaml", **values))
    assert config.method == expected_method(name)
    found = to_dict(config)
    live = {key: value for key, value in values.items() if not is_inert(key, value)}
    assert len(live) > 20
    for key, value in live.items():
        if key == "model_kwargs":
            assert {k: found[key][k] for k in value} == value
        else:
            assert found[key] == value, key


@pytest.mark.golden
@pytest.mark.parametrize("name", PUBLISHED)
def test_methods_bring_the_published_defaults(name: str, tmp_path: Path) -> None:
    """Without the publication's own default file, its number of training frames holds."""
    config = load_config(write(tmp_path / f"{name}.yaml", **PUBLISHED[name]["file"]))
    assert config.num_training_frames == PUBLISHED[name]["default_config"]["num_training_frames"]


@pytest.mark.golden
def test_what_is_inert_is_said_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, published in PUBLISHED.items():
        caplog.clear()
        values = published["default_config"] | published["file"]
        with caplog.at_level(logging.INFO, logger="utils.config"):
            load_config(write(tmp_path / f"{name}.yaml", **values))
        lines = [m for m in caplog.messages if "without effect here" in m]
        assert len(lines) == 1
        said = lines[0].split(": ")[-1].split(", ")
        assert said == sorted(key for key, value in values.items() if is_inert(key, value))
        assert sum("taken from the file's name" in message for message in caplog.messages) == 1


def test_inert_keys_are_those_documented() -> None:
    assert all(is_inert(key, "") for key in INERT_KEYS)
    assert is_inert(f"real_score{INERT_SUFFIX}", "size")


def test_a_real_wandb_account_is_not_a_placeholder(tmp_path: Path) -> None:
    config = load(tmp_path, wandb_host="WANDB_HOST", wandb_entity="me", wandb_project="v", **STEPS)
    assert (config.wandb_host, config.wandb_entity, config.wandb_project) == (None, "me", "v")


# --- methods ------------------------------------------------------------------------------------


def test_foreign_name_asks_for_the_method(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", denoising_step_list=[1000, 500])
    with pytest.raises(UserError, match=r"mine\.yaml does not say which method it is: add method="):
        load_config(path)
    assert load_config(path, ["method=self_forcing"]).schedule == "block"


def test_named_method_beats_the_files_name(tmp_path: Path) -> None:
    path = write(tmp_path / "self_forcing_mine.yaml", method="rolling_forcing", **STEPS)
    assert load_config(path).schedule == "rolling"


def test_unknown_method(tmp_path: Path) -> None:
    sentence = "method=zigzag is unknown; choose one of rolling_forcing, "
    refused(tmp_path, sentence, method="zigzag")


def test_schedule_alone_is_enough(tmp_path: Path) -> None:
    """A model that is no method of the three (a bidirectional one) says its schedule."""
    path = write(tmp_path / "teacher.yaml", schedule="full", sampling_steps=7)
    config = load_config(path)
    assert (config.method, config.schedule, config.num_levels) == (None, "full", 7)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("rolling_forcing", ("rolling", "contiguous", False, 27, 0.5, 3)),
        ("self_forcing", ("block", "original", True, 21, 0.0, 0)),
        ("infinite_forcing", ("block", "contiguous", True, 21, 0.0, 1)),
    ],
)
def test_method_defaults(tmp_path: Path, method: str, expected: tuple) -> None:
    steps = [1000, 800, 600, 400, 200]
    config = load(tmp_path, method=method, denoising_step_list=steps)
    assert (
        config.schedule,
        config.sink_position,
        config.clean_pass_sees_sink,
        config.num_training_frames,
        config.rolling_probability,
        config.model_kwargs.sink_size,
    ) == expected
    assert method in METHOD_DEFAULTS


def test_every_part_of_a_method_can_be_overridden(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "schedule=block",
        "sink_position=original",
        "clean_pass_sees_sink=true",
        "num_training_frames=33",
        "rolling_probability=0.25",
        "model_kwargs.sink_size=6",
    )
    assert (config.method, config.schedule, config.sink_position) == (
        "rolling_forcing",
        "block",
        "original",
    )
    assert config.clean_pass_sees_sink
    assert (config.num_training_frames, config.rolling_probability) == (33, 0.25)
    assert config.model_kwargs.sink_size == 6


# --- derived values -----------------------------------------------------------------------------


def test_derived_values(tmp_path: Path) -> None:
    config = load(tmp_path, "schedule=block", timestep_shift=4.0, sampling_steps=9)
    assert not config.distilled
    assert (config.num_levels, config.generator_shift, config.attention_frames) == (9, 4.0, 21)
    config = load(
        tmp_path,
        "schedule=block",
        denoising_step_list=[1000, 500],
        model_kwargs={"timestep_shift": 8.0, "local_attn_size": 12},
    )
    assert config.distilled
    assert (config.num_levels, config.generator_shift, config.attention_frames) == (2, 8.0, 12)


# --- layers -------------------------------------------------------------------------------------


def test_overrides_win_and_keep_their_types(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "seed=5",
        "lr=1e-5",
        "denoising_step_list=[1000, 700, 300]",
        "model_kwargs.sink_size=6",
        "data_path=null",
        "negative_prompt='a, b=c'",
        seed=1,
        data_path="prompts.txt",
        **STEPS,
    )
    assert (config.seed, config.lr, config.data_path) == (5, 1e-5, None)
    assert config.denoising_step_list == [1000, 700, 300]
    assert config.model_kwargs.sink_size == 6
    assert config.negative_prompt == "a, b=c"


def test_bases_are_layers_below(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", method="rolling_forcing", seed=1, fps=8, lr=1.0, **STEPS)
    write(tmp_path / "sub" / "middle.yaml", base="../base.yaml", seed=2, fps=9)
    path = write(tmp_path / "sub" / "top.yaml", base="middle.yaml", seed=3)
    config = load_config(path, ["lr=0.5"])
    assert (config.seed, config.fps, config.lr) == (3, 9, 0.5)
    assert config.schedule == "rolling"


def test_changing_the_method_changes_its_defaults_below_the_base(tmp_path: Path) -> None:
    """What the base says itself still holds; what it had from its method does not."""
    write(tmp_path / "base.yaml", method="rolling_forcing", num_training_frames=30, **STEPS)
    path = write(tmp_path / "top.yaml", base="base.yaml", method="self_forcing")
    config = load_config(path)
    assert (config.schedule, config.model_kwargs.sink_size) == ("block", 0)
    assert config.num_training_frames == 30


def test_circle_of_bases(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", base="b.yaml")
    write(tmp_path / "b.yaml", base="a.yaml")
    with pytest.raises(UserError, match=r"a\.yaml is its own base; remove the circle"):
        load_config(tmp_path / "a.yaml")


def test_missing_base(tmp_path: Path) -> None:
    refused(tmp_path, r"names base: gone\.yaml, which does not exist", base="gone.yaml")


def test_resolution_comes_from_the_shape_of_the_same_layer(tmp_path: Path) -> None:
    config = load(tmp_path, image_or_video_shape=[1, 21, 16, 30, 52], **STEPS)
    assert (config.height, config.width) == (240, 416)


def test_resolution_of_a_higher_layer_wins(tmp_path: Path) -> None:
    config = load(
        tmp_path, "height=64", "width=96", image_or_video_shape=[2, 9, 16, 30, 52], **STEPS
    )
    assert (config.height, config.width) == (64, 96)
    assert config.image_or_video_shape == [2, 9, 16, 8, 12]


def test_height_and_width_give_the_shape(tmp_path: Path) -> None:
    assert load(tmp_path, height=64, width=96, **STEPS).image_or_video_shape[-2:] == [8, 12]


def test_contradicting_resolution(tmp_path: Path) -> None:
    refused(
        tmp_path,
        "height x width is 480x832 but image_or_video_shape means 240x416",
        height=480,
        width=832,
        image_or_video_shape=[1, 21, 16, 30, 52],
    )


@pytest.mark.parametrize("published", PUBLISHED)
def test_saved_configuration_loads_again(published: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"{published}.yaml", **PUBLISHED[published]["file"])
    config = load_config(path, ["height=64", "width=96", "seed=11"])
    save_config(config, tmp_path / "resolved.yaml")
    again = load_config(tmp_path / "resolved.yaml")
    assert again == config
    assert fingerprint(to_dict(again)) == fingerprint(to_dict(config))


def test_fingerprint_tells_configurations_apart(tmp_path: Path) -> None:
    one, other = (to_dict(load(tmp_path, f"lr={lr}", **STEPS)) for lr in ("1e-6", "2e-6"))
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(dict(reversed(one.items()))) == fingerprint(one)


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("num_frames_per_block", "num_frame_per_block"),
        ("heigth", "height"),
        ("model_kwargs.sink_sizes", "model_kwargs.sink_size"),
        ("sink_size", "model_kwargs.sink_size"),
        ("optimizer_beta", None),
    ],
)
def test_unknown_key_names_the_nearest(tmp_path: Path, key: str, nearest: str | None) -> None:
    """A suggestion that is far-fetched misleads: there is none then."""
    hint = rf" \(did you mean '{nearest}'\?\)" if nearest else ""
    sentence = f"^experiment.yaml: unknown key '{key}'{hint}; docs/config.md lists all keys$"
    refused(tmp_path, sentence, f"{key}=1")


def test_all_unknown_keys_are_named_at_once(tmp_path: Path) -> None:
    """They were named one at a time, a start for each."""
    write(tmp_path / "base.yaml", heigth=3)
    sentence = (
        r"^base\.yaml: unknown key 'heigth' \(did you mean 'height'\?\); experiment\.yaml: "
        r"unknown keys 'model_kwargs\.a', 'zzz', 'qqq'; docs"
    )
    refused(tmp_path, sentence, "qqq=1", base="base.yaml", model_kwargs={"a": 1}, zzz=2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", "abc"),
        ("lr", "fast"),
        ("i2v", "perhaps"),
        ("schedule", "zigzag"),
        ("dtype", "float8"),
        ("sampler", "heun"),
        ("denoising_step_list", 1000),
        ("denoising_step_list", ["a"]),
        ("height", None),
        ("height", [480]),
        ("model_kwargs", 3),
        ("model_kwargs", None),
        ("lora", 8),
        ("lora", {"targets": "q"}),
        ("attention_backend", "flash9"),
        ("image_or_video_shape", [1, 21, 16, None, 8]),
        ("image_or_video_shape", [1, 21, 16, "a", 8]),
        ("image_or_video_shape", {"frames": 3}),
        ("denoising_step_list", [[1000], 500]),
        ("lr", 10**400),
        ("method", ["rolling_forcing"]),
    ],
)
def test_wrong_types(tmp_path: Path, key: str, value: Any) -> None:
    refused(tmp_path, key, **{key: value})


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("height", 100, "height must be a multiple of 16"),
        ("height", 0, "height must be a multiple of 16"),
        ("width", -16, "width must be a multiple of 16"),
        ("num_frame_per_block", 0, "num_frame_per_block must be at least 1"),
        ("max_attention_frames", 0, "max_attention_frames must be at least 1"),
        ("model_kwargs", {"sink_size": -1}, "model_kwargs.sink_size must be at least 0"),
        ("model_kwargs", {"local_attn_size": 0}, "local_attn_size must be -1 or at least 1"),
        ("model_kwargs", {"local_attn_size": -2}, "local_attn_size must be -1 or at least 1"),
        ("model_kwargs", {"timestep_shift": 0.0}, "timestep_shift must be above 0"),
        ("timestep_shift", -1.0, "timestep_shift must be above 0"),
        ("lr", -1.0, "lr must be at least 0"),
        ("max_grad_norm", 0.0, "max_grad_norm must be above 0"),
        ("sample_every", -1, "sample_every must be at least 0"),
        ("heldout_every", -1, "heldout_every must be at least 0"),
        ("heldout_every", 5, "heldout_every needs data to measure: set heldout_data_path"),
        ("heldout_videos", 0, "heldout_videos must be at least 1"),
        ("lora", {"rank": 0, "alpha": 4, "targets": ["q"]}, "lora.rank must be at least 1"),
        ("fps", 0, "fps must be at least 1"),
        ("num_samples", 0, "num_samples must be at least 1"),
        ("sampling_steps", 0, "sampling_steps must be at least 1"),
        ("clean_context_noise", 5, "needs teacher_forcing, window_forcing or motion_guard"),
        ("sink_ema", 1.5, "sink_ema must be at least 0 and at most 1"),
        ("clean_context_noise", -50, "clean_context_noise must be at least 0"),
        # These were let through, or ended in tracebacks.
        ("timestep_shift", "inf", "timestep_shift must be a finite number, not inf"),
        ("fps", 10**6, "fps must be at least 1 and at most 1000"),
        ("lr_critic", "inf", "lr_critic must be a finite number"),
        ("sampling_guidance_scale", "nan", "sampling_guidance_scale must be a finite number"),
        ("seed", "???", r"line \d+: '\?\?\?' stands for a value that is missing"),
        ("seed", -1, "seed must be at least 0"),
        ("lr_warmup_steps", -1, "lr_warmup_steps must be at least 0"),
        ("beta1", 1.0, "beta1 must be at least 0 and below 1"),
        ("beta2_critic", -0.1, "beta2_critic must be at least 0 and below 1"),
        ("weight_decay", -0.01, "weight_decay must be at least 0"),
        ("sample_latent_frames", 0, "sample_latent_frames must be at least 1"),
        ("width", 10**12, "width must be a multiple of 16, at least 16 and at most 16384"),
        ("image_or_video_shape", [1, 10**12, 16, 60, 104], "each value of image_or_video_shape"),
        ("image_or_video_shape", [1, 21, 16, 60], "image_or_video_shape must hold 5 values, not 4"),
        ("num_training_frames", 0, "num_training_frames must be at least 1"),
        ("vae", {"dim_mult": [1, 2]}, "vae.dim_mult must hold 4 values"),
        ("vae", {"kl_weight": float("nan")}, "vae.kl_weight must be a finite number"),
        ("lora", {"targets": []}, "lora.targets must hold 1 to 100 values"),
        ("total_batch_size", 0, "total_batch_size must be at least 1"),
        ("hybrid_shard_size", 0, "hybrid_shard_size must be at least 1"),
        ("text_encoder_device", "tpu", "text_encoder_device must be auto, cpu, cuda or cuda:N"),
        ("base", 3, "names base: 3, which is no name of a file"),
        ("base", ["a.yaml"], "which is no name of a file"),
        ("context_noise", 1001, "context_noise must be at least 0 and at most 1000, not 1001"),
        ("denoising_step_list", [], "denoising_step_list must hold 1 to 1000 values, not 0"),
        ("denoising_step_list", [1001], "each value of denoising_step_list must be above 0 and at"),
        ("denoising_step_list", [1000, 0], "each value of denoising_step_list must be above 0"),
        ("denoising_step_list", [500, 1000], "must fall from step to step"),
        ("denoising_step_list", [500, 500], "must fall from step to step"),
        ("denoising_step_list", [1000 - i for i in range(7)], "too few: a window has 21 frames"),
        ("max_attention_frames", 8, "8 frames in one attention are too few"),
        ("model_kwargs", {"sink_size": 19}, "raise max_attention_frames"),
    ],
)
def test_impossible_values(tmp_path: Path, key: str, value: Any, sentence: str) -> None:
    refused(tmp_path, sentence, **STEPS | {key: value})


@pytest.mark.parametrize("other", ["teacher_forcing", "diffusion_forcing"])
def test_window_forcing_stands_alone(tmp_path: Path, other: str) -> None:
    refused(tmp_path, "window_forcing has its own windows", window_forcing=True, **{other: True})


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"num_training_frames": 1},
            "num_training_frames=1 is too few: .* 21 scored frames .* 21$",
        ),
        (
            {"num_training_frames": 21, "num_frame_per_block": 2},
            "num_training_frames=21 is too few: .* are 22$",
        ),
        (
            {"num_training_frames": 22, "num_frame_per_block": 5, "independent_first_frame": True},
            None,
        ),
        (
            {"num_training_frames": 21, "num_frame_per_block": 3, "independent_first_frame": True},
            "num_training_frames=21 is too few: .* are 22$",
        ),
        ({"step_rule": "ode"}, "rollouts that renoise: set step_rule=renoise or null"),
        ({"step_rule": "ode", "num_training_frames": 1, "trainer": "ode"}, None),
        ({"lr_schedule": "cosine"}, "falls to zero at max_steps: set it"),
        ({"lr_schedule": "cosine", "max_steps": 9}, None),
        ({"random_init": True, "generator_ckpt": "a.pt"}, "not read with random_init"),
        ({"trainer": "vae", "generator_ckpt": "a.pt"}, "not read with trainer: vae"),
        ({"trainer": "vae", "lora": {"rank": 4}}, "a VAE has no adapters"),
        (
            {"method": "self_forcing", "max_attention_frames": 4, "rolling_probability": 0.5},
            "4 frames in one attention are too few: a window has 6",
        ),
        ({"kv_cache_dtype": "float8"}, "a training needs auto for both"),
        ({"linear_dtype": "float8", "trainer": "diffusion"}, "a training needs auto for both"),
    ],
)
def test_what_a_training_cannot_do(
    tmp_path: Path, values: dict[str, Any], sentence: str | None
) -> None:
    """Rollouts were longer than num_training_frames, and step_rule=ode was passed over."""
    config = load(tmp_path, **STEPS, **values)
    if sentence is None:
        check_training(config)
    else:
        with pytest.raises(UserError, match=sentence):
            check_training(config)


def test_one_key_of_lora_is_enough(tmp_path: Path) -> None:
    """`lora.rank=8` alone ended in a traceback; the others have their defaults."""
    lora = load(tmp_path, "lora.rank=8", **STEPS).lora
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.targets[:2]) == (8, 64, ["q", "k"])
    assert load(tmp_path, "lora.rank=8", "lora=null", **STEPS).lora is None
    refused(tmp_path, "lora.rank must be at least 1", "lora.rank=0", **STEPS)


@pytest.mark.parametrize("override", ["seed", "--seed=1", "=1", ".seed=1", "vae..l1_weight=1"])
def test_overrides_need_a_key_and_a_value(tmp_path: Path, override: str) -> None:
    refused(tmp_path, "is not an override; write key=value", override)


def test_unreadable_override(tmp_path: Path) -> None:
    refused(tmp_path, "the override lr=\\[1 is not readable: expected ',' or ']'", "lr=[1")
    refused(tmp_path, "the override .* is not replaced by anything", "data_path=${HOME}")
    refused(tmp_path, "the key '1' is no text", "vae={1: 2}")
    refused(tmp_path, "base names the file below another one: write it there", "base=a.yaml")
    refused(tmp_path, "unknown keys '1', 'yes'; docs", "1=2", "yes=3")


def test_values_stand_as_written(tmp_path: Path) -> None:
    """A text `no` was 'False', 010 was 8, and 1:30 was 90."""
    path = tmp_path / "own.yaml"
    path.write_text(
        "method: self_forcing\nnegative_prompt: no\nsample_prompts: [on, 010, 1:30]\n"
        "seed: 010\nload_raw_video: yes\nlr: 1e-5\n"
    )
    config = load_config(path)
    assert config.negative_prompt == "no"
    assert config.sample_prompts == ["on", "010", "1:30"]
    assert (config.seed, config.load_raw_video, config.lr) == (10, True, 1e-5)
    refused(tmp_path, "seed: Value '1:30'", "seed=1:30")


def test_missing_file() -> None:
    with pytest.raises(UserError, match=r"config file nowhere\.yaml does not exist"):
        load_config("nowhere.yaml")
    with pytest.raises(UserError, match="is a folder; give a file"):
        load_config(ROOT / "configs")
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        load_config("x" * 300)


@pytest.mark.parametrize(
    ("path", "how"),
    [
        ("checkpoints/self_forcing_dmd.pt", "fetch it with `python scripts/download.py self-forc"),
        (ROOT / "prompts/vidprom_filtered_extended.txt", "scripts/download.py vidprom-prompts`"),
        ("checkpoints/mine.pt", "check the path"),
    ],
)
def test_a_missing_file_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str | Path, how: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"does not exist; .*{how}"):
        find_file(path, "file")


def test_files_are_found_from_the_projects_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_file("configs/default_config.yaml", "config file") == DEFAULTS


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"method: [rolling", r"is not readable as YAML, line 1: expected ',' or ']'"),
        (
            b"fps: 1\nlr: 1\nfps: 2",
            "is not readable as YAML, line 3: the key 'fps' stands there tw",
        ),
        (b"fps: 1\n1: x", "is not readable as YAML, line 2: the key '1' is no text"),
        (b"vae:\n  true: 3", "is not readable as YAML, line 2: the key 'true' is no text"),
        (b"? [a]\n: 3", "is not readable as YAML, line 1: a key is a list or a mapping"),
        (b"\ndata_path: ${HOME}/x", r"is not readable as YAML, line 2: '\$\{HOME\}/x' is not repl"),
        (b"vae: &a {b: *a}", "is not readable as YAML, line 1: '.a' stands within itself"),
        (b"fps: 1\n---\nfps: 2", "is not readable as YAML, line 2: but found another document"),
        (
            b"fps: !!python/name:os.sep",
            "is not readable as YAML, line 1: !!python/name:os.sep is no",
        ),
        (b"fps: !!int x", "is not readable as YAML, line 1: 'x' is no int"),
        (b"fps: \x07", "is not readable as YAML, line 1: a character that no text has"),
        (b"fps: " + b"[" * 5000, "is not readable as YAML: it is nested too deeply"),
        (b"\xff\xfe\x00 not text", r"is not UTF-8 text|is not readable as YAML"),
        ("method: rolling_forcing\nnegative_prompt: é".encode("latin-1"), "is not UTF-8 text"),
        (b"- a\n- b\n", "must hold `key: value` lines"),
    ],
)
def test_broken_file(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"experiment\.yaml ({sentence})"):
        load_config(path)


def test_empty_file_needs_a_method(tmp_path: Path) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text("")
    with pytest.raises(UserError, match="which method"):
        load_config(path)


def test_installed_without_its_checkout(tmp_path, monkeypatch):
    """The configs do not travel with the modules: the sentence says where they are looked for."""
    own = tmp_path / "own.yaml"
    own.write_text("method: self_forcing\n")
    monkeypatch.setattr("utils.config.ROOT", tmp_path / "site-packages")
    assert load_config(own).method == "self_forcing"
    with pytest.raises(UserError, match=r"looked for in the checkout where `pip install -e \.`"):
        load_config("configs/rolling_forcing_sid.yaml")
