"""The sentences that the page offers for the shapes model are captions of its world."""

import json
import re
from pathlib import Path

import pytest

from shapes.world import BACKGROUNDS, COLOURS, DIRECTIONS, KINDS, SIZES, SPEEDS, parse_caption

COMPOSER = Path(__file__).parents[2] / "wan_models" / "Shapes" / "composer.json"


def composed():
    """Sentences in which every word of every slot is said once, two shapes of two colours."""
    composer = json.loads(COMPOSER.read_text())
    words, distinct = composer["words"], composer["distinct"]
    for template in composer["template"]:
        slots = re.findall(r"\{(\w+)\}", template)
        for round in range(max(len(words[slot]) for slot in slots)):
            said = {slot: words[slot][round % len(words[slot])] for slot in slots}
            for _, second in distinct:
                if second in said:
                    said[second] = words[second][(round + 1) % len(words[second])]
            yield template.format(**said)


def test_every_composed_prompt_is_a_caption():
    scenes = [parse_caption(text) for text in composed()]
    assert {len(scene.shapes) for scene in scenes} == {1, 2}


@pytest.mark.parametrize("place", [0, 1])
def test_all_that_the_world_knows_can_be_said(place):
    scenes = [s for s in map(parse_caption, composed()) if len(s.shapes) == 2]
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    shapes = [scene.shapes[place] for scene in scenes]
    known = {"kind": KINDS, "colour": COLOURS, "size": SIZES}
    known |= {"direction": DIRECTIONS, "speed": SPEEDS}
    for name, table in known.items():
        assert {getattr(shape, name) for shape in shapes} == set(table), name
