"""What is encoded, kept and read again: every frame comes back, in order, from any key frame."""

import io
import json
import struct
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from server.fragments import TICKS, FragmentEncoder
from server.recording import JpegReader, Mp4Reader, Recording, thumbnail
from server.storage import Storage
from utils.errors import UserError

BLOCK, FPS = 4, 16


def grey(start: int, count: int = BLOCK, size: tuple[int, int] = (32, 48)) -> np.ndarray:
    """Frames whose brightness is their number (times 5)."""
    numbers = np.arange(start, start + count, dtype=np.uint8) * 5
    return np.broadcast_to(numbers[:, None, None, None], (count, *size, 3)).copy()


def decoded(data: bytes | str) -> list[tuple[float, int]]:
    """(seconds, number by brightness) of each frame of a file."""
    with av.open(io.BytesIO(data) if isinstance(data, bytes) else str(data)) as file:
        frames = file.decode(video=0)
        return [(f.time, round(f.to_ndarray(format="rgb24").mean() / 5)) for f in frames]


def expected(first: int, end: int) -> list[tuple[float, int]]:
    return [(number / FPS, number) for number in range(first, end)]


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def boxes(data: bytes) -> list[str]:
    names, start = [], 0
    while start < len(data):
        size, name = struct.unpack_from(">I4s", data, start)
        names.append(name.decode())
        start += size
    return names


@pytest.fixture
def storage(tmp_path):
    return Storage(tmp_path / "videos", 10**8)


@pytest.fixture
def recording(storage):
    """Three blocks."""
    made = Recording(storage, "a" * 32, (32, 48), FPS)
    for start in (0, BLOCK, 2 * BLOCK):
        made.add(grey(start))
    yield made
    made.discard()


@pytest.mark.parametrize(
    ("size", "codec"), [((64, 64), "avc1.42C00A"), ((33, 47), "avc1.42C00A"), ((480, 832), None)]
)
def test_every_frame_leaves_at_once(size, codec):
    """The library's muxer kept each frame until the next one came, the last one for ever."""
    with FragmentEncoder(*size, FPS) as encoder:
        assert boxes(encoder.init) == ["ftyp", "moov"]
        assert encoder.codec == (codec or "avc1.42C01E")
        frames = encoder.encode(grey(0, size=size))
        data = encoder.init
        for number in range(BLOCK):
            one = next(frames)
            assert boxes(one) == ["moof", "mdat"]
            data += one
            assert decoded(data) == expected(0, number + 1)
    with av.open(io.BytesIO(data)) as file:
        stream = file.streams.video[0]
        assert (stream.height, stream.width) == (size[0] + size[0] % 2, size[1] + size[1] % 2)
        assert (stream.codec_context.profile, stream.pix_fmt) == ("Constrained Baseline", "yuv420p")
        assert 1 / stream.time_base == FPS * TICKS
        assert [packet.is_keyframe for packet in file.demux(stream) if packet.size][:2] == [1, 0]


def test_file_is_a_video_at_any_time(recording):
    assert decoded(recording.path.read_bytes()) == expected(0, 3 * BLOCK)
    with av.open(str(recording.path)) as file:
        keys = [p.is_keyframe for p in file.demux(video=0) if p.size]
    assert [number for number, key in enumerate(keys) if key] == [0, BLOCK, 2 * BLOCK]


@pytest.mark.parametrize(
    ("seconds", "frame"),
    [(0, 0), (0.2, 0), (0.25, 4), (0.3, 4), (0.49999999, 8), (0.74, 8), (99, 8), (1e300, 8)],
)
def test_key_frame_before(recording, seconds, frame):
    assert recording.key_frame_before(seconds) == frame


def test_empty_recording_has_a_place_to_start(storage):
    made = Recording(storage, "b" * 32, (32, 48), FPS)
    assert made.key_frame_before(3.0) == 0
    made.discard()


@pytest.mark.parametrize("first", [0, BLOCK, 2 * BLOCK])
def test_reader_goes_on_from_a_key_frame(recording, first):
    reader = Mp4Reader(recording, first)
    messages = reader.read(64)
    assert messages == [recording.init]
    messages += reader.read(3) + reader.read(64)
    assert not reader.ready
    recording.add(grey(3 * BLOCK))
    assert reader.ready
    messages += reader.read(64)
    assert decoded(b"".join(messages)) == expected(first, 4 * BLOCK)


@pytest.mark.parametrize("first", [0, BLOCK])
def test_jpeg_reader(recording, first):
    """An odd size is padded for H.264 and cut again here."""
    reader = JpegReader(recording, first)
    images = [np.asarray(Image.open(io.BytesIO(data))) for data in reader.read(2) + reader.read(9)]
    assert [round(image.mean() / 5) for image in images] == list(range(first, first + 11))[
        : 12 - first
    ]
    assert images[0].shape == (32, 48, 3)


def test_jpeg_has_the_size_of_the_video(storage):
    made = Recording(storage, "b" * 32, (33, 47), FPS)
    made.add(grey(0, size=(33, 47)))
    (data,) = JpegReader(made, 0).read(1)
    assert Image.open(io.BytesIO(data)).size == (47, 33)
    made.discard()


def test_saved_video_is_seekable_and_complete(recording):
    path = recording.save()
    assert boxes(path.read_bytes())[:2] == ["ftyp", "moov"]
    assert "moof" not in boxes(path.read_bytes())
    assert decoded(path) == expected(0, 3 * BLOCK)
    state = path.stat().st_mtime_ns
    assert recording.save().stat().st_mtime_ns == state
    recording.add(grey(3 * BLOCK))
    assert decoded(recording.save()) == expected(0, 4 * BLOCK)


def test_branch_has_its_parents_frames(recording, storage):
    branch = Recording.of_branch(recording, "c" * 32, 2 * BLOCK)
    assert branch.init == recording.init
    branch.add(grey(20))
    recording.add(grey(3 * BLOCK))
    both = expected(0, 2 * BLOCK) + [((8 + k) / FPS, 20 + k) for k in range(BLOCK)]
    assert decoded(branch.path.read_bytes()) == both
    assert decoded(branch.save()) == both
    assert decoded(recording.save()) == expected(0, 4 * BLOCK)
    assert branch.key_frame_before(0.5) == 2 * BLOCK
    branch.discard()


def test_finished_video_outlives_the_session(recording, storage):
    recording.finish({"seed": 3})
    assert recording.read(0, 4) == b""  # a slow reader may still ask
    recording.discard()
    again = Storage(storage.folder, storage.limit)
    for known in (storage, again):
        assert decoded(known.finished("a" * 32, ".mp4")) == expected(0, 3 * BLOCK)
        assert json.loads(known.finished("a" * 32, ".json").read_text()) == {"seed": 3}
        assert known.finished("../" + "a" * 32, ".mp4") is None
        assert known.finished("b" * 32, ".mp4") is None
        files = sum(path.stat().st_size for path in storage.folder.iterdir())
        assert known.used == files
    assert sorted(path.suffixes for path in storage.folder.iterdir()) == [[".json"], [".mp4"]]


def test_a_video_without_frames_leaves_nothing(storage):
    made = Recording(storage, "b" * 32, (32, 48), FPS)
    made.finish({})
    assert list(storage.folder.iterdir()) == []
    assert storage.used == 0


def test_limit_of_the_disk(tmp_path):
    """The growing file counts twice: its mp4 is written before it goes."""
    storage = Storage(tmp_path, 12_000)
    made = Recording(storage, "a" * 32, (32, 48), FPS)
    frames = np.concatenate([grey(number % 50) for number in range(1000)])
    with pytest.raises(UserError, match="fill their limit of"):
        made.add(frames)
    assert 4 < made.frames < 100
    assert storage.used == 2 * made.path.stat().st_size
    assert decoded(made.path.read_bytes())[-1][0] == (made.frames - 1) / FPS
    made.finish({})
    files = [path.stat().st_size for path in tmp_path.iterdir()]
    assert sum(files) == storage.used < 12_000
    with pytest.raises(UserError, match="--disk_limit"):
        storage.reserve(12_000)


def test_removed_videos_give_room(tmp_path):
    """Who removed some, as the sentence says, was refused until the server was started again."""
    storage = Storage(tmp_path, 10**6)
    for name in ("a" * 32, "b" * 32):
        made = Recording(storage, name, (32, 48), FPS)
        made.add(grey(0))
        made.finish({})
    size = storage.path("a" * 32, ".mp4").stat().st_size
    storage.limit = storage.used
    with pytest.raises(UserError, match="remove some"):
        storage.reserve(1)
    storage.path("a" * 32, ".mp4").unlink()
    storage.reserve(size)
    with pytest.raises(UserError, match="remove some"):
        storage.reserve(1)


def test_a_video_stays_where_its_mp4_has_no_room(recording, storage, monkeypatch):
    """It was removed: the growing file is all there was of it."""

    def no_room(*_):
        raise UserError("no space left on device")

    monkeypatch.setattr("server.recording.write_mp4", no_room)
    with recording.path.open("ab") as file:
        file.write(b"the first part of a frame")
    recording.finish({"seed": 3})
    path = storage.finished("a" * 32, ".mp4")
    assert decoded(path) == expected(0, 3 * BLOCK)
    assert b"first part" not in path.read_bytes()
    assert storage.finished("a" * 32, ".json")
    assert storage.used == sum(path.stat().st_size for path in storage.folder.iterdir())
    assert not recording.path.exists()


def test_no_file_stays_open(recording, storage):
    before = open_files()
    for number in range(5):
        made = Recording(storage, f"{number:032x}", (32, 48), FPS)
        made.add(grey(0))
        made.save()
        JpegReader(made, 0).read(4)
        made.finish({})
    assert open_files() == before


def test_no_file_stays_where_there_is_no_room(recording, storage):
    """Each recording that could not begin left a file, and it open."""
    before, files = open_files(), sorted(storage.folder.iterdir())
    full = Storage(storage.folder, 10)
    with pytest.raises(UserError, match="fill their limit"):
        Recording(full, "c" * 32, (32, 48), FPS)
    assert (open_files(), sorted(storage.folder.iterdir())) == (before, files)
    made = Recording(storage, "d" * 32, (32, 48), FPS)
    made.add(grey(0))
    frames = made.frames
    made.discard()
    with pytest.raises(UserError, match="was closed meanwhile"):
        Recording.of_branch(made, "e" * 32, frames)
    assert (open_files(), sorted(storage.folder.iterdir())) == (before, files)


def test_thumbnail():
    url = thumbnail(grey(3, 1, (480, 832))[0])
    assert url.startswith("data:image/jpeg;base64,")
    assert len(url) < 4000
