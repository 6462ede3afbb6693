import subprocess

import numpy as np
import pytest
import torch
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image

from utils.errors import UserError
from utils.video import (
    VideoInfo,
    VideoWriter,
    contact_sheet,
    fit_frames,
    frame_rate,
    part_path,
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
    show = [get_ffmpeg_exe(), "-i", str(tmp_path / "red.mp4")]
    header = subprocess.run(show, capture_output=True, text=True, check=False).stderr
    assert "h264" in header
    assert "yuv420p(tv, bt709, " in header  # matrix, primaries and transfer alike


def test_file_has_a_temporary_name_until_it_is_closed(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    with VideoWriter(path) as writer:
        writer.write(gradient())
        assert path.read_bytes() == b"old"
        assert (tmp_path / "clip.part.mp4").exists()
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


@pytest.mark.parametrize("stem", ["a" * 251, "é" * 125 + "x", "🎬" * 62 + "abc", "100%d: a?"])
def test_any_legal_name_can_be_written(tmp_path, stem):
    path = tmp_path / f"{stem}.mp4"
    assert len(part_path(path).name.encode()) <= 255
    with VideoWriter(path) as writer:
        writer.write(gradient(frames=2))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert len(read_video(path)) == 2


def test_long_names_that_differ_at_the_end_have_different_parts(tmp_path):
    one, two = (part_path(tmp_path / ("a" * 250 + end + ".mp4")) for end in "xy")
    assert one != two


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
        pytest.raises(UserError, match="Cannot write"),
        VideoWriter(tmp_path / "file" / "clip.mp4") as writer,
    ):
        writer.write(gradient())


def test_encoder_failure_is_a_user_error_and_leaves_nothing(tmp_path):
    with (
        pytest.raises(UserError, match="Cannot write"),
        VideoWriter(tmp_path / "clip.mp4", fps=-1) as writer,
    ):
        writer.write(gradient())
    assert list(tmp_path.iterdir()) == []


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
    with pytest.raises(UserError, match="Cannot write"):
        write_png(tmp_path / "new" / "image.png" / "image.png", image)
