"""Small cards: what is said before loading, what a profile sets, what becomes of full memory."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import inference
from pipeline import load_pipeline, memory
from pipeline.memory import (
    GIB,
    advice,
    fitted,
    memory_in_words,
    needed,
    phases,
    with_profile,
)
from pipeline.setup import Setup
from pipeline.text import TextSource
from tests.conftest import TinyWorld
from tests.published import published_setup
from utils.cli import run_main
from utils.config import load_config
from utils.errors import UserError
from utils.profiles import PROFILES, load_with_profile

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


# --- profiles -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "values", "kept"),
    [
        ([], (320, 576, "cpu", "float8"), ""),
        (["height=480"], (480, 832, "cpu", "float8"), "height, width"),
        (["kv_cache_dtype=auto"], (320, 576, "cpu", "auto"), "kv_cache_dtype"),
        (["text_encoder_device=cuda"], (320, 576, "cuda", "float8"), "text_encoder_device"),
    ],
)
def test_a_profile_sets_what_nobody_has(
    overrides: list[str],
    values: tuple[Any, ...],
    kept: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And says it: a smaller video is another one."""
    with caplog.at_level(logging.INFO):
        found = load_with_profile("configs/rolling_forcing_dmd.yaml", overrides, "8gb")
    own = (found.height, found.width, found.text_encoder_device, found.kv_cache_dtype)
    assert own == values
    said = next(text for text in caplog.messages if text.startswith("profile 8gb sets"))
    assert "linear_dtype=float8" in said
    sets, _, left = said.partition("; as they were: ")
    assert left == kept
    assert all(f"{key}=" not in sets for key in kept.split(", ") if key)


def test_a_profile_leaves_what_the_file_has_set(tiny_world: TinyWorld) -> None:
    config = load_with_profile(tiny_world.config, [], "8gb")
    assert (config.height, config.width, config.linear_dtype) == (32, 48, "float8")


@pytest.mark.slow
def test_profiles_fit_their_cards(tmp_path: Path) -> None:
    """Of a card with so many GB about 97 % are there for programs."""
    sizes = {}
    for name in PROFILES:
        setup = with_profile(published_setup(tmp_path), name)
        sizes[name] = needed(setup, torch.bfloat16) / GIB
        assert sizes[name] <= 0.97 * int(name.removesuffix("gb")), sizes
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True), sizes


def test_each_rank_of_a_team_keeps_its_heads(tmp_path: Path) -> None:
    alone = published_setup(tmp_path)
    four = replace(alone, machine=replace(alone.machine, sequence_parallel=4))
    caches = [phases(setup, torch.bfloat16)[-1].parts["cache"] for setup in (alone, four)]
    assert caches[0] == 4 * caches[1]


def test_a_network_is_beside_the_generator_however_that_is_spelled(tmp_path: Path) -> None:
    """`cuda` and `cuda:0` were two places, so that a whole VAE was left out."""
    setup = published_setup(tmp_path)

    def parts(**machine: str) -> list[dict[str, int]]:
        where = replace(setup.machine, **{"device": "cuda:0", **machine})
        return [phase.parts for phase in phases(replace(setup, machine=where), torch.bfloat16)]

    assert parts(vae_device="cuda") == parts(vae_device="cuda:0") == parts()
    assert parts(vae_device="cuda:1")[-1]["VAE"] == 0
    assert parts(text_encoder_device="cuda") == parts()
    assert len(parts(text_encoder_device="cuda:1")) == len(parts(text_encoder_device="cpu")) == 1


def test_a_text_encoder_beside_float16_is_in_float32(tmp_path: Path) -> None:
    """It was taken for half as large, and put on cards that cannot hold it."""
    setup = published_setup(tmp_path)
    sizes = [phases(setup, d)[0].parts["text encoder"] for d in (torch.float16, torch.float32)]
    assert sizes == [2 * phases(setup, torch.bfloat16)[0].parts["text encoder"]] * 2


# --- what fits ----------------------------------------------------------------------------------


def card(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    """A GPU of so many GiB, all of them free."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (int(size * GIB),) * 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "words"),
    [
        (80.0, ""),
        (15.7, "profile 16gb, for the free memory"),
        (11.7, "--profile 12gb (text_encoder_device=cpu"),
        (7.6, "--profile 8gb ("),
        (3.0, "smaller resolution"),
    ],
)
def test_what_would_fit_is_said_before_loading(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    size: float,
    words: str,
) -> None:
    """Nothing that makes another video is chosen for a person."""
    setup = published_setup(tmp_path)
    card(monkeypatch, size)
    caplog.set_level(logging.INFO)
    found = fitted(setup)
    assert found.machine.vae_frugal == (size == 15.7)
    assert found.video_settings() == setup.video_settings()
    assert (words in caplog.text) if words else caplog.text == ""


def test_on_a_cpu_nothing_is_chosen(tiny_world: TinyWorld) -> None:
    setup = Setup.of(load_config(tiny_world.config, ["device=cpu"]))
    assert fitted(setup) is setup


# --- where the text encoder is ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "room", "place"),
    [(16, 0, CUDA), (24, 12 * GIB, CUDA), (16, 12 * GIB, CPU), (10, 0, CPU), (10, None, CUDA)],
)
def test_where_the_text_encoder_is(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: float,
    room: int | None,
    place: torch.device,
) -> None:
    """Alone on a card it is there; beside a generator that needs the rest it is on the CPU."""
    setup = published_setup(tmp_path)
    card(monkeypatch, size)
    if size == 16:
        wide = TextSource(setup, text_len=512, dtype=torch.float32, device=CUDA, room=room)
        assert wide.place() == CPU, "twice as large in float32"
    text = TextSource(setup, text_len=512, dtype=torch.bfloat16, device=CUDA, room=room)
    assert text.place() == place
    card(monkeypatch, 0.1)
    assert text.place() == place, "where it is once it is later: embeddings stay the same"


def test_the_negative_prompt_is_encoded_where_texts_are(
    tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a server the thread of the steps encoded it, while that of the texts did others."""
    overrides = ["denoising_step_list=null", "sampling_steps=2", "schedule=block"]
    pipe = load_pipeline(tiny_world.config, device="cpu", overrides=overrides)
    pipe.encode_negative()
    text = pipe.encode_prompts(["a cat"])
    pipe._text._remembered.clear()
    monkeypatch.setattr(TextSource, "encoder", lambda self: pytest.fail("encoded in a stream"))
    pipe.open_stream(text).close()
    pipe.variant(["model_kwargs.sink_size=0"]).open_stream(text).close()


# --- memory that ends ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [
        "wan.text_encoder.WanTextEncoder.encode_ids",
        "pipeline.text_to_video.load_dit",
        "wan.vae.WanVAE.from_official",
        "wan.dit.WanDiT.forward",
        "wan.vae.StreamingDecoder.decode",
    ],
)
def test_memory_that_ends_is_told_in_a_sentence(
    tiny_world: TinyWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
) -> None:
    """Of loading, encoding, a step or decoding; with nothing half-written."""

    def full(*_: Any, **__: Any) -> None:
        raise FULL

    monkeypatch.setattr(place, full)
    flags = ["--config_path", str(tiny_world.config), "--checkpoint_path"]
    flags += [str(tiny_world.checkpoint), "--prompt", "a", "--device", "cpu"]
    flags += ["--output_folder", str(tmp_path / "out"), "--num_output_frames", "3"]
    assert run_main(inference.main, flags) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: there is too little memory")
    assert "smaller resolution" in told
    assert not list(tmp_path.glob("**/*.*"))


@pytest.mark.parametrize("error", [FULL, MemoryError(), RuntimeError("can't allocate memory")])
def test_every_command_tells_it(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def command(argv: object) -> int:
        raise error

    assert run_main(command, []) == 2
    assert capsys.readouterr().err.startswith("error: there is too little memory")


@pytest.mark.slow
def test_what_would_fit_is_said_where_memory_ended(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = published_setup(tmp_path)
    card(monkeypatch, 11.7)
    with (
        pytest.raises(UserError, match=r"too little memory for this; --profile 12gb \("),
        memory_in_words(setup),
    ):
        raise FULL
    with pytest.raises(ValueError, match="other"), memory_in_words(setup):
        raise ValueError("other")
    assert "smaller" in advice(with_profile(setup, "8gb"), 12 * GIB)
    tiny = Setup.of(load_config(tiny_world.config, ["device=cpu"]))
    assert memory.what_fits(tiny).startswith("close other")
