"""Regions that look like objects, and the teacher's boxes that replace them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import build

from hf_vlm.models import modeling_region_detection
from hf_vlm.models.ssl_regions import color_regions

HEIGHT, WIDTH = 48, 64


def picture(*rectangles, seed=0):
    """Noise with rectangles (left, top, right, bottom, value) of one colour each: (1, 3, height, width)."""
    image = 0.05 * torch.randn(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))
    for left, top, right, bottom, value in rectangles:
        image[:, :, top:bottom, left:right] = value
    return image


def corners(boxes):
    low, size = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, 2:]
    return (torch.cat([low, low + size], dim=1) * torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])).numpy()


def test_regions_are_the_rectangles_of_an_image():
    wanted = [(8, 6, 24, 20), (36, 10, 52, 40)]
    found = corners(color_regions(picture((*wanted[0], 2.0), (*wanted[1], -2.0)), 2)[0])
    # Colours are averaged over 3 x 3 pixels, so that an edge is found within one pixel.
    np.testing.assert_allclose(sorted(found.tolist()), wanted, atol=1.01)


def test_regions_do_not_depend_on_the_rest_of_the_batch_nor_on_the_scale_of_pixels():
    first, second = picture((8, 6, 24, 20, 2.0)), picture((30, 20, 50, 40, 1.5), seed=1)
    alone = color_regions(first, 5)[0]
    torch.testing.assert_close(color_regions(torch.cat([first, second]), 5)[0], alone)
    torch.testing.assert_close(color_regions(3 * first, 5)[0], alone)


def test_an_object_with_clear_edges_comes_before_faint_ones_and_those_that_are_cut_off():
    clear, faint, cut_off = (8, 6, 24, 20, 2.0), (36, 10, 52, 30, 0.4), (56, 30, 64, 48, 2.0)
    found = corners(color_regions(picture(clear, faint, cut_off), 3)[0])
    np.testing.assert_allclose(found[0], clear[:4], atol=1.01)


@pytest.mark.parametrize("image", [torch.zeros(1, 3, HEIGHT, WIDTH), torch.full((1, 1, 8, 8), 0.5)])
def test_an_image_of_one_colour_has_no_regions(image):
    boxes = color_regions(image, 5)[0]
    assert boxes.shape == (0, 4)
    assert boxes.dtype == torch.float32


def teacher_finds(monkeypatch, model, scores, boxes):
    """Lets the teacher find boxes (cx, cy, w, h) with scores in each image."""
    logits, boxes = torch.tensor(scores).logit(), torch.tensor(boxes)
    states = torch.cat([logits[..., None], boxes], dim=-1)  # the heads below only take them apart
    found = SimpleNamespace(hidden_states=[states], reference_boxes=None)
    monkeypatch.setattr(modeling_region_detection, "detect", lambda *_: found)
    monkeypatch.setattr(modeling_region_detection, "refine_boxes", lambda _, deltas: deltas)
    model.teacher["class_head"] = torch.nn.Identity()
    model.teacher["box_head"] = SelectBoxes()


class SelectBoxes(torch.nn.Module):
    def forward(self, states):
        return states[..., 1:]


LEFT, RIGHT = [0.25, 0.5, 0.2, 0.4], [0.75, 0.5, 0.2, 0.4]
NEAR_LEFT, NEAR_RIGHT, FAR = [0.27, 0.5, 0.2, 0.4], [0.73, 0.5, 0.2, 0.4], [0.5, 0.1, 0.2, 0.2]


@pytest.mark.parametrize(
    ("scores", "boxes", "chosen"),
    [
        ([0.4, 0.9, 0.2], [NEAR_RIGHT, NEAR_LEFT, FAR], [LEFT, RIGHT]),  # best first, with the regions' own boxes
        ([0.2, 0.9, 0.9], [NEAR_RIGHT, NEAR_LEFT, FAR], [LEFT]),  # not confident of one; no region at another
        ([0.3, 0.8, 0.4], [NEAR_LEFT, NEAR_LEFT, NEAR_RIGHT], [LEFT, RIGHT]),  # the best box of a region counts
        ([0.1, 0.2, 0.1], [NEAR_LEFT, NEAR_RIGHT, FAR], [RIGHT]),  # none is confident: the best
    ],
)
def test_the_teacher_chooses_among_the_regions(monkeypatch, scores, boxes, chosen):
    model = build("region_detection")
    teacher_finds(monkeypatch, model, [scores], [boxes])
    found = model._choose_regions(torch.zeros(1, 3, 32, 32), [torch.tensor([RIGHT, LEFT])])
    torch.testing.assert_close(found[0], torch.tensor(chosen))


def test_an_image_without_regions_has_none_to_choose(monkeypatch):
    model = build("region_detection")
    teacher_finds(monkeypatch, model, [[0.9]], [[LEFT]])
    assert model._choose_regions(torch.zeros(1, 3, 32, 32), [torch.zeros(0, 4)])[0].shape == (0, 4)


def test_the_best_regions_are_learned_first_and_the_teachers_choice_later(monkeypatch):
    model = build("region_detection", self_training_start=0.5, max_regions=1)
    regions = torch.tensor([LEFT, FAR, RIGHT])
    monkeypatch.setattr(
        modeling_region_detection, "color_regions", lambda images, most: [regions[:most]] * len(images)
    )
    monkeypatch.setattr(model, "_choose_regions", lambda images, found: [of_image[-1:] for of_image in found])
    for progress, wanted in {0.0: LEFT, 0.49: LEFT, 0.5: RIGHT, 1.0: RIGHT}.items():
        model.after_step(progress)
        for found in model._find_objects(torch.zeros(2, 3, 32, 32)):
            assert found["class_labels"].tolist() == [0]
            torch.testing.assert_close(found["boxes"], torch.tensor([wanted]))


def test_its_loss_is_the_detectors_on_the_boxes_it_finds():
    model = build("region_detection").eval()
    images = torch.cat([picture((8, 6, 24, 20, 2.0)), picture((36, 10, 52, 40, -2.0))])[:, :, :32, :32]
    labels = [
        {"class_labels": torch.zeros(len(boxes), dtype=torch.int64), "boxes": boxes}
        for boxes in color_regions(images, 3)
    ]
    assert model(images[:, None]).loss.item() == pytest.approx(model(images, labels).loss.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("field", "value"), [("max_regions", 0), ("max_regions", 6), ("score_threshold", 1.5), ("self_training_start", -1)]
)
def test_numbers_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} must be"):
        build("region_detection", **{field: value})
