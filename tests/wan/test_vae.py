"""The VAE against recorded numbers, against diffusers' own decode, and its streams."""

import copy
import math
import re

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.torch import save_file

import wan.vae
from tests.golden_cases import load_case, load_json, load_weights
from tests.tiny_models import write_tiny_text_encoder, write_tiny_vae
from utils.errors import UserError
from utils.video import to_float
from wan.vae import AutoencoderKLWan, WanVAE, official_vae_key, vae_config_from_shapes
from wan.vae_layers import decode_clip

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def vae_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("vae") / "Wan2.1_VAE.pth"
    write_tiny_vae(path, base_dim=4)
    return path


@pytest.fixture(scope="module")
def vae(vae_file):
    return WanVAE.from_official(vae_file)


@pytest.fixture(scope="module")
def case():
    return load_case("vae")


@pytest.fixture(scope="module")
def golden_vae(case, tmp_path_factory):
    path = tmp_path_factory.mktemp("golden_vae") / "Wan2.1_VAE.pth"
    torch.save(load_weights(case.meta["weights"]), path)
    return WanVAE.from_official(path)


def frames_first(x):
    return x.transpose(1, 2)  # [B, C, F, h, w] <-> [B, F, C, h, w]


def recorded_clips(case):
    """The recorded videos `video{F}` as [B, F, 3, H, W]; their latents are `latents{F}`."""
    clips = {n: frames_first(x) for n, x in case.tensors.items() if re.fullmatch(r"video\d+", n)}
    assert clips
    return clips


def assert_close(ours, recorded):
    torch.testing.assert_close(ours, recorded, atol=TOLERANCE, rtol=0)


def some_latents(vae, frames=7, seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames, vae.model.config["z_dim"], 2, 3, generator=generator)


def decode_in_chunks(vae, latents, chunks):
    stream = vae.streaming_decoder()
    return torch.cat([stream.decode(chunk) for chunk in latents.split(chunks, dim=1)], dim=1)


# --- recorded numbers --------------------------------------------------------------------------


@pytest.mark.golden
def test_sizes_are_read_from_recorded_shapes(case, golden_vae):
    recorded, config = case.meta["config"], golden_vae.model.config
    for ours, theirs in (("base_dim", "dim"), ("temperal_downsample", "temperal_downsample")):
        assert config[ours] == recorded[theirs]
    for name in ("z_dim", "dim_mult", "num_res_blocks"):
        assert config[name] == recorded[name]


@pytest.mark.golden
def test_statistics_are_the_recorded_ones(case, golden_vae):
    torch.testing.assert_close(golden_vae.latents_mean, case.tensors["mean"])
    torch.testing.assert_close(golden_vae.latents_std, case.tensors["std"])


@pytest.mark.golden
def test_encode_gives_recorded_latents(case, golden_vae):
    for name, video in recorded_clips(case).items():
        expected = frames_first(case.tensors[name.replace("video", "latents")])
        assert_close(golden_vae.encode(video), expected)


@pytest.mark.golden
def test_encode_of_one_frame_and_of_a_batch_gives_recorded_latents(case, golden_vae):
    video = min(recorded_clips(case).values(), key=lambda clip: clip.shape[1])
    assert_close(golden_vae.encode(video[:, :1]), frames_first(case.tensors["latents1"]))
    batch = torch.cat([video, -video])
    assert_close(golden_vae.encode(batch), case.tensors["wrapper_latents"])


@pytest.mark.golden
def test_decode_gives_recorded_video(case, golden_vae):
    for name in (name for name in case.tensors if name.startswith("decoded")):
        latents = case.tensors["z" if name == "decoded" else name.removeprefix("decoded_")]
        expected = frames_first(case.tensors[name]).clamp(-1, 1)
        assert_close(golden_vae.decode(frames_first(latents)), expected)
    expected = case.tensors["wrapper_pixels"]
    count = (expected.shape[1] - 1) // golden_vae.temporal_stride + 1
    assert_close(golden_vae.decode(frames_first(case.tensors["z"])[:, :count]), expected)


@pytest.mark.golden
def test_stream_gives_recorded_video(case, golden_vae):
    latents = frames_first(case.tensors["z"])
    expected = frames_first(case.tensors["decoded"]).clamp(-1, 1)
    assert_close(decode_in_chunks(golden_vae, latents, 3), expected)


@pytest.mark.golden
def test_key_names_are_those_of_the_real_checkpoint():
    manifest = load_json("manifest_wan2.1_vae")
    shapes = {key: shape for key, (shape, _) in manifest["keys"].items()}
    config = vae_config_from_shapes(shapes)
    with torch.device("meta"):
        model = AutoencoderKLWan(**config)
    blocks = config["num_res_blocks"]
    own = {official_vae_key(k, blocks): list(v.shape) for k, v in model.state_dict().items()}
    assert own == shapes
    assert sum(map(math.prod, own.values())) == manifest["num_parameters"]
    for key, name in convert_wan_vae_to_diffusers({key: key for key in shapes}).items():
        assert official_vae_key(key, blocks) == name


# --- geometry and normalisation ----------------------------------------------------------------


def test_latents_are_the_normalised_mean(vae):
    video = torch.rand(2, 5, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        mu = vae.model.encode(frames_first(video)).latent_dist.mean
    mean, std = (torch.tensor(vae.model.config[k]) for k in ("latents_mean", "latents_std"))
    expected = (frames_first(mu) - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    torch.testing.assert_close(vae.encode(video), expected, atol=1e-6, rtol=0)


def test_pixels_become_floats_clip_by_clip(vae, monkeypatch):
    """A minute of 720p was whole in memory as floats, of which the encoder sees four frames."""
    pixels = torch.randint(256, (1, 9, 3, 16, 24), dtype=torch.uint8)
    expected = vae.encode(to_float(pixels[0].movedim(1, 3))[None])
    made, floats = [], wan.vae._floats
    monkeypatch.setattr(
        wan.vae, "_floats", lambda clip, model: made.append(clip) or floats(clip, model)
    )
    assert torch.equal(vae.encode(pixels), expected)
    assert [(clip.dtype, clip.shape[2]) for clip in made] == [(torch.uint8, n) for n in (1, 4, 4)]


@pytest.mark.parametrize(("frames", "height"), [(0, 16), (2, 16), (4, 16), (5, 20)])
def test_encode_refuses_what_does_not_fill_latents(vae, frames, height):
    with pytest.raises(ValueError, match="1 \\+ 4k frames"):
        vae.encode(torch.zeros(1, frames, 3, height, 16))


@pytest.mark.parametrize(
    "sizes",
    [
        {"dim_mult": (1, 2, 2), "temporal_downsample": (True, True), "num_res_blocks": 1},
        {"dim_mult": (1, 3), "temporal_downsample": (True,), "num_res_blocks": 3},
        {"dim_mult": (1, 2), "temporal_downsample": (False,)},
    ],
)
def test_other_architectures_load_by_the_same_code(tmp_path, sizes):
    original = WanVAE.random(base_dim=4, z_dim=5, **sizes)
    original.save_official(tmp_path / "vae.pth")
    loaded = WanVAE.from_official(tmp_path / "vae.pth")
    f, stride = 3, loaded.temporal_stride
    video = torch.rand(1, 1 + stride * (f - 1), 3, 16, 16) * 2 - 1
    latents = loaded.encode(video)
    side = 16 // loaded.spatial_stride
    assert latents.shape == (1, f, 5, side, side)
    assert torch.equal(latents, original.encode(video))
    assert loaded.decode(latents).shape == video.shape


def test_bfloat16_gives_nearly_the_same_video(vae, vae_file):
    half = WanVAE.from_official(vae_file, dtype=torch.bfloat16)
    latents = some_latents(vae, frames=2)
    video = half.decode(latents)
    assert video.dtype == half.dtype == torch.bfloat16
    assert (video.float() - vae.decode(latents)).abs().mean() < 0.05


# --- streams -----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [[1] * 7, [7], [3, 3, 1], [1, 2, 4], [2, 5]])
def test_cuts_change_nothing(vae, chunks):
    """Not a bit where frames are decoded one by one, else to rounding; the same cuts never."""
    latents = some_latents(vae)
    video = decode_in_chunks(vae, latents, chunks)
    assert video.shape[1] == 1 + vae.temporal_stride * (latents.shape[1] - 1)
    assert torch.equal(video, decode_in_chunks(vae, latents, chunks))
    one_by_one = copy.copy(vae)
    one_by_one.pixels_at_once = 0
    whole = one_by_one.decode(latents)
    assert torch.equal(decode_in_chunks(one_by_one, latents, chunks), whole)
    assert_close(video, whole)


@pytest.mark.parametrize(
    ("height", "pixels", "expected"),
    [
        (2, 256, [1, 6]),
        (2, 18, [1, 3, 3]),
        (2, 17, [1, 2, 2, 2]),
        (4, 12, [1] * 7),
        (4, 0, [1] * 7),
    ],
)
def test_small_frames_are_decoded_together(vae, monkeypatch, height, pixels, expected):
    """As many as have `pixels_at_once`, 3 columns each; the first of a video alone."""
    sizes = []
    monkeypatch.setattr(
        wan.vae,
        "decode_clip",
        lambda model, clip, past: sizes.append(clip.shape[2]) or decode_clip(model, clip, past),
    )
    latents = torch.zeros(1, 7, vae.model.config["z_dim"], height, 3)
    ours = copy.copy(vae)
    ours.pixels_at_once = pixels
    ours.decode(latents)
    assert sizes == expected


def test_first_latent_frame_gives_one_video_frame(vae):
    stream = vae.streaming_decoder()
    latents = some_latents(vae)
    counts = [stream.decode(chunk).shape[1] for chunk in latents.split([3, 3, 1], dim=1)]
    assert counts == [1 + 2 * vae.temporal_stride, 3 * vae.temporal_stride, vae.temporal_stride]


def test_interleaved_streams_are_independent(vae):
    """One feature cache inside the shared model would mix the streams (and encoding clears it)."""
    first, second = some_latents(vae, seed=1), some_latents(vae, seed=2, batch=2)
    a, b = vae.streaming_decoder(), vae.streaming_decoder()
    videos_a, videos_b = [], []
    for i in range(0, 6, 2):
        videos_a.append(a.decode(first[:, i : i + 2]))
        videos_b.append(b.decode(second[:, i : i + 2]))
        vae.encode(torch.zeros(1, 1, 3, 16, 16))
    assert torch.equal(torch.cat(videos_a, 1), decode_in_chunks(vae, first[:, :6], 2))
    assert torch.equal(torch.cat(videos_b, 1), decode_in_chunks(vae, second[:, :6], 2))


@pytest.mark.parametrize("cut", [0, 1, 2, 4])
def test_state_goes_through_a_file_and_continues_exactly(vae, tmp_path, cut):
    latents = some_latents(vae)
    stream = vae.streaming_decoder()
    if cut:
        stream.decode(latents[:, :cut])
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    expected = stream.decode(latents[:, cut:])  # moves on; the saved state must not

    resumed = vae.streaming_decoder()
    resumed.decode(some_latents(vae, seed=9))
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(resumed.decode(latents[:, cut:]), expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state | {"features.0": state["features.0"][:, :, -1:]},  # of one frame
        lambda state: state | {"features.9": torch.empty(0)},  # a mark that there was none
        lambda state: dict(list(state.items())[:-1]),
        lambda state: state | {"features.x": torch.zeros(1)},
        lambda state: state | {"features.3": state["features.3"][:, :1]},
    ],
)
def test_states_that_do_not_fit_are_refused(vae, change):
    """An earlier version's, after one latent frame, was taken and broke the next block."""
    first, second = (vae.streaming_decoder() for _ in range(2))
    latents = some_latents(vae)
    first.decode(latents[:, :3])
    second.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="start the stream again"):
        second.load_state_dict(change(first.state_dict()))
    assert torch.equal(second.decode(latents[:, 3:]), first.decode(latents[:, 3:]))


def test_state_does_not_grow_with_the_stream(vae):
    stream = vae.streaming_decoder()

    def size():
        return {key: value.shape for key, value in stream.state_dict().items()}

    stream.decode(some_latents(vae, frames=3))
    early = size()
    stream.decode(some_latents(vae, frames=6))
    assert size() == early
    assert not any(value.requires_grad for value in stream.state_dict().values())


def test_closed_stream_refuses_to_decode(vae):
    stream = vae.streaming_decoder()
    stream.decode(some_latents(vae, frames=1))
    stream.close()
    with pytest.raises(RuntimeError, match="closed"):
        stream.decode(some_latents(vae, frames=1))


def test_stream_refuses_another_shape_and_no_frames(vae):
    stream = vae.streaming_decoder()
    stream.decode(some_latents(vae, frames=1))
    with pytest.raises(ValueError, match="this stream has"):
        stream.decode(some_latents(vae, frames=1, batch=2))
    with pytest.raises(ValueError, match="f > 0"):
        stream.decode(some_latents(vae, frames=1)[:, :0])


# --- files -------------------------------------------------------------------------------------


def test_save_official_then_load_is_exact(vae, vae_file, tmp_path):
    vae.save_official(tmp_path / "again.pth")
    first, again = (torch.load(p, weights_only=True) for p in (vae_file, tmp_path / "again.pth"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert [p.name for p in tmp_path.iterdir()] == ["again.pth"]


def test_random_depends_on_its_seed_alone():
    torch.manual_seed(5)
    expected_draw = torch.rand(1)
    torch.manual_seed(5)
    one, same, other = (WanVAE.random(base_dim=4, seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.rand(1), expected_draw)
    key = "conv2.weight"
    assert torch.equal(one.official_state_dict()[key], same.official_state_dict()[key])
    assert not torch.equal(one.official_state_dict()[key], other.official_state_dict()[key])


@pytest.mark.parametrize("names", ["official", "diffusers"])
def test_safetensors_load_under_either_names(vae, tmp_path, names):
    state = vae.official_state_dict() if names == "official" else vae.model.state_dict()
    save_file(state, tmp_path / "vae.safetensors")
    latents = some_latents(vae, frames=2)
    loaded = WanVAE.from_official(tmp_path / "vae.safetensors")
    assert torch.equal(loaded.decode(latents), vae.decode(latents))


def test_diffusers_folder_loads_with_its_own_statistics(vae, tmp_path):
    vae.model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    recorded = str(vae.model.config["latents_mean"][0])
    config.write_text(config.read_text().replace(recorded, "0.25", 1))
    loaded = WanVAE.from_official(tmp_path)
    assert loaded.latents_mean[0] == 0.25
    assert torch.equal(loaded.latents_mean[1:], vae.latents_mean[1:])
    assert loaded.official_state_dict().keys() == vae.official_state_dict().keys()


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.pth does not exist"):
        WanVAE.from_official(tmp_path / "nowhere.pth")


@pytest.mark.parametrize("name", ["vae.pth", "vae.safetensors"])
def test_broken_file_is_a_user_error(vae_file, tmp_path, name):
    """A file cut short, a page in place of the file, a pointer of git-lfs, nothing at all."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    for content in (vae_file.read_bytes()[:2000], b"<html></html>", pointer, b""):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=r"fetch it again|git lfs pull"):
            WanVAE.from_official(tmp_path / name)


def test_another_networks_file_is_a_user_error(tmp_path):
    write_tiny_text_encoder(tmp_path)
    with pytest.raises(UserError, match=r"not a Wan2\.1 VAE"):
        WanVAE.from_official(tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")


def test_weights_in_a_dict_of_a_trainer_load(vae, tmp_path):
    """They were refused here and read for the transformer."""
    inside = {f"vae.{key}": value for key, value in vae.official_state_dict().items()}
    torch.save({"state_dict": inside, "step": 3}, tmp_path / "model.pt")
    loaded = WanVAE.from_official(tmp_path / "model.pt").official_state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in vae.official_state_dict().items())


def test_missing_unexpected_and_misshapen_keys_are_named(vae, tmp_path):
    state = vae.official_state_dict()
    key = "decoder.middle.0.residual.2.bias"
    changes = {
        rf"1 keys missing \({key}\)": {k: v for k, v in state.items() if k != key},
        r"1 keys unexpected \(decoder\.stray\)": state | {"decoder.stray": torch.zeros(1)},
        rf"1 of another size \({key} is 3, not \d+\)": state | {key: torch.zeros(3)},
    }
    for message, weights in changes.items():
        torch.save(weights, tmp_path / "vae.pth")
        with pytest.raises(UserError, match=message):
            WanVAE.from_official(tmp_path / "vae.pth")


def test_a_frugal_vae_decodes_the_same_and_ends_with_an_error() -> None:
    """Three states of the decoder were alive at once, 5 GiB at 832x480, where one is enough."""
    vae = WanVAE.random(base_dim=8)
    latents = torch.randn(1, 7, 16, 2, 2, generator=torch.Generator().manual_seed(0))
    expected = vae.decode(latents)
    vae.frugal = True
    decoder = vae.streaming_decoder()
    found = [decoder.decode(part) for part in latents.split((1, 3, 3), dim=1)]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-4, rtol=0)
    with pytest.raises(MemoryError), decoder.undone_by_errors():
        raise MemoryError
    with pytest.raises(RuntimeError, match="closed"):
        decoder.decode(latents)
