"""Instance segmentation as a task: its data, its evaluation against what the model gives, and its predictions."""

import itertools

import numpy as np
import pytest
import torch
from tiny import DETECTION, build, perturb

from hf_vlm.data.scenes.render import render_scene, scene_settings
from hf_vlm.data.sources import open_source
from hf_vlm.metrics import coco_instance_metrics
from hf_vlm.metrics.instance_segmentation import encode_masks
from hf_vlm.models.image_processing_instance_segmentation import VLMViTInstanceSegmentationImageProcessor
from hf_vlm.models.modeling_instance_segmentation import VLMViTInstanceSegmentationOutput
from hf_vlm.tasks import instance_segmentation
from hf_vlm.tasks.detection import choose_threshold
from hf_vlm.tasks.evaluation import eval_stream
from hf_vlm.tasks.instance_segmentation import INSTANCE_SEGMENTATION as TASK
from hf_vlm.tasks.instance_segmentation import predict_instances

NAMES = list("01234")
SIZE = (48, 64)


@pytest.fixture
def processor():
    return VLMViTInstanceSegmentationImageProcessor(size={"height": 32, "width": 32})


@pytest.fixture
def model():
    built = build("instance_segmentation", id2label=dict(enumerate(NAMES)))
    perturb(built)
    return built.train()


def source(num=5):
    return open_source("scenes:easy", "test", num_samples=num)


def held_out(processor, num=5, **ranks):
    transform = TASK.transform(processor, train=False, class_names=NAMES)
    return eval_stream(source(num), transform, max_bad_fraction=0.0, **ranks)


def test_data_without_masks_are_refused():
    assert TASK.class_names(source()) == NAMES
    with pytest.raises(ValueError, match="has boxes without masks in split 'test'"):
        TASK.class_names(source().without_object_masks())
    with pytest.raises(ValueError, match="has no objects in split 'test'"):
        TASK.class_names(source().unlabelled())


def test_references_are_the_masks_of_the_scenes(model, processor):
    predictions, references = predict_instances(model, held_out(processor), processor, batch_size=2)
    assert model.training
    assert len(predictions) == len(references) == 5
    for index, reference in enumerate(references):
        scene = render_scene(0, index, scene_settings("easy"), split="test")
        ids = np.unique(scene.instance_mask)[1:]
        assert len(reference["masks"]) == len(scene.boxes) == len(ids)
        expected = encode_masks(np.stack([scene.instance_mask == i for i in ids]))
        assert sorted(m["counts"] for m in reference["masks"]) == sorted(m["counts"] for m in expected)


def test_metrics_are_those_of_the_predictions_in_one_rank_and_in_two(model, processor, monkeypatch):
    evaluation = TASK.evaluate(model, held_out(processor), processor, class_names=NAMES, batch_size=2)
    sizes = next(part for part in TASK.report(evaluation) if part.title == "Sizes")
    assert [row[2:4] for row in sizes.rows] == [
        pytest.approx([evaluation.metrics[f"box_{kind}_{row[0]}"] for kind in ("ap", "ar")], nan_ok=True)
        for row in sizes.rows
    ]
    predictions, references = predict_instances(model, held_out(processor), processor, batch_size=5)
    expected = coco_instance_metrics(predictions, references, class_names=NAMES)
    expected |= choose_threshold(predictions, references, processor)[0]
    assert evaluation.metrics == pytest.approx(expected, nan_ok=True)
    assert {*TASK.headline} <= expected.keys()
    parts = [predict_instances(model, held_out(processor, rank=r, world_size=2), processor) for r in range(2)]
    joined = iter([list(itertools.chain(*both)) for both in zip(*parts)])
    monkeypatch.setattr(instance_segmentation, "gather_object", lambda _: next(joined))
    both = TASK.evaluate(model, held_out(processor, rank=0, world_size=2), processor, class_names=NAMES)
    assert both.metrics == pytest.approx(expected, nan_ok=True)


class Perfect(torch.nn.Module):
    """Finds what labels hold, in their order, at half the image's size."""

    def __init__(self, labels, num_queries):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.labels, self.num_queries = labels, num_queries

    def forward(self, pixel_values):
        logits = torch.full((1, self.num_queries, 3), -9.0)
        boxes, masks = torch.full((1, self.num_queries, 4), 0.5), torch.full((1, self.num_queries, *SIZE), -9.0)
        for query, category in enumerate(self.labels["class_labels"]):
            logits[0, query, category] = 5 - query / 100
            boxes[0, query] = self.labels["boxes"][query]
            masks[0, query][self.labels["masks"][query]] = 9.0
        return VLMViTInstanceSegmentationOutput(logits=logits, pred_boxes=boxes, pred_masks=masks)


class OneImage(torch.utils.data.IterableDataset):
    rank, world_size = 0, 1

    def __init__(self, labels):
        self.labels = labels

    def __iter__(self):
        yield {"pixel_values": torch.zeros(3, 8, 8), "labels": self.labels}


def test_a_perfect_model_scores_one(processor):
    torch.manual_seed(0)
    y, x = torch.meshgrid(torch.arange(SIZE[0]) + 0.5, torch.arange(SIZE[1]) + 0.5, indexing="ij")
    centres = torch.rand(12, 2) * torch.tensor([40, 30]) + 8
    masks = torch.stack([(x - cx) ** 2 + (y - cy) ** 2 < 40 for cx, cy in centres])
    boxes = torch.cat([centres / torch.tensor([64, 48]), torch.full((12, 2), 0.2)], dim=1)
    labels = {
        "class_labels": torch.arange(12) % 3,
        "boxes": boxes,
        "masks": masks,
        "segmentation": encode_masks(masks),
        "area": masks.flatten(1).sum(1).float(),
        "iscrowd": torch.zeros(12),
        "orig_size": torch.tensor(SIZE),
    }
    evaluation = TASK.evaluate(Perfect(labels, 20), OneImage(labels), processor, class_names=NAMES[:3])
    assert [evaluation.metrics[name] for name in TASK.headline] == [1, 1, 1, pytest.approx(1)]


def test_predictions_are_those_of_the_image_processor(model, processor):
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        outputs = model.eval()(images)
    sizes = [(20, 31), (40, 18)]
    found = TASK.post_process(processor, outputs, threshold=0.0, sizes=sizes, model=model)
    boxes = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
    whole = processor.post_process_instance_segmentation(
        outputs, threshold=0.0, target_sizes=sizes, return_binary_maps=True
    )
    for image, expected, maps in zip(found, boxes, whole):
        assert all(torch.equal(image[name], expected[name]) for name in expected)
        assert torch.equal(image["masks"][image["masks"].flatten(1).any(1)], maps["segmentation"])
        assert len(image["masks"]) == 5 * DETECTION["num_queries"]
    strict = TASK.post_process(processor, outputs, threshold=None, sizes=sizes, model=model)
    assert all((image["scores"] > 0.5).all() and len(image["scores"]) == len(image["masks"]) for image in strict)
