"""Mosaic and copy-paste move boxes with the pixels that they are of."""

import numpy as np
import pytest
import torch

from hf_vlm.data.transforms.detection_mixing import DetectionMixSettings, mix_detection

HEIGHT, WIDTH = 48, 64
MOSAIC = DetectionMixSettings(mosaic_probability=1.0)
PASTE = DetectionMixSettings(copy_paste_probability=1.0)


def batch_of(boxes):
    """Images that are 0 but for a rectangle of ones at each box (left, top, right, bottom), one or none per image."""
    images, labels = torch.zeros(len(boxes), 3, HEIGHT, WIDTH), []
    for index, (image, box) in enumerate(zip(images, boxes)):
        relative = torch.zeros(0, 4)
        if box is not None:
            left, top, right, bottom = box
            image[:, top:bottom, left:right] = 1.0
            relative = torch.tensor([[left + right, top + bottom, 2 * (right - left), 2 * (bottom - top)]]) / 2
            relative = relative / torch.tensor([WIDTH, HEIGHT] * 2)
        labels.append({"class_labels": torch.full((len(relative),), index), "boxes": relative, "image_id": index})
    return images, labels


def corners(labels):
    """Boxes (n, 4) in pixels: left, top, right, bottom."""
    centre, extent = labels["boxes"].split(2, dim=-1)
    return torch.cat([centre - extent / 2, centre + extent / 2], dim=-1) * torch.tensor([WIDTH, HEIGHT] * 2)


def test_the_box_of_a_mosaic_is_where_its_object_is_shown():
    rng, seen = np.random.default_rng(0), []
    for _ in range(30):
        left, top = rng.integers((WIDTH - 20, HEIGHT - 16)).tolist()
        images, labels = batch_of([(left, top, left + 20, top + 16), None, None, None])
        before = images.clone()
        for image, found in zip(*mix_detection(images, labels, MOSAIC, rng, min_visible=0.0), strict=True):
            rows, columns = torch.where(image[0] > 0.5)
            if len(rows) > 2:
                shown = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                torch.testing.assert_close(corners(found)[0], shown.float(), atol=1.0, rtol=0.0)
                seen.append(20 / (shown[2] - shown[0]).item())
                assert found["class_labels"].tolist() == [0]
            elif not len(rows):
                assert corners(found).diff(dim=0).numel() == 0
        assert torch.equal(images, before)
    assert len(seen) > 60
    assert min(seen) < 1.2
    assert max(seen) > 1.6


def test_an_object_that_a_mosaic_hardly_shows_is_dropped():
    rng, fractions = np.random.default_rng(1), []
    for _ in range(60):
        images, labels = batch_of([(0, 0, 40, 32), None, None, None])
        states = rng.bit_generator.state
        kept = mix_detection(images, labels, MOSAIC, rng, min_visible=0.6)[1]
        rng.bit_generator.state = states
        for cut, image in zip(mix_detection(images, labels, MOSAIC, rng, min_visible=0.0)[1], kept, strict=True):
            extent = corners(cut)[:, 2:] - corners(cut)[:, :2]
            for (width, height), ratio in zip(extent.tolist(), (extent / torch.tensor([40, 32])).tolist()):
                scale = max(ratio)  # of the side that is cut less: at most that of the window
                fractions.append((width * height / (40 * 32 * scale**2), len(image["boxes"])))
    assert all(num_kept == 0 for fraction, num_kept in fractions if fraction < 0.58)  # the sides are rounded
    assert {num_kept for _, num_kept in fractions} == {0, 1}


def test_pasted_objects_are_shown_at_their_boxes_and_hide_no_others():
    rng, num_pasted = np.random.default_rng(2), 0
    for _ in range(60):
        images, labels = batch_of([(20, 10, 44, 38), (5, 7, 25, 21)])
        images[1] *= 2
        mixed, found = mix_detection(images, labels, PASTE, rng, min_visible=0.3)
        left, top, right, bottom = (20, 10, 44, 38)
        assert torch.equal(corners(found[0])[:1], corners(labels[0]))
        visible = (mixed[0, 0, top:bottom, left:right] == 1).float().mean()
        assert visible >= 0.7
        for box, label in zip(corners(found[0])[1:].round().int().tolist(), found[0]["class_labels"][1:]):
            left, top, right, bottom = box
            assert label == 1
            assert (right - left, bottom - top) == (20, 14)
            assert (mixed[0, :, top:bottom, left:right] == 2).all()
            assert (mixed[0] == 2).sum() == 3 * 20 * 14
            num_pasted += 1
    assert 10 < num_pasted < 50


def test_the_generator_alone_decides_and_images_without_objects_are_mixed():
    images, labels = batch_of([None, None, (3, 4, 30, 40)])
    settings = DetectionMixSettings(mosaic_probability=0.5, copy_paste_probability=0.5)
    one, other = (mix_detection(images, labels, settings, np.random.default_rng(3), min_visible=0.3) for _ in "12")
    assert torch.equal(one[0], other[0])
    assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(one[1], other[1], strict=True))
    nothing = batch_of([None, None])
    for setting in (MOSAIC, PASTE):
        found = mix_detection(*nothing, setting, np.random.default_rng(4), min_visible=0.3)[1]
        assert [labels["boxes"].shape for labels in found] == [(0, 4), (0, 4)]


def test_probabilities_are_checked():
    with pytest.raises(ValueError, match=r"mosaic_probability must be between 0 and 1, got 1\.5"):
        DetectionMixSettings(mosaic_probability=1.5)
