import json

import pytest

from utils.errors import UserError
from utils.prompts import (
    ImagePrompt,
    clip_utf8,
    output_names,
    read_extended_prompts,
    read_image_prompts,
    read_prompts,
    safe_stem,
)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def names(prompts, num_samples=1):
    return output_names(prompts, num_samples, with_index=False, ema=True)


def test_one_prompt_per_line(tmp_path):
    path = write(tmp_path / "p.txt", b"\xef\xbb\xbfa cat\r\n\n   \na dog, \xe4\xb8\xad \n")
    assert read_prompts(path) == ["a cat", "a dog, 中"]


def test_only_line_ends_separate_prompts(tmp_path):
    """`str.splitlines` also splits at U+2028 and form feeds, which occur inside prompts."""
    path = write(tmp_path / "p.txt", "one\u2028still one\x0cstill\ntwo\n")
    assert len(read_prompts(path)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "one prompt per line"), (b" \n\n", "one prompt per line"), (b"\xff\xfea\0", "UTF-8")],
)
def test_bad_prompt_files_say_what_to_do(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read_prompts(write(tmp_path / "p.txt", content))


def test_missing_file_and_folder_say_what_to_do(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(UserError, match="--i2v"):
        read_prompts(tmp_path)


def test_extended_prompts_match_line_by_line(tmp_path):
    path = write(tmp_path / "long.txt", "a long cat\n\na long dog\n")
    assert read_extended_prompts(path, ["cat", "dog"]) == ["a long cat", "a long dog"]
    with pytest.raises(UserError, match="2 extended prompts for 1 prompts"):
        read_extended_prompts(path, ["cat"])


@pytest.fixture
def listed(tmp_path):
    """The published form, as far as it is read."""
    entries = [
        {
            "file_name": f"{name}.jpg",
            "caption": f"a {name}",
            "type": "animal",
            "origin_width": 64,
            "origin_height": 48,
            "target_crop": {"target_bbox": [0, 0, 64, 37], "target_ratio": "26-15"},
        }
        for name in ("zebra", "ant")
    ]
    for name in ("zebra", "ant"):
        write(tmp_path / "26-15" / f"{name}.jpg", b"image")
    write(tmp_path / "target_crop_info_26-15.json", json.dumps(entries))
    return tmp_path, entries


def test_listed_images_come_in_the_order_of_the_list(listed):
    folder, _ = listed
    assert read_image_prompts(folder) == [
        ImagePrompt(folder / "26-15" / "zebra.jpg", "a zebra"),
        ImagePrompt(folder / "26-15" / "ant.jpg", "a ant"),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file_name": "gnu.jpg"}, r"gnu\.jpg, but there is no image .*26-15/gnu\.jpg"),
        ({"caption": " "}, 'no "caption" for ant'),
        ({"caption": None}, 'no "caption" for ant'),
    ],
)
def test_list_errors_name_the_entry(listed, change, message):
    folder, entries = listed
    entries[1].update(change)
    write(folder / "target_crop_info_26-15.json", json.dumps(entries))
    with pytest.raises(UserError, match=message):
        read_image_prompts(folder)


@pytest.mark.parametrize("content", ["{", '{"a": 1}', "[1]", '[{"file_name": "ant.jpg"}]', "7"])
def test_list_of_another_form_is_refused(listed, content):
    folder, _ = listed
    write(folder / "target_crop_info_26-15.json", content)
    with pytest.raises(UserError, match="JSON list of objects"):
        read_image_prompts(folder)


def test_two_lists_are_refused(listed):
    folder, _ = listed
    write(folder / "target_crop_info_16-9.json", "[]")
    with pytest.raises(UserError, match="keep one"):
        read_image_prompts(folder)


def test_captioned_images_are_sorted_by_name(tmp_path):
    for name, text in [("b.PNG", "a\nb "), ("a.webp", "first"), ("c.d.jpg", "third")]:
        write(tmp_path / name, b"image")
        write((tmp_path / name).with_suffix(".txt"), text)
    write(tmp_path / "notes.md", "not an image")
    found = read_image_prompts(tmp_path)
    assert [(p.image_path.name, p.prompt) for p in found] == [
        ("a.webp", "first"),
        ("b.PNG", "a b"),
        ("c.d.jpg", "third"),
    ]


def test_image_folder_errors(tmp_path):
    with pytest.raises(UserError, match="holds no image"):
        read_image_prompts(tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        read_image_prompts(write(tmp_path / "p.txt", "a cat"))
    write(tmp_path / "cat.png", b"image")
    with pytest.raises(UserError, match=r"cat\.png has no prompt"):
        read_image_prompts(tmp_path)


@pytest.mark.parametrize(
    "prompt",
    ["A cat, walking; it's 5 o'clock: why? (yes) #1 & 100%", "中文提示", "a 🐈‍⬛ cat", "x" * 100],
)
def test_unproblematic_prompts_are_unchanged(prompt):
    assert safe_stem(prompt) == prompt


@pytest.mark.parametrize(
    ("prompt", "stem"),
    [
        ("a/b\\c", "a_b_c"),
        ("a\0b\nc\td\x7fe\u2028f", "a_b_c_d_e_f"),
        ("../../etc", "_.._etc"),
        ("..hidden", "hidden"),
        ("the end. ", "the end"),
        ("x" * 99 + " tail", "x" * 99),
        ("con", "_con"),
        ("NUL.txt", "_NUL.txt"),
        ("console", "console"),
        ("...", "_"),
        ("", "_"),
        ("bad \ud800 end", "bad _ end"),
        ("y" * 150, "y" * 100),
    ],
)
def test_problematic_prompts_become_safe(prompt, stem):
    assert safe_stem(prompt) == stem


@pytest.mark.parametrize(
    "prompt", ["🎬" * 100, "é." * 100, "中" * 66 + "ab" + "中" * 30, "/" * 200]
)
def test_stems_can_always_be_written(tmp_path, prompt):
    (name,) = names([prompt])[0]
    assert len(safe_stem(prompt).encode()) <= 200
    write(tmp_path / name, b"video")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_clip_cuts_between_characters():
    assert clip_utf8("aé中🎬", 10) == "aé中🎬"
    assert [clip_utf8("aé中🎬", n) for n in (0, 1, 2, 3, 5, 6, 9)] == [
        "", "a", "a", "aé", "aé", "aé中", "aé中",
    ]  # fmt: skip


def test_published_names():
    assert names(["a cat", "b" * 120], 2) == [
        ["a cat-0.mp4", "a cat-1.mp4"],
        ["b" * 100 + "-0.mp4", "b" * 100 + "-1.mp4"],
    ]
    prompts = ["same", "same"]
    assert output_names(prompts, 2, with_index=True, ema=True)[1] == ["1-0_ema.mp4", "1-1_ema.mp4"]
    assert output_names(prompts, 1, with_index=True, ema=False)[0] == ["0-0_regular.mp4"]


@pytest.mark.parametrize(
    ("prompts", "stems"),
    [
        (["cat", "cat", "cat"], ["cat", "cat_2", "cat_3"]),
        (["Cat", "cat"], ["Cat", "cat_2"]),
        (["z" * 100 + "1", "z" * 100 + "2"], ["z" * 100, "z" * 100 + "_2"]),
        (["a/b", "a\\b"], ["a_b", "a_b_2"]),
        (["caf\u00e9", "cafe\u0301"], ["caf\u00e9", "cafe\u0301_2"]),
        (["cat", "cat", "cat_2"], ["cat", "cat_3", "cat_2"]),
        (["cat", "CAT_2", "CAT"], ["cat", "CAT_2", "CAT_3"]),
    ],
)
def test_colliding_prompts_get_distinct_names(prompts, stems):
    assert names(prompts) == [[f"{stem}-0.mp4"] for stem in stems]


def test_many_equal_long_prompts_stay_distinct_and_short():
    flat = [name for row in names(["🎬" * 60] * 500 + ["🎬" * 51 + "_7"], 2) for name in row]
    assert len({name.casefold() for name in flat}) == len(flat) == 1002
    assert max(len(name.encode()) for name in flat) <= 215
