import itertools
from collections import Counter
from dataclasses import replace

import cv2
import numpy as np
import pytest

from hf_vlm.data.scenes.render import (
    NUM_SAMPLES,
    PRESETS,
    SceneSettings,
    render_clip,
    render_scene,
    scene_settings,
)
from hf_vlm.data.scenes.symbols import SYMBOLS


def box_of(mask):
    """Tight box of a boolean mask, by looking at every pixel."""
    points = [(x, y) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]]
    left, top = min(x for x, _ in points), min(y for _, y in points)
    return [left, top, max(x for x, _ in points) - left + 1, max(y for _, y in points) - top + 1]


def assert_same_scene(one, other):
    for name in vars(one):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


@pytest.mark.parametrize("preset", PRESETS)
def test_truth_agrees_with_the_pixels(preset):
    settings = PRESETS[preset]
    for index in range(12):
        scene = render_scene(3, index, settings)
        assert scene.image.shape == (settings.image_size, settings.image_size, 3)
        assert scene.image.dtype == np.uint8
        assert np.unique(scene.instance_mask).tolist() == list(range(len(scene.boxes) + 1))
        expected_semantic = np.zeros_like(scene.semantic_mask)
        for row, (box, category, area) in enumerate(zip(scene.boxes, scene.categories, scene.areas)):
            mask = scene.instance_mask == row + 1
            assert box.tolist() == box_of(mask)
            assert area == mask.sum()
            expected_semantic[mask] = 1 + category
        np.testing.assert_array_equal(scene.semantic_mask, expected_semantic)
        assert scene.label == scene.categories[scene.areas.argmax()]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_scene_depends_on_seed_split_and_index_alone(preset):
    settings = PRESETS[preset]
    scene = render_scene(0, 7, settings)
    render_scene(0, 8, settings)
    assert_same_scene(scene, render_scene(0, 7, settings))
    others = [(1, 7, "train"), (0, 6, "train"), (7, 0, "train"), (0, 7, "test"), (0, 7, "validation")]
    for seed, index, split in others:
        assert not np.array_equal(scene.image, render_scene(seed, index, settings, split=split).image)


# Rendered when the presets were new: data that runs were trained on must stay what it was.
@pytest.mark.parametrize(
    ("preset", "split", "index", "categories", "boxes", "color"),
    [
        ("easy", "train", 0, [2, 1], [[3, 10, 16, 24], [24, 17, 14, 23]], [18.41, 72.71, 60.52]),
        ("easy", "test", 5, [0], [[33, 20, 12, 19]], [9.2, 66.29, 45.63]),
        (
            "hard",
            "train",
            0,
            [5, 3, 7, 7, 7, 4, 7, 9],
            [
                *([9, 39, 30, 31], [78, 68, 19, 31], [103, 47, 9, 13], [104, 55, 16, 20]),
                *([80, 13, 30, 35], [11, 72, 15, 23], [8, 23, 11, 19], [13, 100, 15, 21]),
            ],
            [9.17, 61.72, 53.78],
        ),
        ("symbols", "test", 0, [1, 3], [[52, 57, 21, 35], [13, 4, 49, 49]], [63.31, 107.24, 108.6]),
    ],
)
def test_presets_stay_as_they_are(preset, split, index, categories, boxes, color):
    scene = render_scene(0, index, PRESETS[preset], split=split)
    assert scene.categories.tolist() == categories
    assert scene.boxes.tolist() == boxes
    np.testing.assert_allclose(scene.image.mean(axis=(0, 1)), color, atol=0.02)


@pytest.mark.parametrize("split", NUM_SAMPLES)
def test_symbols_of_every_class_are_rendered_as_often(split):
    settings = PRESETS["symbols"]
    assert settings.class_names == tuple(SYMBOLS)
    categories, numbers = Counter(), Counter()
    for index in range(300):
        scene = render_scene(1, index, settings, split=split)
        categories.update(scene.categories.tolist())
        numbers[len(scene.boxes)] += 1
        assert scene.areas.min() > 20
        assert scene.boxes[:, 2:].max() <= 96
    assert set(numbers) == {1, 2, 3, 4}
    expected = categories.total() / len(SYMBOLS)
    assert all(0.6 * expected < categories[category] < 1.4 * expected for category in range(len(SYMBOLS)))


def test_digits_differ_from_their_background_by_the_contrast():
    settings = SceneSettings(min_objects=1, max_objects=1, min_contrast=0.3, max_contrast=0.3)
    luma = np.array([0.299, 0.587, 0.114])
    differences = []
    for index in range(40):
        scene = render_scene(0, index, settings)
        x, y, width, height = scene.boxes[0].astype(int)
        around = scene.image[y : y + height, x : x + width] @ luma
        digit = scene.instance_mask[y : y + height, x : x + width] == 1
        inner = cv2.erode(digit.astype(np.uint8), np.ones((3, 3))) == 1
        if inner.sum() > 20:
            differences.append(abs(around[inner].mean() - around[~digit].mean()) / 255)
    assert len(differences) > 20
    assert 0.22 < np.median(differences) < 0.42


def test_counts_sizes_and_overlap_follow_the_settings():
    settings = SceneSettings(
        image_size=96,
        min_objects=2,
        max_objects=4,
        min_object_size=12,
        max_object_size=16,
        max_rotation=0,
        num_classes=3,
    )
    numbers, categories = Counter(), Counter()
    for index in range(60):
        scene = render_scene(0, index, settings)
        numbers[len(scene.boxes)] += 1
        categories.update(scene.categories.tolist())
        # An upright digit fills the eight rows of its sample or nearly so; smoothing moves edges below a pixel.
        assert scene.boxes[:, 3].max() <= 16 * 9 / 8 + 1
        assert scene.boxes[:, 3].min() >= 12 * 6 / 8
    assert set(numbers) == {2, 3, 4}
    assert set(categories) == {0, 1, 2}
    assert min(categories.values()) > 0.2 * sum(categories.values())


def test_clips_move_and_keep_their_tracks():
    settings = SceneSettings(min_objects=3, max_objects=3, max_speed=3.0, image_size=96)
    frames = render_clip(0, 4, 24, settings)
    assert_same_scene(frames[5], render_clip(0, 4, 6, settings)[5])
    for previous, current in itertools.pairwise(frames):
        shared = set(previous.track_ids.tolist()) & set(current.track_ids.tolist())
        assert shared
        for track in shared:
            before, after = previous.track_ids.tolist().index(track), current.track_ids.tolist().index(track)
            assert previous.categories[before] == current.categories[after]
            if min(previous.areas[before], current.areas[after]) > 0.9 * max(
                frame.areas[frame.track_ids == track].max(initial=0) for frame in frames
            ):
                centers = [
                    frame.boxes[row, :2] + frame.boxes[row, 2:] / 2
                    for frame, row in ((previous, before), (current, after))
                ]
                assert np.abs(centers[1] - centers[0]).max() <= 3.0 + 1.5
        # The photograph moves too, but slowly.
        assert 0 < np.abs(current.image.astype(float) - previous.image).mean() < 40
    visible = [frame for frame in frames if 0 in frame.track_ids]
    assert np.abs(visible[0].boxes[0] - visible[-1].boxes[0]).max() > 3


def test_clips_of_symbols_keep_shapes_and_colours():
    settings = replace(PRESETS["symbols"], min_objects=2, max_objects=2, max_speed=1.0)
    frames = render_clip(0, 1, 6, settings)
    assert_same_scene(frames[3], render_clip(0, 1, 4, settings)[3])
    for previous, current in itertools.pairwise(frames):
        assert previous.categories.tolist() == current.categories.tolist()
        np.testing.assert_allclose(previous.boxes, current.boxes, atol=4)
        for row in range(len(current.boxes)):
            colors = [frame.image[frame.instance_mask == row + 1].mean(axis=0) for frame in (previous, current)]
            np.testing.assert_allclose(*colors, atol=12)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"objects='letters' must be one of digits, symbols"):
        SceneSettings(objects="letters")
    with pytest.raises(ValueError, match=r"backgrounds='sky' must be one of photographs, landscapes"):
        SceneSettings(backgrounds="sky")
    with pytest.raises(ValueError, match=r"num_classes=9 must be between 1 and 8"):
        SceneSettings(objects="symbols", num_classes=9)
    with pytest.raises(ValueError, match=r"scenes have no split 'val'; there are train, validation, test"):
        render_scene(0, 0, PRESETS["symbols"], split="val")
    with pytest.raises(ValueError, match="unknown preset of scenes 'eazy'; there are easy, hard, captions, icons"):
        scene_settings("eazy")
    with pytest.raises(ValueError, match=r"max_object_size=60 must be between 4 and 35.5"):
        SceneSettings(max_object_size=60)
    with pytest.raises(ValueError, match=r"num_classes=11 must be between 1 and 10"):
        SceneSettings(num_classes=11)
    with pytest.raises(ValueError, match=r"min_objects=4 must be between 1 and 3"):
        SceneSettings(min_objects=4)


def test_a_shaking_camera_displaces_all_objects_alike():
    still = SceneSettings(min_objects=2, max_objects=2, max_speed=1.0, image_size=96)
    shaking = replace(still, camera_shake=3.0)
    moved = []
    for before, after in zip(render_clip(0, 3, 12, still), render_clip(0, 3, 12, shaking), strict=True):
        rows = [
            (np.flatnonzero(before.track_ids == track)[0], np.flatnonzero(after.track_ids == track)[0])
            for track in set(before.track_ids.tolist()) & set(after.track_ids.tolist())
        ]
        inside = [
            after.boxes[j, :2] - before.boxes[i, :2]
            for i, j in rows
            if (after.boxes[j, :2] > 1).all() and (after.boxes[j, :2] + after.boxes[j, 2:] < 95).all()
        ]
        for displacement in inside:
            np.testing.assert_allclose(displacement, inside[0], atol=1.5)
        moved += inside
    assert 1 < np.abs(moved).max() <= 3 + 1
