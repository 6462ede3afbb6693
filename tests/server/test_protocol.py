"""What clients may say: each message with its bounds, and what is answered to anything else."""

import json

import pytest

from server.protocol import (
    Attach,
    Branch,
    Hidden,
    Limits,
    Playhead,
    ProtocolError,
    Start,
    Update,
    Verb,
    parse,
)

LIMITS = Limits(max_prompt=50)


@pytest.mark.parametrize(
    ("message", "meant"),
    [
        (
            {"type": "session.start", "prompt": " fox ", "unknown": [1]},
            Start("fox", None, None, None, "keep"),
        ),
        (
            {
                "type": "session.start",
                "prompt": "fox",
                "seed": 2**64 - 1,
                "seconds": 1.5,
                "format": "jpeg",
                "policy": "cut",
            },
            Start("fox", 2**64 - 1, 1.5, "jpeg", "cut"),
        ),
        ({"type": "session.start", "prompt": "x", "seed": 3.0}, Start("x", 3, None, None, "keep")),
        (
            {"type": "session.start", "prompt": "x", "sink": 0},
            Start("x", None, None, None, "keep", 0),
        ),
        ({"type": "session.attach", "id": "ab"}, Attach("ab", None)),
        ({"type": "session.attach", "id": "ab", "from_seconds": 0}, Attach("ab", 0.0)),
        (
            {"type": "session.prompt_update", "id": "1", "prompt": "owl"},
            Update("1", "owl", None, None, 0),
        ),
        (
            {
                "type": "session.prompt_update",
                "id": "1",
                "seed": 0,
                "policy": "recache",
                "transition_duration_chunks": 4,
            },
            Update("1", None, 0, "recache", 4),
        ),
        ({"type": "session.branch", "snapshot": 7}, Branch(7, None, None, None)),
        (
            {"type": "session.branch", "snapshot": 7, "prompt": "owl", "seed": 1, "policy": "cut"},
            Branch(7, "owl", 1, "cut"),
        ),
        ({"type": "session.pause"}, Verb("pause")),
        ({"type": "session.resume"}, Verb("resume")),
        ({"type": "session.stop"}, Verb("stop")),
        ({"type": "playhead", "seconds": 0}, Playhead(0.0)),
        ({"type": "hidden", "hidden": True}, Hidden(True)),
    ],
)
def test_messages(message, meant):
    assert parse(json.dumps(message), LIMITS) == meant


START = '{"type": "session.start", "prompt": "fox", '
UPDATE = '{"type": "session.prompt_update", "id": "u", '
HOSTILE = {
    # no JSON object
    "": "bad_json",
    "hello": "bad_json",
    "null": "bad_json",
    "[]": "bad_json",
    '"session.start"': "bad_json",
    "12": "bad_json",
    '{"type": "session.stop"': "bad_json",
    '{"type": "session.stop"} {}': "bad_json",
    "[" * 60000: "bad_json",
    '{"a":' * 12000: "bad_json",
    '{"type": "playhead", "seconds": ' + "9" * 5000 + "}": "bad_json",
    "x" * 70000: "too_large",
    # no type of ours
    "{}": "unknown_type",
    '{"type": null}': "unknown_type",
    '{"type": 3}': "unknown_type",
    '{"type": ["session.start"]}': "unknown_type",
    '{"type": {"session.start": 1}}': "unknown_type",
    '{"type": "session.destroy"}': "unknown_type",
    '{"type": "__class__"}': "unknown_type",
    '{"type": "SESSION.START", "prompt": "x"}': "unknown_type",
    # prompts
    '{"type": "session.start"}': "bad_field",
    '{"type": "session.start", "prompt": null}': "bad_field",
    '{"type": "session.start", "prompt": ""}': "bad_field",
    '{"type": "session.start", "prompt": " \\n\\t"}': "bad_field",
    '{"type": "session.start", "prompt": 7}': "bad_field",
    '{"type": "session.start", "prompt": ["a"]}': "bad_field",
    '{"type": "session.start", "prompt": {"a": "b"}}': "bad_field",
    '{"type": "session.start", "prompt": "\\ud800"}': "bad_field",
    '{"type": "session.start", "prompt": "' + "y" * 51 + '"}': "prompt_too_long",
    '{"type": "session.start", "prompt": "' + "y" * 60000 + '"}': "prompt_too_long",
    # seeds
    START + '"seed": -1}': "bad_field",
    START + '"seed": 18446744073709551616}': "bad_field",
    START + '"seed": 1.5}': "bad_field",
    START + '"seed": true}': "bad_field",
    START + '"seed": "1"}': "bad_field",
    START + '"seed": NaN}': "bad_field",
    START + '"seed": Infinity}': "bad_field",
    START + '"seed": 1e400}': "bad_field",
    # seconds
    START + '"seconds": 0}': "bad_field",
    START + '"seconds": -5}': "bad_field",
    START + '"seconds": NaN}': "bad_field",
    START + '"seconds": 1e9}': "bad_field",
    START + '"seconds": "10"}': "bad_field",
    START + '"seconds": true}': "bad_field",
    START + '"seconds": ' + "9" * 400 + "}": "bad_field",
    # words
    START + '"format": "webm"}': "bad_field",
    START + '"format": 4}': "bad_field",
    START + '"policy": "explode"}': "bad_field",
    START + '"policy": ["keep"]}': "bad_field",
    # changes
    '{"type": "session.prompt_update", "prompt": "owl"}': "bad_field",
    '{"type": "session.prompt_update", "prompt": "owl", "id": 3}': "bad_field",
    '{"type": "session.prompt_update", "prompt": "owl", "id": ""}': "bad_field",
    '{"type": "session.prompt_update", "prompt": "owl", "id": "' + "i" * 65 + '"}': "bad_field",
    UPDATE + '"prompt": null}': "bad_field",
    UPDATE + '"policy": "keep"}': "bad_field",
    UPDATE + '"prompt": "owl", "transition_duration_chunks": -1}': "bad_field",
    UPDATE + '"prompt": "owl", "transition_duration_chunks": 1000}': "bad_field",
    UPDATE + '"prompt": "owl", "transition_duration_chunks": "4"}': "bad_field",
    # places
    '{"type": "session.attach"}': "bad_field",
    '{"type": "session.attach", "id": ["x"]}': "bad_field",
    '{"type": "session.attach", "id": "x", "from_seconds": -1}': "bad_field",
    '{"type": "session.attach", "id": "x", "from_seconds": NaN}': "bad_field",
    '{"type": "session.branch"}': "bad_field",
    '{"type": "session.branch", "snapshot": "1"}': "bad_field",
    '{"type": "session.branch", "snapshot": -1}': "bad_field",
    '{"type": "session.branch", "snapshot": 1e300}': "bad_field",
    # the player
    '{"type": "playhead"}': "bad_field",
    '{"type": "playhead", "seconds": NaN}': "bad_field",
    '{"type": "playhead", "seconds": -Infinity}': "bad_field",
    '{"type": "playhead", "seconds": 1e400}': "bad_field",
    '{"type": "playhead", "seconds": "1"}': "bad_field",
    '{"type": "playhead", "seconds": [1]}': "bad_field",
    '{"type": "playhead", "seconds": false}': "bad_field",
    '{"type": "hidden"}': "bad_field",
    '{"type": "hidden", "hidden": 1}': "bad_field",
    '{"type": "hidden", "hidden": "true"}': "bad_field",
}


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:60])
def test_nonsense_is_refused(text):
    with pytest.raises(ProtocolError) as refused:
        parse(text, LIMITS)
    reply = refused.value.reply()
    assert reply["code"] == HOSTILE[text]
    assert len(json.dumps(reply)) < 300
    assert reply.get("id") == ("u" if text.startswith(UPDATE) else reply.get("id"))


def test_a_bounded_server_bounds_every_video():
    limits = Limits(max_seconds=60)
    assert parse('{"type": "session.start", "prompt": "x"}', limits).seconds == 60
    with pytest.raises(ProtocolError):
        parse('{"type": "session.start", "prompt": "x", "seconds": 61}', limits)
