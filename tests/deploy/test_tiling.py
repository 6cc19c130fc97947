"""What is found in tiles of images by prediction and by evaluation, which is the same."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from hf_vlm.cli.main import main
from hf_vlm.data.tiles import Tiling
from hf_vlm.deploy.predict import Predictor
from hf_vlm.models.image_processing_detection import VLMViTDetectionImageProcessor
from hf_vlm.models.modeling_detection import VLMViTObjectDetectionOutput
from hf_vlm.tasks.detection import DETECTION, predict_detection

SIDE = 64
NAMES = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def predictor(saved_detector):
    return Predictor.from_pretrained(saved_detector, device="cpu")


def picture(height, width, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height)))


def rectangles(height, width, boxes):
    """Bright rectangles x, y, width, height on black, each in a channel of its own."""
    image = np.zeros((height, width, 3), np.uint8)
    for channel, (x, y, w, h) in enumerate(boxes):
        image[y : y + h, x : x + w, channel] = 255
    return image


class Examples(torch.utils.data.IterableDataset):
    """A stream of images and their objects, as an evaluation has it."""

    rank, world_size = 0, 1

    def __init__(self, images, objects, transform):
        self.images, self.objects, self.transform = images, objects, transform

    def __iter__(self):
        for number, (image, objects) in enumerate(zip(self.images, self.objects, strict=True)):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            example = {"image": {"bytes": buffer.getvalue()}, "image_id": number, "objects": objects}
            yield self.transform(example, np.random.default_rng(0))


class Finder(torch.nn.Module):
    """Finds the bright rectangle of each channel, if there is any, exactly."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, pixel_values):
        batch, channels, height, width = pixel_values.shape
        logits = torch.full((batch, channels, channels), -9.0)
        boxes = torch.full((batch, channels, 4), 0.5)
        for image, channel in np.ndindex(batch, channels):
            rows, columns = (pixel_values[image, channel] > 0.9).nonzero(as_tuple=True)
            if len(rows):
                low = torch.stack([columns.min() / width, rows.min() / height])
                high = torch.stack([(columns.max() + 1) / width, (rows.max() + 1) / height])
                logits[image, channel, channel] = 5.0 - channel
                boxes[image, channel] = torch.cat([(low + high) / 2, high - low])
        return VLMViTObjectDetectionOutput(logits=logits, pred_boxes=boxes)


def boxes_within_the_image(model, inputs, outputs):
    """Those of random weights are mostly not."""
    outputs.pred_boxes = outputs.pred_boxes.sigmoid()


def evaluation_in(tiling, processor, images, objects):
    """The task for these tiles, and its stream."""
    task = DETECTION if tiling is None else DETECTION.tile(tiling)
    return task, Examples(images, objects, task.transform(processor, train=False, class_names=NAMES))


def test_an_image_that_fits_one_tile_is_predicted_as_without_tiles(predictor):
    images = [picture(60, 90), picture(128, 100)]
    for one, other in zip(predictor.predict(images, 0.4, tile=128), predictor.predict(images, 0.4), strict=True):
        np.testing.assert_array_equal(one.boxes, other.boxes)
        np.testing.assert_array_equal(one.scores, other.scores)
        np.testing.assert_array_equal(one.labels, other.labels)


def test_without_overlap_detections_are_those_of_the_parts(predictor):
    parts = [picture(SIDE, SIDE, seed) for seed in range(4)]
    image = np.concatenate([np.concatenate(parts[:2], axis=1), np.concatenate(parts[2:], axis=1)])
    tiled = predictor.predict(image, 0.4, tile=SIDE, overlap=0)[0]
    alone = predictor.predict(parts, 0.4)
    offsets = [np.array([x, y, x, y]) for y in (0, SIDE) for x in (0, SIDE)]
    boxes = np.concatenate([one.boxes + offset for one, offset in zip(alone, offsets)])
    scores = np.concatenate([one.scores for one in alone])
    order = np.argsort(-scores, kind="stable")
    assert len(tiled) == sum(map(len, alone)) > 0
    assert tiled.image_size == (2 * SIDE, 2 * SIDE)
    np.testing.assert_allclose(tiled.scores, scores[order], atol=1e-5)
    np.testing.assert_allclose(tiled.boxes, boxes[order], atol=1e-3)


@pytest.mark.parametrize("do_pad", [False, True])
def test_an_evaluation_finds_what_a_prediction_finds(predictor, do_pad, monkeypatch):
    processor = VLMViTDetectionImageProcessor(**{**predictor.processor.to_dict(), "do_pad": do_pad})
    monkeypatch.setattr(predictor, "processor", processor)
    hook = predictor.model.register_forward_hook(boxes_within_the_image)
    images = [picture(40, 200), picture(38, 90, 1), picture(130, 100, 2)]
    _, stream = evaluation_in(Tiling(SIDE, 0.3), processor, images, [{"bbox": [], "category": []}] * 3)
    found, references = predict_detection(predictor.model, stream, processor, batch_size=3, in_tiles=True)
    assert [len(reference["boxes"]) for reference in references] == [0, 0, 0]
    expected = predictor.predict(images, 0.0, tile=SIDE, overlap=0.3)
    hook.remove()
    assert all(len(other) > 0 for other in expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one["scores"], other.scores, atol=1e-5)
        np.testing.assert_allclose(one["boxes"], other.boxes, atol=1e-3)
        np.testing.assert_array_equal(one["labels"], other.labels)


@pytest.mark.parametrize("do_pad", [False, True])
def test_objects_on_seams_are_found_once_where_tiles_overlap(do_pad):
    boxes = [[50, 20, 24, 30], [2, 40, 20, 40], [100, 55, 16, 18]]  # over the seams of tiles at 64, and beside them
    image, objects = rectangles(96, 128, boxes), {"bbox": boxes, "category": [0, 1, 2]}
    processor = VLMViTDetectionImageProcessor(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.0] * 3, image_std=[1.0] * 3, do_pad=do_pad
    )
    found = {}
    for overlap in (0.0, 0.6):
        task, stream = evaluation_in(Tiling(SIDE, overlap), processor, [image], [objects])
        evaluation = task.evaluate(Finder(), stream, processor, class_names=NAMES)
        found[overlap] = evaluation.metrics["ap"]
        predictions, _ = predict_detection(Finder(), stream, processor, in_tiles=True)
        kept = predictions[0]["scores"] > 0.5
        if overlap:
            assert predictions[0]["labels"][kept].tolist() == [0, 1, 2]
            expected = [[x, y, x + w, y + h] for x, y, w, h in boxes]
            np.testing.assert_allclose(predictions[0]["boxes"][kept], expected, atol=1e-3)
    assert found[0.6] == pytest.approx(1)
    assert found[0.0] < 0.8


def test_tiles_that_cannot_be(predictor, saved_encoder, saved_detector, capsys):
    with pytest.raises(ValueError, match="tile is 4; give the side of the tiles in pixels"):
        predictor.predict(picture(30, 30), tile=4)
    words = ["--data", "scenes:easy", "--num_examples", "2", "--tile"]
    assert main(["evaluate", str(saved_encoder), *words, "32"]) == 2
    assert "tile is 32, but tiles are for detectors, not for image-feature-extraction" in capsys.readouterr().err
    assert main(["evaluate", str(saved_detector), *words, "4"]) == 2
    assert "tile is 4; give the side" in capsys.readouterr().err
