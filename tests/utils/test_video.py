import os
import resource
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from PIL import Image

from utils.errors import UserError
from utils.files import is_temporary
from utils.video import (
    Picture,
    VideoInfo,
    VideoWriter,
    _timed,
    _turns,
    at_rate,
    contact_sheet,
    fit_frames,
    frame_rate,
    pad_to_even,
    probe_video,
    read_image,
    read_video,
    read_video_chunks,
    spread_frames,
    thumbnails,
    to_float,
    to_uint8,
    write_png,
)


def gradient(frames=6, height=32, width=48):
    """A smooth coloured clip, so that compression changes it by little."""
    t, y, x = torch.meshgrid(
        torch.linspace(0, 1, frames),
        torch.linspace(0, 1, height),
        torch.linspace(0, 1, width),
        indexing="ij",
    )
    return (torch.stack([x, y, 0.2 + 0.6 * t], dim=-1) * 255).to(torch.uint8)


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, fps=12) as writer:
        writer.write(gradient())
    return path


def test_blocks_come_back_as_one_video_with_its_colours(tmp_path):
    video = gradient(frames=7)
    with VideoWriter(tmp_path / "new" / "clip.mp4", fps=12, crf=10) as writer:
        writer.write(video[:3])
        writer.write(video[3:].numpy())
        assert writer.frames_written == 7
    back = read_video(tmp_path / "new" / "clip.mp4")
    assert back.shape == video.shape
    assert back.dtype == torch.uint8
    assert (back.float() - video.float()).abs().mean() < 3
    info = probe_video(tmp_path / "new" / "clip.mp4")
    assert info == VideoInfo(frames=7, fps=12.0, height=32, width=48)


def test_part_of_a_video_is_the_same_part_of_the_whole(clip):
    whole = read_video(clip)
    assert torch.equal(read_video(clip, 2, 3), whole[2:5])
    assert torch.equal(read_video(clip, 4, 3), whole[4:])
    with pytest.raises(UserError, match="no video frame"):
        read_video(clip, 6, 1)


def test_colour_matrix_is_tagged_so_that_pure_colours_survive(tmp_path):
    red = torch.zeros(3, 64, 64, 3, dtype=torch.uint8)
    red[..., 0], red[..., 1] = 200, 30
    with VideoWriter(tmp_path / "red.mp4") as writer:
        writer.write(red)
    assert (read_video(tmp_path / "red.mp4").float() - red.float()).abs().max() < 8
    flat = read_video(tmp_path / "red.mp4").float().mean((0, 1, 2))
    assert (flat - torch.tensor([200, 30, 0])).abs().max() <= 1  # each matrix is applied once
    with av.open(str(tmp_path / "red.mp4")) as file:
        codec = file.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
        assert (codec.color_range, codec.colorspace) == (1, 1)  # limited, BT.709
        assert (codec.color_primaries, codec.color_trc) == (1, 1)


def test_file_has_a_temporary_name_until_it_is_closed(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    with VideoWriter(path) as writer:
        writer.write(gradient())
        assert path.read_bytes() == b"old"
        assert [is_temporary(p) for p in sorted(tmp_path.iterdir())].count(True) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]
    assert len(read_video(path)) == 6


def test_exception_leaves_the_old_file_and_no_part(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")

    def fail():
        with VideoWriter(path) as writer:
            writer.write(gradient())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]
    assert path.read_bytes() == b"old"


def test_no_frame_makes_no_file(tmp_path):
    with VideoWriter(tmp_path / "clip.mp4") as writer:
        writer.write(gradient()[:0])
    assert list(tmp_path.iterdir()) == []


def test_odd_sizes_are_padded_with_the_edge(tmp_path):
    video = gradient(height=33, width=47)
    with VideoWriter(tmp_path / "odd.mp4", crf=5) as writer:
        writer.write(video)
    back = read_video(tmp_path / "odd.mp4").float()
    assert back.shape == (6, 34, 48, 3)
    assert (back[:, :33, :47] - video.float()).abs().mean() < 4
    assert (back[:, 33, :47] - video[:, 32].float()).abs().mean() < 6


def test_even_sizes_are_not_copied():
    """`np.pad` copied 14 MB a block with nothing to pad."""
    pixels = gradient().numpy()
    assert pad_to_even(pixels) is pixels


@pytest.mark.parametrize("stem", ["a" * 251, "é" * 125 + "x", "🎬" * 62 + "abc", "100%d: a?"])
def test_any_legal_name_can_be_written(tmp_path, stem):
    path = tmp_path / f"{stem}.mp4"
    with VideoWriter(path) as writer:
        writer.write(gradient(frames=2))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert len(read_video(path)) == 2


def test_writer_refuses_other_types_and_sizes(tmp_path):
    with VideoWriter(tmp_path / "clip.mp4") as writer:
        writer.write(gradient())
        with pytest.raises(ValueError, match="after frames"):
            writer.write(gradient(height=34))
        with pytest.raises(ValueError, match="uint8"):
            writer.write(gradient().float())
        with pytest.raises(ValueError, match="uint8"):
            writer.write(gradient()[0])
    with pytest.raises(UserError, match=r"\.mp4"):
        VideoWriter(tmp_path / "clip.avi")


def test_unwritable_place_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with (
        pytest.raises(UserError, match="annot write"),
        VideoWriter(tmp_path / "file" / "clip.mp4") as writer,
    ):
        writer.write(gradient())


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files makes the same failure as a full disk, in the same place."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 64, 64, 3), dtype=np.uint8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with (
            pytest.raises(UserError, match="cannot write"),
            VideoWriter(tmp_path / "clip.mp4", crf=1) as writer,
        ):
            writer.write(noise)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_an_impossible_rate_is_refused(tmp_path: Path, fps: float) -> None:
    with pytest.raises(UserError, match="frames per second"):
        VideoWriter(tmp_path / "clip.mp4", fps=fps)


def test_rates_need_not_be_whole(tmp_path: Path) -> None:
    for fps in (23.976, Fraction(30000, 1001), 12.5):
        with VideoWriter(tmp_path / "clip.mp4", fps=fps) as writer:
            writer.write(gradient(5))
        assert frame_rate(tmp_path / "clip.mp4") == pytest.approx(float(fps), rel=1e-3)


def test_chunks_join_to_the_whole_video(clip):
    chunks = list(read_video_chunks(clip, 4))
    assert [len(chunk) for chunk in chunks] == [4, 2]
    assert torch.equal(torch.cat(chunks), read_video(clip))
    assert frame_rate(clip) == 12


def all_chunks(path):
    return list(read_video_chunks(path))


@pytest.mark.parametrize("read", [read_video, probe_video, read_image, all_chunks, frame_rate])
def test_unreadable_files_are_user_errors(tmp_path, clip, read):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(clip.read_bytes()[:40] + b"nonsense" * 20)
    with pytest.raises(UserError, match="Cannot read"):
        read(broken)
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "none.mp4")
    with pytest.raises(UserError, match="is a folder"):
        read(tmp_path)


def mux(
    path: Path,
    pixels: np.ndarray,
    times: Sequence[int],
    *,
    codec: str = "libx264",
    form: str = "yuv420p",
    options: dict[str, str] | None = None,
    aspect: int | None = None,
    turned: int = 0,
) -> None:
    """A file by hand: frames at `times` (in 1/1000 s)."""
    with av.open(str(path), "w", container_options=options or {}) as file:
        stream = file.add_stream(codec, rate=16)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = form
        stream.codec_context.time_base = Fraction(1, 1000)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        if turned:
            stream.set_display_rotation(turned)
        for frame, time in zip(pixels, times, strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgba" if "a" in form else "rgb24")
            picture.pts, picture.time_base = time, Fraction(1, 1000)
            file.mux(stream.encode(picture))
        file.mux(stream.encode(None))


FASTSTART = {"movflags": "+faststart"}
UNEVEN = [0, 20, 40, 200, 240, 500, 520, 560, 700, 1000]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mp4", {}),
        ("a.mov", {}),
        ("a.mkv", {}),
        ("a.webm", {}),
        ("a.ts", {}),
        ("a.avi", {}),
        ("fragmented.mp4", {"movflags": "frag_keyframe+empty_moov"}),
    ],
)
def test_all_readers_count_the_same_frames(tmp_path: Path, name: str, options: dict) -> None:
    """Probe, decoder and mean rate had three notions of a frame where time stamps are uneven."""
    path = tmp_path / name
    codec = "libvpx" if name.endswith("webm") else "mpeg4" if name.endswith("avi") else "libx264"
    mux(path, gradient(10, 48, 64).numpy(), UNEVEN, codec=codec, options=options)
    count = probe_video(path).frames
    assert count == len(read_video(path)) == sum(len(c) for c in read_video_chunks(path, 4)) == 10
    assert len(spread_frames(path, 3)) == 3
    for fps in (5, 16, 100):
        assert probe_video(path, fps).frames == len(read_video(path, fps=fps))


def shown(times: Sequence[float], fps: float, last: float | None = None) -> list[int]:
    """Which of the pictures that start at `times` (s) are seen at a rate."""
    ends = [*times[1:], times[-1] + (times[1] - times[0] if last is None else last)]
    pictures = [
        Picture(Fraction(start), Fraction(end) - Fraction(start), frame)  # type: ignore[arg-type]
        for frame, (start, end) in enumerate(zip(times, ends, strict=True))
    ]
    return [int(picture.frame) for picture in at_rate(pictures, fps)]  # type: ignore[call-overload]


def test_frames_at_a_rate_are_those_on_show() -> None:
    """A clip of 48 frames per second was continued in slow motion: its rate was not read."""
    assert shown([n / 48 for n in range(9)], 16) == [0, 3, 6]
    assert shown([n / 8 for n in range(3)], 16) == [0, 0, 1, 1, 2, 2]
    assert shown([n / 16 for n in range(7)], 16) == list(range(7))
    assert shown([round(n / 16, 3) for n in range(50)], 16) == list(range(50)), "milliseconds"
    jitter = np.random.default_rng(0).uniform(-0.01, 0.01, 50)
    times = [0.0, *(n / 16 + jitter[n] for n in range(1, 50))]
    assert shown(times, 16) == list(range(50)), "a phone's clock"
    assert shown([0, 1.0, 1.1], 4, last=0.4) == [0, 0, 0, 0, 1, 2], "a still is held"
    assert len(shown([n / 25 for n in range(25)], 16)) == 16


def test_part_at_a_rate_is_the_same_part_of_the_whole(clip: Path) -> None:
    whole = read_video(clip, fps=30)
    assert len(whole) == 15
    assert torch.equal(read_video(clip, 4, 3, fps=30), whole[4:7])
    small = read_video(clip, fps=30, size=(16, 16))
    assert torch.equal(small, fit_frames(whole, 16, 16))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("name", ["faststart.mp4", "fragmented.mp4", "a.mkv", "a.webm", "a.avi"])
def test_cut_files_are_refused(tmp_path: Path, name: str, share: float) -> None:
    """Their first part was used as if it were the whole video."""
    whole = tmp_path / name
    moves = {"faststart.mp4": "+faststart", "fragmented.mp4": "frag_keyframe+empty_moov"}
    options = {"movflags": moves[name]} if name in moves else {}
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), dtype=np.uint8)
    codec = {"a.webm": "libvpx", "a.avi": "mpeg4"}.get(name, "libx264")
    mux(whole, noise, range(0, 2000, 50), codec=codec, options=options)
    assert probe_video(whole).frames == 40
    cut = tmp_path / f"cut{whole.suffix}"
    cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
    for read in (read_video, probe_video, all_chunks):
        with pytest.raises(UserError, match="complete"):
            read(cut)


def test_a_file_cut_between_two_frames_is_refused(tmp_path: Path) -> None:
    """All that is there decodes; only the index of the file tells that there was more."""
    mux(tmp_path / "a.mp4", gradient(9).numpy(), range(0, 450, 50), options=FASTSTART)
    with av.open(str(tmp_path / "a.mp4")) as file:
        ends = sorted((packet.pos or 0) + packet.size for packet in file.demux(video=0))
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[: ends[-3]])
    with pytest.raises(UserError, match=r"\d of 9 frames are there"):
        probe_video(tmp_path / "cut.mp4")


def test_frames_of_two_sizes_are_refused(tmp_path: Path) -> None:
    parts = [tmp_path / f"{size}.h264" for size in (32, 64)]
    for part, size in zip(parts, (32, 64), strict=True):
        mux(part, gradient(3, size, size).numpy(), [0, 50, 100])
    (tmp_path / "both.h264").write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(UserError, match="change their size"):
        read_video(tmp_path / "both.h264")


def test_a_file_that_changed_is_counted_anew(tmp_path: Path) -> None:
    """Also if its size is the same: a box without content fills the shorter one up."""
    contents = []
    for count in (5, 9):
        mux(tmp_path / "a.mp4", gradient(count).numpy(), range(0, 50 * count, 50))
        contents.append((tmp_path / "a.mp4").read_bytes())
    missing = len(contents[1]) - len(contents[0])
    assert missing >= 8
    contents[0] += missing.to_bytes(4, "big") + b"free" + bytes(missing - 8)
    for time, (content, count) in enumerate(zip(contents, (5, 9), strict=True), 1):
        (tmp_path / "a.mp4").write_bytes(content)
        os.utime(tmp_path / "a.mp4", ns=(time, time))
        assert probe_video(tmp_path / "a.mp4").frames == count


def test_damage_in_the_middle_is_refused(tmp_path: Path) -> None:
    """The decoder fills it with what it guesses."""
    path = tmp_path / "a.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (20, 48, 64, 3), dtype=np.uint8)
    mux(path, noise, range(0, 1000, 50))
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4000] = b"\xff" * 4000
    path.write_bytes(data)
    with pytest.raises(UserError, match="Cannot read"):
        read_video(path)


def test_pixels_are_square_and_the_picture_upright(tmp_path: Path) -> None:
    """A pixel aspect of 2 was ignored: people came out thin."""
    pixels = gradient(3, 48, 64).numpy()
    mux(tmp_path / "wide.mp4", pixels, [0, 50, 100], aspect=2)
    assert read_video(tmp_path / "wide.mp4").shape == (3, 48, 128, 3)
    info = probe_video(tmp_path / "wide.mp4")
    assert (info.height, info.width) == (48, 128)
    mux(tmp_path / "turned.mp4", pixels, [0, 50, 100], turned=90)
    turned = read_video(tmp_path / "turned.mp4")
    info = probe_video(tmp_path / "turned.mp4")
    assert (3, info.height, info.width, 3) == turned.shape == (3, 64, 48, 3)
    upright = torch.from_numpy(np.rot90(pixels, 1, (1, 2)).copy()).float()
    assert (turned.float() - upright).abs().mean() < 4
    mux(tmp_path / "mistaken.mp4", pixels, [0, 50, 100], aspect=9)  # no file is made so
    assert read_video(tmp_path / "mistaken.mp4").shape == (3, 48, 64, 3)


@pytest.mark.parametrize(
    ("matrix", "turns"),
    [
        ((-1, 0, 0, 1), (False, False, True)),
        ((1, 0, 0, -1), (False, True, False)),
        ((0, 1, 1, 0), (True, False, False)),
        ((0, -1, 1, 0), (True, True, False)),
        ((0, 1, -1, 0), (True, False, True)),
    ],
)
def test_mirrored_pictures(matrix: Sequence[int], turns: Sequence[bool]) -> None:
    """`matrix` a, b, c, d of x' = a x + c y, y' = b x + d y."""
    a, b, c, d = matrix
    held = np.array([a, b, 0, c, d, 0, 0, 0, 1], np.int32) << 16
    assert _turns(SimpleNamespace(side_data={"DISPLAYMATRIX": held.tobytes()})) == turns


def test_time_stamps_that_say_nothing_follow_the_rate() -> None:
    """One that stands twice, or is missing; and a length of one tick of the clock."""
    tick = Fraction(1, 16000)
    frames = [
        SimpleNamespace(pts=pts, time_base=tick, duration=1) for pts in (500, 1500, 1500, None)
    ]
    stream = SimpleNamespace(guessed_rate=16, sample_aspect_ratio=None)
    found = list(_timed(frames, stream))
    assert [picture.start * 16 for picture in found] == [0, 1, 2, 3]
    assert [picture.length * 16 for picture in found] == [1, 1, 1, 1]


@pytest.mark.parametrize(("width", "red", "green"), [(64, 181, 70), (1280, 191, 78)])
def test_untagged_high_definition_is_bt709(
    tmp_path: Path, width: int, red: int, green: int
) -> None:
    """As players have it: smaller video is BT.601."""
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = 32, width, "yuv420p"
        planes = [np.full((32, width), 100), np.full((8, width), 90), np.full((8, width), 180)]
        pixels = np.concatenate(planes).astype(np.uint8)
        file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="yuv420p")))
        file.mux(stream.encode(None))
    mean = read_video(tmp_path / "a.mp4").float().mean(dim=(0, 1, 2))
    assert (mean[:2] - torch.tensor([red, green])).abs().max() < 3


@pytest.mark.parametrize(
    ("name", "codec", "form"),
    [
        ("a.mp4", "libx264", "yuv420p10le"),
        ("a.mp4", "libx264", "yuvj420p"),
        ("a.mkv", "ffv1", "yuv444p"),
        ("a.mov", "png", "rgb24"),
        ("a.mp4", "libx264", "yuv420p"),
    ],
)
def test_formats_of_pixels_keep_their_colours(
    tmp_path: Path, name: str, codec: str, form: str
) -> None:
    pixels = np.full((2, 48, 64, 3), (200, 60, 20), np.uint8)
    mux(tmp_path / name, pixels, [0, 50], codec=codec, form=form)
    error = (read_video(tmp_path / name).float() - torch.from_numpy(pixels).float()).abs()
    assert error.mean() < 3


def test_transparent_video_is_laid_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((2, 48, 64, 4), np.uint8)
    pixels[:, :24, :, 3] = 255
    mux(tmp_path / "a.mov", pixels, [0, 50], codec="png", form="rgba")
    video = read_video(tmp_path / "a.mov")
    assert (video[:, :24] == 0).all()
    assert (video[:, 24:] == 255).all()


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=48000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), "fltp", "mono")
        sound.sample_rate = 48000
        file.mux(stream.encode(sound))
        file.mux(stream.encode(None))
    for read in (read_video, probe_video, all_chunks, frame_rate):
        with pytest.raises(UserError, match="only sound"):
            read(tmp_path / "a.mp4")


def test_the_cover_of_a_song_is_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        song, cover = file.add_stream("aac", rate=48000), file.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), "fltp", "mono")
        sound.sample_rate = 48000
        for stream, frame in ((cover, av.VideoFrame(64, 64, "yuvj420p")), (song, sound)):
            for packet in [*stream.encode(frame), *stream.encode(None)]:
                file.mux(packet)
    with pytest.raises(UserError, match="only sound"):
        probe_video(tmp_path / "a.mp4")


def test_image_is_turned_as_its_exif_tag_says(tmp_path):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # show turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    image = read_image(tmp_path / "turned.png")
    assert image.shape == (32, 16, 3)
    assert image[:16].min() == 255  # left became top
    assert image[16:].max() == 0


def test_transparency_is_laid_on_white(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2, :, 3] = 255
    Image.fromarray(pixels, "RGBA").save(tmp_path / "alpha.png")
    image = read_image(tmp_path / "alpha.png")
    assert image.dtype == torch.uint8
    assert image[:2].max() == 0
    assert image[2:].min() == 255


@pytest.mark.parametrize(
    ("mode", "colour", "rgb"),
    [
        ("CMYK", (0, 255, 255, 0), (254, 0, 0)),
        ("L", 90, (90, 90, 90)),
        ("P", 0, (0, 0, 0)),
        ("1", 1, (255, 255, 255)),
        ("LA", (90, 255), (90, 90, 90)),
    ],
)
def test_colour_modes_become_rgb(tmp_path, mode, colour, rgb):
    Image.new(mode, (8, 8), colour).save(tmp_path / "image.tiff")
    image = read_image(tmp_path / "image.tiff")
    assert image.shape == (8, 8, 3)
    assert (image.int() - torch.tensor(rgb)).abs().max() <= 2


def test_sixteen_bit_grey_keeps_its_brightness(tmp_path):
    Image.fromarray(np.full((4, 4), 32768, np.uint16)).save(tmp_path / "grey.png")
    assert (read_image(tmp_path / "grey.png") == 128).all()


@pytest.mark.parametrize(
    ("values", "levels"),
    [
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 100, 200]], np.float32), [0, 100, 200]),
        (np.array([[-1, 0, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 100, 200]], np.int32), [0, 100, 200]),
        (np.array([[0, 32768, 65535]], np.int32), [0, 128, 255]),
        (np.array([[-1000, 0, 1000]], np.int32), [0, 128, 255]),
    ],
)
def test_deep_grey_keeps_its_scale(tmp_path: Path, values: np.ndarray, levels: list[int]) -> None:
    """Pillow clips the modes F and I to 0 to 255: they came out black or white."""
    Image.fromarray(values).save(tmp_path / "grey.tiff")
    assert read_image(tmp_path / "grey.tiff")[0, :, 0].tolist() == levels


def test_of_an_animation_the_first_frame_is_read(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    for suffix in ("gif", "webp"):
        first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[second], lossless=True)
        image = read_image(tmp_path / f"a.{suffix}")
        assert image[0, 0].tolist() == [255, 0, 0]


def test_too_many_pixels_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_png(tmp_path / "a.png", gradient(1)[0])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="too many pixels"):
        read_image(tmp_path / "a.png")


def test_fit_keeps_the_aspect_and_the_centre():
    video = torch.zeros(2, 40, 80, 3, dtype=torch.uint8)
    video[:, :, 20:60] = 200  # the centre square is bright
    square = fit_frames(video, 20, 20)
    assert square.shape == (2, 20, 20, 3)
    assert square[:, :, 1:-1].min() > 180
    wide = fit_frames(video, 20, 40)
    assert wide[:, :, :9].max() < 20
    assert wide[:, :, 11:29].min() > 180


def test_fit_is_antialiased_and_exact_where_nothing_changes():
    stripes = torch.zeros(1, 48, 48, 3, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    small = fit_frames(stripes, 16, 16)[:, 2:-2, 2:-2].float()
    assert (small - 127.5).abs().max() < 30  # one pixel in three would be 0 or 255
    assert torch.equal(fit_frames(stripes.numpy(), 48, 48), stripes)


@pytest.mark.parametrize("size", [(16, 16), (48, 32), (31, 97), (480, 832)])
def test_fit_reaches_any_size(size):
    assert fit_frames(gradient(frames=1, height=37, width=53), *size).shape == (1, *size, 3)


def test_float_and_back_is_exact_for_every_level():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(2, -1, -1, 3)
    video = to_float(levels)
    assert video.shape == (2, 3, 16, 16)
    assert (video.min(), video.max()) == (-1, 1)
    assert torch.equal(to_uint8(video), levels)
    assert torch.equal(to_uint8(video[None]), levels[None])


def test_to_uint8_clamps_and_rounds():
    video = torch.tensor([-1.5, 1.5, 0.0, 0.01]).view(1, 1, 1, 4).expand(1, 3, 1, 4)
    assert to_uint8(video)[0, 0, :, 0].tolist() == [0, 255, 128, 129]
    assert to_uint8(video.bfloat16())[0, 0, :2, 0].tolist() == [0, 255]


def test_contact_sheet_shows_first_and_last_frame_of_each_video():
    video = torch.arange(9, dtype=torch.uint8).view(9, 1, 1, 1).expand(9, 4, 6, 3)
    sheet = contact_sheet([video, 10 * video.numpy()], columns=3, gap=1)
    assert sheet.shape == (2 * 5 - 1, 3 * 7 - 1, 3)
    assert sheet[0, [0, 7, 14], 0].tolist() == [0, 4, 8]
    assert sheet[5, [0, 7, 14], 0].tolist() == [0, 40, 80]
    assert (sheet[4] == 255).all()
    assert contact_sheet(video, columns=2, gap=0).shape == (4, 12, 3)


@pytest.mark.parametrize(
    ("length", "chosen"),
    [(1, [0, 0, 0]), (2, [0, 1]), (7, [0]), (65, [0, 32, 64]), (150, [0, 50, 99, 149])],
)
def test_spread_frames_are_those_of_the_whole_video(tmp_path, length, chosen):
    """Also over the edges of the pieces of 64 frames in which a file is read."""
    noise = np.random.default_rng(0).integers(0, 256, (length, 16, 16, 1), dtype=np.uint8)
    with VideoWriter(tmp_path / "clip.mp4") as writer:
        writer.write(noise.repeat(3, axis=-1))
    whole = read_video(tmp_path / "clip.mp4")
    assert len(torch.unique(whole, dim=0)) == length
    assert torch.equal(spread_frames(tmp_path / "clip.mp4", len(chosen)), whole[chosen])


def test_thumbnails_double_small_frames_and_reduce_large_ones():
    small = gradient(frames=2, height=5, width=6)
    doubled = thumbnails(small)
    assert doubled.shape == (2, 10, 12, 3)
    for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert torch.equal(doubled[:, y::2, x::2], small)
    assert torch.equal(thumbnails(gradient(height=90, width=160)), gradient(height=90, width=160))
    reduced = thumbnails(gradient(frames=1, height=480, width=832))
    assert reduced.shape == (1, 148, 256, 3)
    exact = gradient(frames=1, height=148, width=256).float()
    assert (reduced.float() - exact).abs().mean() < 2


def test_png_comes_back_unchanged(tmp_path):
    image = gradient(frames=1)[0]
    write_png(tmp_path / "new" / "image.png", image)
    assert torch.equal(read_image(tmp_path / "new" / "image.png"), image)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["image.png"]
    with pytest.raises(UserError, match="annot write"):
        write_png(tmp_path / "new" / "image.png" / "image.png", image)
