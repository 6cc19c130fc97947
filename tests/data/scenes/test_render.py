import itertools
from collections import Counter

import cv2
import numpy as np
import pytest
from sklearn.datasets import load_digits

from hf_vlm.data.scenes.canvas import SPLIT_STRIPS, Canvas, load_pictures
from hf_vlm.data.scenes.render import (
    NUM_SAMPLES,
    PRESETS,
    SceneSettings,
    render_clip,
    render_scene,
    scene_settings,
)
from hf_vlm.data.scenes.stream import SEMANTIC_CLASSES


def box_of(mask):
    """Tight box of a boolean mask, by looking at every pixel."""
    points = [(x, y) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]]
    left, top = min(x for x, _ in points), min(y for _, y in points)
    return [left, top, max(x for x, _ in points) - left + 1, max(y for _, y in points) - top + 1]


def assert_same_scene(one, other):
    for name in vars(one):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


@pytest.mark.parametrize("preset", ["easy", "hard"])
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
            expected_semantic[mask] = SEMANTIC_CLASSES.index(str(category))
        np.testing.assert_array_equal(scene.semantic_mask, expected_semantic)
        assert scene.label == scene.categories[scene.areas.argmax()]


def test_a_scene_depends_on_seed_split_and_index_alone():
    settings = PRESETS["easy"]
    scene = render_scene(0, 7, settings)
    render_scene(0, 8, settings)
    assert_same_scene(scene, render_scene(0, 7, settings))
    others = [(1, 7, "train"), (0, 6, "train"), (7, 0, "train"), (0, 7, "test"), (0, 7, "validation")]
    for seed, index, split in others:
        assert not np.array_equal(scene.image, render_scene(seed, index, settings, split=split).image)


def test_digits_differ_from_their_background_by_the_contrast():
    settings = SceneSettings(min_digits=1, max_digits=1, min_contrast=0.3, max_contrast=0.3)
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
        image_size=96, min_digits=2, max_digits=4, min_digit_size=12, max_digit_size=16, max_rotation=0, num_classes=3
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


def test_overlap_is_bounded_by_the_settings():
    opacity = np.full((10, 10), 255, dtype=np.uint8)
    canvas = Canvas(np.zeros((32, 32, 3), dtype=np.float32))
    paint = {"color": np.array([255, 0, 0], dtype=np.float32), "category": 1}
    canvas.paint(opacity, 0, 0, track_id=0, **paint)
    assert canvas.is_free(opacity, 10, 0, max_overlap=0.0)
    assert not canvas.is_free(opacity, 9, 0, max_overlap=0.09)
    assert canvas.is_free(opacity, 9, 0, max_overlap=0.1)
    canvas.paint(opacity, 7, 0, track_id=1, **paint)  # leaves 70 of 100 pixels
    assert not canvas.is_free(opacity, 0, 9, max_overlap=0.3)  # 7 more
    scene = canvas.scene()
    assert scene.areas.tolist() == [70, 100]
    assert scene.boxes.tolist() == [[0, 0, 7, 10], [7, 0, 10, 10]]


def test_painting_cuts_off_what_lies_outside():
    canvas = Canvas(np.zeros((8, 8, 3), dtype=np.float32))
    opacity = np.full((5, 5), 255, dtype=np.uint8)
    white = np.full(3, 255, dtype=np.float32)
    canvas.paint(opacity, -2, -3, color=white, category=0, track_id=0)
    canvas.paint(opacity, 6, 5, color=white, category=1, track_id=1)
    expected = np.zeros((8, 8), dtype=np.uint8)
    expected[:2, :3], expected[5:, 6:] = 1, 2
    np.testing.assert_array_equal(canvas.scene().instance_mask, expected)
    np.testing.assert_array_equal(canvas.scene().image[:, :, 0], 255 * (expected > 0))


def test_hidden_digits_leave_the_truth():
    canvas = Canvas(np.zeros((16, 16, 3), dtype=np.float32))
    opacity = np.full((10, 10), 255, dtype=np.uint8)
    color = np.full(3, 200, dtype=np.float32)
    canvas.paint(opacity, 0, 0, color=color, category=4, track_id=0)
    canvas.paint(opacity, 0, 1, color=color, category=5, track_id=1)  # 10 of 100 pixels of the first remain
    scene = canvas.scene()
    assert (scene.categories.tolist(), scene.track_ids.tolist()) == ([5], [1])
    assert scene.instance_mask.max() == 1
    assert scene.semantic_mask[0].max() == 0


def test_splits_have_no_digit_and_no_photograph_in_common():
    train, validation, test = (load_pictures(split) for split in NUM_SAMPLES)
    for category in range(10):
        samples = [{glyph.tobytes() for glyph in part.glyphs[category]} for part in (train, validation, test)]
        assert sum(map(len, samples)) == len(set.union(*samples))
        assert len(samples[0]) > 2.9 * len(samples[1]) > 2.9 * 33
    total = sum(len(glyphs) for part in (train, validation, test) for glyphs in part.glyphs)
    assert total == len(load_digits().images) == 1797
    for photo in range(2):
        numbers = [number for strips in SPLIT_STRIPS.values() for number in strips[photo]]
        assert sorted(numbers) == [0, 1, 2, 3, 4]


def test_clips_move_and_keep_their_tracks():
    settings = SceneSettings(min_digits=3, max_digits=3, max_speed=3.0, image_size=96)
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


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="unknown preset of scenes 'eazy'; there are easy, hard"):
        scene_settings("eazy")
    with pytest.raises(ValueError, match=r"max_digit_size=60 must be between 4 and 35.5"):
        SceneSettings(max_digit_size=60)
    with pytest.raises(ValueError, match=r"num_classes=11 must be between 1 and 10"):
        SceneSettings(num_classes=11)
    with pytest.raises(ValueError, match=r"min_digits=4 must be between 1 and 3"):
        SceneSettings(min_digits=4)
