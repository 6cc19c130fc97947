"""Captions of scenes are true, and their hard negatives are false: words are read back and counted."""

import re

import numpy as np

from hf_vlm.data.scenes.captions import KINDS, NUMBERS, hard_negatives, scene_captions
from hf_vlm.data.scenes.colors import NAMED_COLORS
from hf_vlm.data.scenes.render import PRESETS, SceneSettings, render_scene
from hf_vlm.data.scenes.stream import scenes_source

SETTINGS = PRESETS["captions"]
RELATIONS = "left of|right of|above|below"


def read(caption):
    """A caption as [(count, color, digit), ...] and the relation between the first two."""
    relation = next(iter(re.findall(RELATIONS, caption)), "")
    groups = []
    for phrase in re.split(rf" and |, | (?:{RELATIONS}) ", caption):
        number, color, name = phrase.split()
        digit = NUMBERS.index(name.removesuffix("es" if name == "sixes" else "s"))
        groups.append((1 if number in ("a", "an") else NUMBERS.index(number), color, digit))
    return groups, relation


def is_true(caption, scene):
    groups, relation = read(caption)
    objects = [(SETTINGS.color_names[color], digit) for color, digit in zip(scene.colors, scene.categories)]
    counted = all(objects.count((color, digit)) == count for count, color, digit in groups)
    if not relation:
        return counted and sum(count for count, *_ in groups) == len(objects)
    axis, sign = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}[relation]
    centers = (scene.boxes[:, :2] + scene.boxes[:, 2:] / 2)[:, axis]
    first, second = ([c for c, o in zip(centers, objects) if o == group[1:]] for group in groups)
    return counted and all(sign * (b - a) > 0 for a in first for b in second)


def scenes():
    return [render_scene(0, index, SETTINGS) for index in range(60)]


def test_captions_are_true():
    several = 0
    for scene in scenes():
        captions = scene_captions(scene, SETTINGS)
        assert captions
        assert all(is_true(caption, scene) for caption in captions)
        several += len(captions) > 1
    assert several > 10


def test_hard_negatives_are_false_and_differ_in_their_kind_alone():
    rng, found = np.random.default_rng(0), dict.fromkeys(KINDS, 0)
    for scene in scenes():
        for kind, (true, false) in hard_negatives(scene, SETTINGS, rng).items():
            assert is_true(true, scene)
            assert not is_true(false, scene)
            found[kind] += 1
            (groups, relation), (others, other) = read(true), read(false)
            assert (relation == other) == (kind != "relation")
            changed = [index for index in range(3) if [g[index] for g in groups] != [g[index] for g in others]]
            assert changed == {"class": [2], "color": [1], "count": [0], "relation": []}[kind]
    assert min(found.values()) > 10


def test_objects_have_the_colours_that_captions_name():
    for scene in scenes()[:20]:
        for row, color in enumerate(scene.colors):
            pixels = scene.image[scene.instance_mask == row + 1].astype(float)  # (n, 3)
            seen = np.median(pixels, axis=0)
            nearest = min(NAMED_COLORS, key=lambda name: np.linalg.norm(seen - NAMED_COLORS[name]))
            assert nearest == SETTINGS.color_names[color]


def test_every_preset_has_captions():
    found = {name: scenes_source(name, num_samples=1) for name in ("easy", "symbols")}
    for name, source in found.items():
        (example,) = source
        assert example["text"] == scene_captions(render_scene(0, 0, PRESETS[name]), PRESETS[name])
    plain = SceneSettings(num_classes=9, min_objects=1, max_objects=1)
    texts = {text for index in range(60) for text in scene_captions(render_scene(0, index, plain), plain)}
    assert {"an eight", "a seven"} <= texts
