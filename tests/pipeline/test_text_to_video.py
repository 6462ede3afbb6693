"""The public API: streams and whole videos, prefixes, resuming a stream."""

import dataclasses
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor, nn

from pipeline import VideoPipeline, load_pipeline
from pipeline.inputs import embeddings, image_of
from pipeline.prefix import Prefix, image_clip, video_clip
from tests.conftest import TinyWorld
from tests.reference_flow import flow_from_x0
from tests.tiny_pipeline import TINY_DIT
from utils.errors import UserError
from utils.video import VideoWriter, fit_frames, read_video, to_float, to_uint8
from wan.context import CachedContext, SplitContext
from wan.dit import DiTConfig
from wan.text_encoder import WanTextEncoder
from wan.vae import StreamingDecoder


@pytest.fixture(scope="module")
def pipe(tiny_world: TinyWorld) -> VideoPipeline:
    return load_pipeline(tiny_world.config, tiny_world.checkpoint, device="cpu")


def moving_clip(frames: int, height: int = 32, width: int = 48) -> Tensor:
    """A bright disc that moves steadily: uint8 `[frames, H, W, 3]`."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    discs = [
        torch.sigmoid(6 - ((rows - height / 2) ** 2 + (columns - 8 - 0.5 * t) ** 2).sqrt())
        for t in range(frames)
    ]
    return (torch.stack(discs)[..., None] * torch.tensor([220, 120, 40])).to(torch.uint8)


def test_stream_hands_out_blocks(pipe: VideoPipeline) -> None:
    with pipe.stream("a ball", seed=0, num_latent_frames=8) as stream:
        blocks = list(stream)
    assert [tuple(block.shape) for block in blocks] == [
        (9, 32, 48, 3),
        (12, 32, 48, 3),
        (8, 32, 48, 3),  # the third block is cut: 8 latent frames are 29 video frames
    ]
    assert all(block.dtype == torch.uint8 for block in blocks)


def test_generate_equals_streams_for_every_prompt(pipe: VideoPipeline) -> None:
    prompts = ["the red ball falls", "a cat"]
    videos = pipe.generate(prompts, num_latent_frames=7, seed=5)
    assert videos.shape == (2, 25, 32, 48, 3)
    for prompt, video in zip(prompts, videos, strict=True):
        alone = torch.cat(list(pipe.stream(prompt, seed=5, num_latent_frames=7)))
        assert (alone.int() - video.int()).abs().max() <= 1, "batch changes rounding at most"


def test_unbounded_stream_equals_bounded_one_but_for_its_end(pipe: VideoPipeline) -> None:
    bounded = list(pipe.stream("a ball", seed=1, num_latent_frames=21))
    with pipe.stream("a ball", seed=1) as stream:
        unbounded = [stream.next_block() for _ in range(7)]
    shared = 7 - (pipe.setup.levels.num - 1)
    for block in range(shared):
        assert torch.equal(bounded[block], unbounded[block])
    assert not torch.equal(bounded[-1], unbounded[-1])


def test_what_is_not_a_number_is_no_video(
    pipe: VideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It became black frames, exit code 0, recorded as done."""
    text = pipe.encode_prompts(["a ball"])
    bias = pipe.dit.head.head.bias
    whole = bias.clone()
    bias.fill_(float("nan"))
    try:
        with pytest.raises(UserError, match=r"block 0 has latents that are not numbers \(NaN or"):
            pipe.open_stream(text, num_latent_frames=3).next_block()
        with pytest.raises(UserError, match="latents that are not numbers"):
            pipe.generate_latents(text, num_latent_frames=3)
    finally:
        bias.copy_(whole)
    stream = pipe.stream("a ball", num_latent_frames=6)
    stream.next_block()
    frames = torch.full((1, 12, 3, 32, 48), float("nan"))
    monkeypatch.setattr(StreamingDecoder, "decode", lambda self, latents: frames)
    with pytest.raises(UserError, match="block 1 has frames that are not numbers"):
        stream.next_block()


def test_streams_are_independent_and_closable(pipe: VideoPipeline) -> None:
    alone = list(pipe.stream("a ball", seed=1, num_latent_frames=9))
    first = pipe.stream("a ball", seed=1, num_latent_frames=9)
    second = pipe.stream("a cat", seed=2, num_latent_frames=9)
    woven = []
    for _ in range(3):
        woven.append(first.next_block())
        second.next_block()
    assert all(torch.equal(a, b) for a, b in zip(alone, woven, strict=True))
    assert first.next_block() is None
    second.close()
    second.close()
    with pytest.raises(RuntimeError, match="closed"):
        second.next_block()


@pytest.mark.parametrize("method", ["rolling_forcing", "self_forcing", "infinite_forcing"])
def test_stream_state_resumes_exactly(tiny_world: TinyWorld, method: str, tmp_path: Path) -> None:
    pipe = load_pipeline(
        tiny_world.config, tiny_world.checkpoint, device="cpu", overrides=[f"method={method}"]
    )
    stream = pipe.stream("a ball", seed=4)
    for _ in range(3):
        stream.next_block()
    saved = io.BytesIO()
    torch.save(stream.state_dict(), saved)
    expected = [stream.next_block() for _ in range(3)]
    saved.seek(0)
    resumed = pipe.stream("a ball", seed=4)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    for block in expected:
        assert torch.equal(resumed.next_block(), block)
    with pytest.raises(ValueError, match="seed"):
        pipe.stream("a ball", seed=5).load_state_dict(stream.state_dict())


def test_text_is_read_afresh_at_every_window(pipe: VideoPipeline) -> None:
    plain = list(pipe.stream("a ball", seed=1, num_latent_frames=18))
    stream = pipe.stream("a ball", seed=1, num_latent_frames=18)
    blocks = [stream.next_block()]
    stream.rollout.text = pipe.dit.encode_text(pipe.encode_prompts(["the blue cat jumps"]))
    blocks += list(stream)
    assert torch.equal(blocks[0], plain[0])
    assert not torch.equal(blocks[1], plain[1])


def test_image_prefix_comes_first_and_every_block_has_12_frames(pipe: VideoPipeline) -> None:
    image = moving_clip(1)[0]
    blocks = list(pipe.stream("a ball", seed=0, num_latent_frames=12, image=image))
    assert [len(block) for block in blocks] == [9, 12, 12, 12]
    still = to_float(image_clip(image, pipe.layout, pipe.shape))[None]
    rebuilt = to_uint8(pipe.vae.decode(pipe.vae.encode(still)))[0]
    assert torch.equal(blocks[0], rebuilt)
    without = list(
        pipe.stream("a ball", num_latent_frames=12, image=image, prefix_frames="none", seed=0)
    )
    assert [len(block) for block in without] == [12, 12, 12]
    assert torch.equal(without[0], blocks[1])


@pytest.mark.parametrize(("frames", "kept"), [(21, 21), (40, 33), (9, 9)])
def test_video_prefix_keeps_whole_blocks(pipe: VideoPipeline, frames: int, kept: int) -> None:
    clip = moving_clip(frames)
    latent = pipe.shape.latent_frames(kept)
    blocks = list(pipe.stream("a ball", seed=0, num_latent_frames=latent + 6, video=clip))
    assert sum(len(block) for block in blocks) == kept + 24
    assert all(len(block) == 12 for block in blocks[1:])
    rebuilt = pipe.vae.decode(pipe.vae.encode(to_float(clip[-kept:])[None]))
    assert torch.equal(torch.cat(blocks)[:kept], to_uint8(rebuilt)[0])


def test_video_files_are_continued_at_the_models_rate(
    pipe: VideoPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A clip of 48 frames per second was continued in slow motion; its length did not matter."""
    clip = moving_clip(99)
    for fps in (16, 48):
        with VideoWriter(tmp_path / f"{fps}.mp4", fps=fps) as writer:
            writer.write(clip)
    size = pipe.shape.height, pipe.shape.width
    with caplog.at_level("INFO"):
        same = video_clip(tmp_path / "16.mp4", pipe.layout, pipe.shape, 16)
        assert "FPS" not in caplog.text
        thinned = video_clip(tmp_path / "48.mp4", pipe.layout, pipe.shape, 16)
    assert "48.mp4 is 48 FPS: read at 16" in caplog.text
    assert torch.equal(same, fit_frames(read_video(tmp_path / "16.mp4")[-93:], *size))
    assert torch.equal(thinned, fit_frames(read_video(tmp_path / "48.mp4")[::3], *size))


def test_independent_first_frame_takes_one_frame_of_an_image(tiny_world: TinyWorld) -> None:
    pipe = load_pipeline(
        tiny_world.config,
        tiny_world.checkpoint,
        device="cpu",
        overrides=["independent_first_frame=true"],
    )
    assert [len(b) for b in pipe.stream("a ball", num_latent_frames=7)] == [1, 12, 12]
    blocks = list(pipe.stream("a ball", num_latent_frames=7, image=moving_clip(1)[0]))
    assert [len(b) for b in blocks] == [1, 12, 12]
    clip = video_clip(moving_clip(30), pipe.layout, pipe.shape, 16)
    assert len(clip) == 25


class Oracle(nn.Module):
    """Stands in for the transformer: its velocity leads exactly to given latents."""

    def __init__(self, dit: nn.Module, truth: Tensor) -> None:
        super().__init__()
        self.dit, self.truth = dit, truth

    def __getattr__(self, name: str) -> object:
        return (
            getattr(super().__getattr__("dit"), name)
            if name != "dit"
            else super().__getattr__(name)
        )

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: object,
        context: CachedContext | SplitContext,
    ) -> Tensor:
        first = context.contexts[0] if isinstance(context, SplitContext) else context
        start = first.cache.finished
        x0 = self.truth[:, start : start + latents.shape[1]]
        return flow_from_x0(latents, x0, timesteps.clamp(min=1e-3))


def test_no_jump_at_the_seam_when_the_continuation_is_the_truth(tiny_world: TinyWorld) -> None:
    """The decoder has to be primed with the prefix: a fresh one would jump at the seam."""
    pipe = load_pipeline(tiny_world.config, device="cpu", overrides=["method=self_forcing"])
    clip = moving_clip(57)
    truth = pipe.vae.encode(to_float(clip)[None])
    pipe.dit = Oracle(pipe.dit, truth)  # type: ignore[assignment]
    video = torch.cat(list(pipe.stream("x", seed=0, num_latent_frames=15, video=clip[:33])))
    change = (video[1:].float() - video[:-1].float()).abs().mean(dim=(1, 2, 3))
    seam = change[32]
    assert len(video) == 57
    assert seam <= 1.5 * change[:32].max()


def test_prefix_errors(pipe: VideoPipeline) -> None:
    with pytest.raises(UserError, match="at least 9"):
        pipe.stream("x", video=moving_clip(5))
    with pytest.raises(UserError, match="more than 3"):
        pipe.stream("x", image=moving_clip(1)[0], num_latent_frames=3)
    with pytest.raises(UserError, match="not both"):
        pipe.stream("x", image=moving_clip(1)[0], video=moving_clip(9))


def test_stored_embeddings_replace_the_text_encoder(
    tiny_world: TinyWorld, pipe: VideoPipeline, tmp_path: Path
) -> None:
    from utils.embeddings import write_shard

    write_shard(tmp_path / "a.safetensors", {"a ball": pipe.encode_prompts(["a ball"])[0]})
    setup = dataclasses.replace(pipe.setup, text_embeddings=str(tmp_path))
    stored = VideoPipeline(setup, pipe.dit, vae=pipe.vae)
    ours, theirs = (
        torch.cat(list(p.stream("a ball", seed=0, num_latent_frames=4))) for p in (stored, pipe)
    )
    assert torch.equal(ours, theirs)
    with pytest.raises(UserError, match="no embedding"):
        stored.stream("another")


@pytest.mark.slow
def test_models_that_are_not_distilled_are_sampled(tiny_world: TinyWorld) -> None:
    """Bidirectional at once, and causal block by block through the same engine."""
    for schedule, rule in (("full", "ode"), ("block", "ode"), ("block", "renoise")):
        pipe = load_pipeline(
            tiny_world.config,
            device="cpu",
            overrides=[
                "method=self_forcing",
                f"schedule={schedule}",
                f"step_rule={rule}",
                "denoising_step_list=null",
                "sampling_steps=4",
                "negative_prompt=blue",
            ],
        )
        videos = pipe.generate(["a ball", "a cat"], num_latent_frames=6, seed=0)
        assert videos.shape == (2, 21, 32, 48, 3)
        alone = pipe.generate(["a cat"], num_latent_frames=6, seed=0)
        assert (alone[0].int() - videos[1].int()).abs().max() <= 1


@pytest.mark.parametrize(
    "overrides", [[], ["schedule=full", "denoising_step_list=null", "sampling_steps=2"]]
)
def test_prompts_encoded_once_need_no_text_encoder_any_more(
    tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    """The negative prompt of a model that is not distilled included."""
    pipe = load_pipeline(tiny_world.config, tiny_world.checkpoint, "cpu", overrides)
    texts = pipe.encode_once(["a cat", "a dog"])
    assert torch.equal(texts["a dog"], pipe.encode_prompts(["a dog"]))

    def is_gone(*given: object, **more: object) -> None:
        raise AssertionError("the text encoder was loaded again")

    monkeypatch.setattr(WanTextEncoder, "from_official", is_gone)
    looks: list[int] = []
    latents = pipe.generate_latents(texts["a cat"], 3, look=lambda: looks.append(1))
    assert latents.shape[1] == 3
    assert len(looks) >= 2, "behind each window, of which a video made as a whole has many"


def test_inputs_of_another_form_are_refused_in_words(pipe: VideoPipeline) -> None:
    with pytest.raises(UserError, match="uint8"):
        pipe.stream("x", image=torch.rand(32, 48, 3))
    with pytest.raises(UserError, match="uint8"):
        pipe.stream("x", video=moving_clip(9).permute(0, 3, 1, 2))
    channels, height, width = pipe.shape.latent
    initial = torch.randn(1, 10, channels, height, width)
    renoise = torch.randn(4, 4, 1, 3, channels, height, width)
    with pytest.raises(UserError, match="give 12"):
        pipe.generate_latents(torch.zeros(1, 2, 32), 10, noise=(initial, renoise))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("denoising_step_list=[1000,900,800,700,600]", "levels"),
        ("denoising_step_list=[1000,500]", "levels"),
        ("method=self_forcing", "policy|in flight"),
        ("schedule=block", "in flight"),
        ("width=64", "cache|is \\["),
        ("max_attention_frames=24", "policy"),
    ],
)
def test_a_state_of_another_stream_is_refused_before_anything_changes(
    tiny_world: TinyWorld, pipe: VideoPipeline, override: str, said: str
) -> None:
    """A state of another schedule was taken, and a step later ended in KeyError."""
    other = load_pipeline(
        tiny_world.config, tiny_world.checkpoint, device="cpu", overrides=[override]
    ).stream("a ball", seed=1)
    stream, untouched = (pipe.stream("a ball", seed=1) for _ in range(2))
    for _ in range(2):
        other.next_block()
    for state in (other.state_dict(), {"seed": 1}):
        with pytest.raises(ValueError, match=f"{said}|no state"):
            stream.load_state_dict(state)
    assert torch.equal(stream.next_block(), untouched.next_block())


def test_average_that_is_not_there_is_refused(tiny_world: TinyWorld) -> None:
    """It used to be ignored for bare weights, and the record said it was used."""
    with pytest.raises(UserError, match="no generator_ema"):
        load_pipeline(tiny_world.config, device="cpu", use_ema=True)


@pytest.mark.slow
def test_inputs_of_other_libraries_are_taken(pipe: VideoPipeline) -> None:
    frame = moving_clip(1)[0]
    expected = pipe.generate(["a ball"], 4, seed=3, image=frame)
    for image in (frame.numpy(), Image.fromarray(frame.numpy()), frame[None]):
        given = {"image": image, "seed": np.int64(3), "num_latent_frames": np.int64(4)}
        assert torch.equal(pipe.generate(np.array(["a ball"]), **given), expected)
    clip = moving_clip(9)
    frames = [Image.fromarray(picture) for picture in clip.numpy()]
    prefixes = [pipe.encode_prefix(video=video) for video in (clip, clip.numpy(), frames)]
    assert all(torch.equal(prefix.latents, prefixes[0].latents) for prefix in prefixes[1:])
    text = pipe.encode_prompts(("a ball",))
    assert torch.equal(pipe.generate_latents(text.numpy(), 3), pipe.generate_latents(text, 3))


TEXT = torch.zeros(1, 2, 32)
REFUSED = {
    "prompt_for_prompts": (lambda p: p.generate("a", 3), "must be a list of texts"),
    "no_prompts": (lambda p: p.generate([], 3), "no prompt"),
    "none_for_prompts": (lambda p: p.generate(None, 3), "list of texts, not None"),
    "number_in_prompts": (lambda p: p.encode_prompts(["a", 3]), "a text, not 3"),
    "half_a_character": (lambda p: p.encode_prompts(["\ud83d"]), "half a character"),
    "prompts_for_prompt": (lambda p: p.stream(["a"]), "a text, not list"),
    "no_frames": (lambda p: p.generate(["a"], 0), "num_latent_frames must be a whole number"),
    "negative_frames": (lambda p: p.stream("a", num_latent_frames=-3), "from 1 on, not -3"),
    "float_frames": (lambda p: p.generate_latents(TEXT, 3.0), "not 3.0"),
    "endless_generate": (lambda p: p.generate(["a"], None), "not None"),
    "negative_seed": (lambda p: p.stream("a", seed=-1), "seed must be a whole number"),
    "huge_seed": (lambda p: p.stream("a", seed=2**64), "seed must be a whole number"),
    "float_seed": (lambda p: p.generate(["a"], 3, seed=1.5), "not 1.5"),
    "bool_tensor_seed": (lambda p: p.generate(["a"], 3, torch.tensor(True)), "torch.bool"),
    "bool_seed": (lambda p: p.open_stream(TEXT, seed=True), "not True"),
    "negative_sample": (lambda p: p.stream("a", sample=-1), "sample must be"),
    "samples_of_another_batch": (lambda p: p.open_stream(TEXT, samples=[0, 1]), "1 whole numbers"),
    "prefix_frames": (lambda p: p.stream("a", prefix_frames="all"), "'all'"),
    "no_prefix_frames": (lambda p: p.open_stream(TEXT, prefix_frames=None), "not None"),
    "tensor_for_prefix": (lambda p: p.generate_latents(TEXT, 6, prefix=TEXT), "encode_prefix"),
    "prefix_of_another_size": (
        lambda p: p.open_stream(TEXT, prefix=Prefix(torch.zeros(1, 3, 16, 1, 1))),
        "latents of the prefix must be",
    ),
    "prefix_of_another_batch": (
        lambda p: p.open_stream(TEXT, prefix=Prefix(torch.zeros(2, 3, *p.shape.latent))),
        r"must be \[1 or 1, F",
    ),
    "prefix_of_no_whole_block": (
        lambda p: p.open_stream(TEXT, prefix=Prefix(torch.zeros(1, 4, *p.shape.latent))),
        "do not fill whole blocks of 3",
    ),
    "infinite_prefix": (
        lambda p: p.open_stream(
            TEXT, prefix=Prefix(torch.full((1, 3, *p.shape.latent), torch.inf))
        ),
        "no finite",
    ),
    "text_without_batch": (lambda p: p.generate_latents(TEXT[0], 3), r"not \[2, 32\]"),
    "empty_batch": (lambda p: p.generate_latents(TEXT[:0], 3), r"not \[0, 2, 32\]"),
    "long_text": (lambda p: p.open_stream(torch.zeros(1, 25, 32)), "L up to 24"),
    "integer_text": (lambda p: p.open_stream(TEXT.int()), "tensor of floats"),
    "infinite_text": (lambda p: p.open_stream(TEXT + torch.inf), "no finite"),
    "text_without_values": (lambda p: p.open_stream(TEXT.to("meta")), "have no values"),
    "infinite_text_of_8_bits": (
        lambda p: p.open_stream((TEXT + torch.nan).to(torch.float8_e4m3fn)),
        "no finite",
    ),
    "name_too_long": (lambda p: p.stream("a", image="x" * 300), "cannot be read"),
    "list_for_text": (lambda p: p.open_stream([[1.0]]), "not list"),
    "noise_of_another_size": (lambda p: p.generate_latents(TEXT, 3, (TEXT, TEXT)), "initial noise"),
    "short_noise": (lambda p: p.generate_latents(TEXT, 6, noise_of(p, 1, 3, again=2)), "but 6 are"),
    "noise_of_few_blocks": (
        lambda p: p.generate_latents(TEXT, 6, noise_of(p, 2, 3, again=1)),
        "must be \\[2, .* or longer",
    ),
    "noise_of_shorter_blocks": (
        lambda p: p.generate_latents(TEXT, 6, noise_of(p, 2, 1)),
        "must be \\[2, .* or longer",
    ),
    "noise_without_that_of_the_context": (
        lambda p: p.variant(["context_noise=100"]).generate_latents(TEXT, 6, noise_of(p, 2, 3)),
        "must be \\[2, .* or longer",
    ),
    "lone_noise": (lambda p: p.generate_latents(TEXT, 3, (TEXT,)), "a pair"),
    "two_images": (lambda p: p.encode_prefix(image=moving_clip(2)), "uint8"),
    "grey_image": (lambda p: p.stream("a", image=np.zeros((9, 9), np.uint8)), "uint8"),
    "float_image": (lambda p: p.encode_prefix(image=np.zeros((9, 9, 3))), "float64"),
    "empty_image": (lambda p: p.encode_prefix(image=np.zeros((0, 9, 3), np.uint8)), "uint8"),
    "number_for_image": (lambda p: p.encode_prefix(image=3), "not 3"),
    "no_frames_of_video": (lambda p: p.encode_prefix(video=[]), "no frame"),
    "frames_of_two_sizes": (
        lambda p: p.encode_prefix(video=[*moving_clip(9), moving_clip(1, 16)[0]]),
        "one size",
    ),
}


def noise_of(
    pipe: VideoPipeline, blocks: int, frames: int, *, again: int | None = None
) -> tuple[Tensor, Tensor]:
    """Noise of so many blocks; between levels of so many `frames` each, and of `again` blocks."""
    levels, latent = pipe.setup.levels.num, pipe.shape.latent
    renoise = torch.zeros(again or blocks, levels - 1, 1, frames, *latent)
    return torch.zeros(1, 3 * blocks, *latent), renoise


@pytest.mark.parametrize("case", REFUSED)
def test_other_inputs_are_refused_in_one_sentence(pipe: VideoPipeline, case: str) -> None:
    """They ended in tracebacks of torch, or made another video than was asked for."""
    call, words = REFUSED[case]
    with pytest.raises(UserError, match=words):
        call(pipe)


def test_other_inputs_are_taken_where_it_is_certain_what_is_meant() -> None:
    clear = Image.new("RGBA", (4, 2))  # black without opacity
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert torch.equal(image_of(clear), torch.full((2, 4, 3), 255, dtype=torch.uint8))
    lying = Image.fromarray(pixels)
    lying.getexif()[ExifTags.Base.Orientation] = 6  # as phones write it: turn to the right
    assert torch.equal(image_of(lying), torch.from_numpy(pixels).rot90(-1))
    assert image_of(pixels[:, ::-1]).tolist() == pixels[:, ::-1].tolist()
    assert embeddings(torch.zeros(1, 24, 32), DiTConfig.from_dict(TINY_DIT)).shape == (1, 24, 32)


def test_a_closed_stream_says_so(pipe: VideoPipeline) -> None:
    stream = pipe.stream("a")
    with pytest.raises(ValueError, match="no state of a stream"):
        stream.load_state_dict({})
    stream.close()
    for use in (stream.next_batch, stream.state_dict, stream.__enter__, lambda: next(stream)):
        with pytest.raises(RuntimeError, match="closed"):
            use()


def test_what_is_cut_off_a_long_prompt_is_said_once(
    pipe: VideoPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    words = " ".join(f"ball{n}" for n in range(40))
    for _ in range(2):
        pipe._text._remembered.clear()
        pipe.encode_prompts([words, "a ball"])
    (said,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "longer than the 24 tokens" in said
    assert re.search(r"the last \d+ are dropped, from '.*ball\d+ ball\d+", said)
