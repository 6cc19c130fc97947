"""Boxes that regions and detectors find in the images of a source, against running them image by image."""

import itertools

import numpy as np
import pytest
import torch
from tiny import build

from hf_vlm.data.io.decode import decode_image
from hf_vlm.data.level_lines import find_regions
from hf_vlm.data.segmentations import box_of_segmentation, read_segmentation
from hf_vlm.data.sources import open_source
from hf_vlm.data.transforms.image_ops import resize
from hf_vlm.deploy.predict import Predictor
from hf_vlm.models.image_processing_instance_segmentation import VLMViTInstanceSegmentationImageProcessor
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.tasks import pseudo_labels
from hf_vlm.tasks.pseudo_labels import find_pseudo_labels


@pytest.fixture(scope="module")
def source():
    return open_source("scenes:icons", "test", num_samples=9)


def corners(boxes):
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def test_regions_are_those_of_each_image_in_its_own_pixels(source):
    table = find_pseudo_labels(source, "regions", size=(48, 64))
    assert table.class_names == ("object",)
    assert table.image_ids.tolist() == list(range(9))
    assert len(table.boxes) > 9
    assert (table.labels == 0).all()
    for example in source:
        image, (height, width) = decode_image(example["image"], at_least=(48, 64))
        boxes, scores, _ = find_regions(resize(image, (48, 64)))
        here = table.of(example["image_id"])
        np.testing.assert_allclose(corners(table.boxes[here]), boxes * [width, height, width, height], atol=1e-3)
        np.testing.assert_array_equal(table.scores[here], scores)


def test_masks_of_regions_are_their_outlines_in_each_images_own_pixels(source):
    table = find_pseudo_labels(source, "regions", size=(48, 64), masks=True)
    boxes = find_pseudo_labels(source, "regions", size=(48, 64)).boxes
    np.testing.assert_array_equal(table.boxes, boxes)
    for text, (x, y, width, height) in zip(table.segmentations, boxes, strict=True):
        np.testing.assert_allclose(box_of_segmentation(text), [x, y, width, height], atol=96 / 48)
    first = table.label(source)
    assert first.has_object_masks


def test_data_workers_find_the_same(source):
    alone, together = (find_pseudo_labels(source, "regions", size=(48, 48), num_workers=count) for count in (0, 2))
    np.testing.assert_array_equal(together.image_ids, alone.image_ids)
    np.testing.assert_array_equal(together.boxes, alone.boxes)


def test_ranks_look_at_each_image_once_and_share_what_they_find(source, monkeypatch):
    shares = []
    gather = lambda mine: shares.append(mine) or [*itertools.chain(*shares)]  # noqa: E731
    monkeypatch.setattr(pseudo_labels, "gather_object", gather)
    for rank in range(3):  # the last one gets what all have found
        table = find_pseudo_labels(source, "regions", size=(48, 48), rank=rank, world_size=3)
    whole = find_pseudo_labels(source, "regions", size=(48, 48))
    assert [len(share) for share in shares] == [3, 3, 3]
    np.testing.assert_array_equal(table.image_ids, whole.image_ids)
    np.testing.assert_array_equal(table.boxes, whole.boxes)


@pytest.fixture
def saved(detector, processor, tmp_path):
    with torch.no_grad():  # an untrained one finds everything with the same low score
        for head in (detector.class_head, detector.proposal_head.class_head):
            head.weight.mul_(30)
            head.bias.zero_()
        for head in (detector.box_head, detector.proposal_head.box_head):  # boxes that lie on no grid
            for weight in head.parameters():
                weight.normal_(std=0.05)
    detector.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return str(tmp_path)


def without_duplicates(boxes, scores, labels):
    """Greedily, by a loop: what overlaps a better box of its class by more than the limit is left out."""
    kept = []
    for index in np.argsort(-scores, kind="stable"):
        for other in kept:
            low, high = np.maximum(boxes[index, :2], boxes[other, :2]), np.minimum(boxes[index, 2:], boxes[other, 2:])
            shared = np.clip(high - low, 0, None).prod()
            areas = [(boxes[i, 2:] - boxes[i, :2]).prod() for i in (index, other)]
            if labels[index] == labels[other] and shared > pseudo_labels.MAX_IOU * (sum(areas) - shared):
                break
        else:
            kept.append(int(index))
    return kept


@pytest.mark.parametrize("per_image", [None, 2.0])
def test_a_detectors_boxes_are_its_best_predictions_without_duplicates(saved, per_image):
    source = open_source("scenes:easy", "test", num_samples=9)  # of the detector's size: nothing is resized
    table = find_pseudo_labels(source, saved, size=(48, 48), per_image=per_image)
    predictor = Predictor.from_pretrained(saved)
    expected = []
    for example in source:
        image, _ = decode_image(example["image"])
        found = predictor.predict(image, threshold=0.0)[0]
        large = (found.boxes[:, 2:] - found.boxes[:, :2]).min(1) >= pseudo_labels.MIN_SIDE
        boxes, scores, labels = found.boxes[large], found.scores[large], found.labels[large]
        kept = without_duplicates(boxes, scores, labels)
        expected += [(example["image_id"], boxes[i], labels[i], scores[i]) for i in kept]
    expected.sort(key=lambda row: -row[3])
    count = sum(row[3] >= pseudo_labels.MIN_SCORE for row in expected) if per_image is None else round(per_image * 9)
    assert 0 < count < len(expected)
    assert len(table.boxes) == count
    for image_id, box, label, score in expected[:count]:
        here = table.of(image_id)
        same = np.abs(corners(table.boxes[here]) - box).max(1) + 1e3 * (table.labels[here] != label)
        assert same.min() < 0.1  # pixels
        assert table.scores[here][same.argmin()] == pytest.approx(score, abs=1e-3)
    assert table.class_names == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3", "LABEL_4")


def test_masks_of_a_model_are_those_that_it_predicts(tmp_path):
    """Against the predictor, whose threshold is the score that is asked for."""
    model = build("instance_segmentation").eval()
    model.save_pretrained(tmp_path)
    VLMViTInstanceSegmentationImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    source = open_source("scenes:easy", "test", num_samples=3)
    table = find_pseudo_labels(source, str(tmp_path), size=(32, 32), masks=True, per_image=3.0)
    assert len(table.segmentations) == len(table.boxes) > 3
    predictor, num_masks = Predictor.from_pretrained(str(tmp_path)), 0
    for example in source:
        image, (height, width) = decode_image(example["image"])
        found, here = predictor.predict(image, threshold=0.0)[0], table.of(example["image_id"])
        for box, text in zip(corners(table.boxes[here]), table.segmentations[here]):
            index = np.abs(found.boxes - box).max(1).argmin()
            mask = np.zeros((height, width), bool)
            if text:
                framed = read_segmentation(text, height, width)
                left, top, right, bottom = (round(e * s) for e, s in zip(framed.frame, (width, height) * 2))
                mask[top:bottom, left:right] = framed.pixels
                num_masks += 1
            np.testing.assert_array_equal(mask, found.masks[index])
    assert num_masks > 0


def test_boxes_alone_are_no_masks(saved, source):
    with pytest.raises(ValueError, match="masks are found by an instance segmenter"):
        find_pseudo_labels(source, saved, size=(48, 48), masks=True)


def test_an_encoder_finds_no_boxes(source, tmp_path):
    config = VLMViTModel.config_class(image_size=48, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    VLMViTModel(config).save_pretrained(tmp_path)
    VLMViTImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="boxes are found by a detector"):
        find_pseudo_labels(source, str(tmp_path), size=(48, 48))
