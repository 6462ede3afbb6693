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
    [
        (b"", "one prompt per line"),
        (b" \n\n", "one prompt per line"),
        (b"caf\xe9", "not UTF-8"),
        (b"\xff\xfea", "not UTF-16"),
        (b"a\0c\0", "zero bytes"),
        (b"\x89PNG\r\n\x1a\n\0", "not UTF-8"),
    ],
)
def test_bad_prompt_files_say_what_to_do(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read_prompts(write(tmp_path / "p.txt", content))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_how_to_read(tmp_path, encoding):
    """Windows writes UTF-16, which was told to be no UTF-8."""
    path = write(tmp_path / "p.txt", "a cat\r\n中文\r\n".encode(encoding))
    assert read_prompts(path) == ["a cat", "中文"]


TWO = ["a cat, walking", 'a "dog"']


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.json", json.dumps(TWO)),
        ("p.JSON", json.dumps({"prompts": TWO, "author": "x"})),
        ("p.json", json.dumps([{"prompt_en": t, "dimension": ["colour"]} for t in TWO], indent=1)),
        ("p.txt", json.dumps([{"caption": t} for t in TWO], indent=1)),
        ("p.jsonl", "\n\n".join(json.dumps({"text": t, "seed": 1}) for t in TWO)),
        ("p.jsonl", "\n".join(map(json.dumps, TWO))),
        ("p.txt", "\n".join(json.dumps({"prompt": t}) for t in TWO)),
        ("p.csv", 'id,Prompt\n1,"a cat, walking"\n\n2,"a ""dog"""\n'),
        ("p.csv", 'caption;id\na cat, walking;1\n"a ""dog""";2\n'),
        ("p.csv", '\ufeff"prompt"\r\n"a cat, walking"\r\n"a ""dog"""\r\n'),
        ("p.tsv", 'text\tid\na cat, walking\t1\na "dog"\t2\n'),
    ],
)
def test_usual_forms_are_read(tmp_path, name, content):
    """They were taken as lines of text: nineteen videos of `{`."""
    assert read_prompts(write(tmp_path / name, content)) == TWO


def test_lines_may_begin_with_a_bracket(tmp_path):
    lines = ["[wide shot] a boat", "{slow} a cat"]
    assert read_prompts(write(tmp_path / "p.txt", "\n".join(lines))) == lines


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.json", '{"boat": "a boat"}', "JSON of another form"),
        ("p.json", '"a cat"', "JSON of another form"),
        ("p.json", '{"prompt": "a cat"}', "JSON of another form"),
        ("p.json", "a cat", r"not valid JSON \(line 1\)"),
        ("p.json", "[" * 100_000, "not readable as JSON"),
        ("p.json", "[" + "1" * 5000 + "]", "not readable as JSON"),
        ("p.txt", '[\n "a cat",\n]', r"not valid JSON \(line 3\)"),
        ("p.json", '["a", null]', "entry 2 has no prompt"),
        ("p.json", '["a", " "]', "entry 2 has no prompt"),
        ("p.json", '[{"prompt": 3}]', "entry 1 has no prompt"),
        ("p.json", '[{"name": "a"}]', "entry 1 names no prompt"),
        ("p.json", '[{"prompt": "a", "text": "b"}]', 'entry 1 has "prompt" and "text"'),
        ("p.json", "[]", "holds no prompt"),
        ("p.json", '["half \\ud83d"]', "prompt 1, 'half \\?', holds half a character"),
        ("p.jsonl", '{"prompt": "a"}\n{', r"not valid JSON \(line 2\)"),
        ("p.csv", "a cat\na dog\n", "the header names no prompt"),
        ("p.csv", "prompt\na cat, walking\n", "line 2 has 2 cells for 1 columns"),
        ("p.csv", "id,prompt\n1,a\n2\n", "line 3 has no prompt"),
        ("p.csv", 'prompt\n"a cat\n', "no readable table"),
        ("p.tsv", "text\tprompt\na\tb\n", 'has "text" and "prompt"'),
        ("p.json", '{"prompts": ["a"], "prompts": ["b"]}', "the key 'prompts' twice"),
        ("p.yaml", "- a cat\n", "no prompt file: give lines of text"),
        ("p.xlsx", "PK", "no prompt file: give lines of text"),
        ("p.md", "# Prompts\n", "no prompt file: give lines of text"),
    ],
)
def test_other_forms_are_refused_in_a_sentence(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        read_prompts(write(tmp_path / name, content))


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
    for name in ("cat.png", "dog.png"):
        write(tmp_path / name, b"image")
    with pytest.raises(UserError, match=r"cat\.png has no prompt, nor have 1 others"):
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
