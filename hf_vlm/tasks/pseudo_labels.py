"""Pseudo-labels of images: region proposals, around what looks like an object, or what a model finds."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from hf_vlm.data.io.decode import decode_image
from hf_vlm.data.level_lines import find_regions
from hf_vlm.data.loader import StreamLoader
from hf_vlm.data.pseudo_labels import LabelsOfImage, PseudoLabels
from hf_vlm.data.segmentations import segmentation_text
from hf_vlm.data.source import Source
from hf_vlm.data.stream import ExampleStream, Transform
from hf_vlm.data.transforms.image_ops import resize
from hf_vlm.features.device import to_best_device
from hf_vlm.features.loading import load_model
from hf_vlm.metrics.instance_segmentation import encode_masks
from hf_vlm.models.modeling_detection import VLMViTForObjectDetection
from hf_vlm.models.modeling_instance_segmentation import VLMViTForInstanceSegmentation
from hf_vlm.tasks.detector import detect, detection_transform

__all__ = ["REGIONS", "find_pseudo_labels"]

REGIONS = "regions"
CLASS_NAME = "object"  # of all regions
# Of a detector's boxes, where their number is not given. Scores are IoUs that are expected, and of a detector that
# learned from boxes nobody checked they are low: on three sets this kept as many as it had learned from, or half more.
MIN_SCORE = 0.25
MAX_IOU = 0.6  # of a detector's boxes of one class: the lower scored one is left out
MIN_SIDE = 2  # pixels of a detector's box; less shows nothing to learn
BATCH_SIZE = 16


def find_pseudo_labels(
    source: Source,
    labels_from: str,
    *,
    size: tuple[int, int],
    masks: bool = False,
    num_channels: int = 3,
    per_image: float | None = None,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    max_bad_fraction: float = 0.01,
) -> PseudoLabels:
    """Boxes, and masks, in all images of a source; those that it may have are not read.

    Args:
        labels_from: "regions" for what looks like an object (`find_regions`), all of one class; or the folder or Hub
            id of a detector, which for masks is an instance segmenter.
        size: Height and width in pixels at which regions are looked for.
        masks: Whether the objects get masks: those of regions are what their outlines enclose.
        num_channels: Channels of the images in which regions are looked for.
        per_image: Mean number of a detector's boxes to keep per image, the best over all images; by default those
            with a score of at least 0.25.
        num_workers: Processes that read images.

    Raises:
        ValueError: There is no such detector, or too many images cannot be read.
    """
    options: dict[str, Any] = {"shuffle": False, "repeat": False, "max_bad_fraction": max_bad_fraction}
    options |= {"rank": rank, "world_size": world_size}
    images = source.unlabelled().dataset
    found: Iterable[LabelsOfImage]
    if labels_from == REGIONS:
        names = [CLASS_NAME]
        found = _regions(ExampleStream(images, _FindRegions(size, num_channels, masks), **options), num_workers)
    else:
        loaded = load_model(labels_from)
        needed, finder = (
            (VLMViTForInstanceSegmentation, "masks are found by an instance segmenter")
            if masks
            else (VLMViTForObjectDetection, "boxes are found by a detector")
        )
        if not isinstance(loaded.model, needed):
            raise ValueError(f"{labels_from} is a model for {loaded.entry.task}: {finder}.")
        names = loaded.class_names
        transform = _WithoutObjects(detection_transform(loaded.processor, train=False, class_names=names))
        found = _detections(loaded, ExampleStream(images, transform, **options), num_workers, masks)
    total = source.num_examples and -(-source.num_examples // world_size)
    mine = list(tqdm(found, desc="Finding objects", total=total, unit=" images", disable=rank != 0 or None))
    table = PseudoLabels.collect(gather_object(mine) if world_size > 1 else mine, names)
    if labels_from == REGIONS:
        return table
    return table.best(table.num_scored(MIN_SCORE) if per_image is None else round(per_image * len(table.image_ids)))


@dataclass(frozen=True)
class _FindRegions:
    """A transform of an image without labels to the regions in it."""

    size: tuple[int, int]
    num_channels: int
    masks: bool

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        image, (height, width) = decode_image(example["image"], num_channels=self.num_channels, at_least=self.size)
        regions, pixels = find_regions(resize(image, self.size)), np.array([width, height], dtype=np.float32)
        boxes = regions.boxes * np.tile(pixels, 2)
        boxes[:, 2:] -= boxes[:, :2]
        labels, texts = np.zeros(len(boxes), np.int64), None
        if self.masks:
            texts = [segmentation_text([(outline * pixels).ravel().tolist()]) for outline in regions.outlines]
        return {"found": LabelsOfImage(example["image_id"], boxes, labels, regions.scores, texts)}


def _regions(stream: Any, num_workers: int) -> Iterator[LabelsOfImage]:
    for batch in StreamLoader(stream, batch_size=BATCH_SIZE, num_workers=num_workers, collate_fn=list):
        yield from (image["found"] for image in batch)


@dataclass(frozen=True)
class _WithoutObjects:
    """A detector's transform, for images that have no boxes to transform."""

    transform: Transform

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return self.transform({**example, "objects": {"bbox": [], "category": []}}, rng)


def _detections(loaded: Any, stream: ExampleStream, num_workers: int, masks: bool) -> Iterator[LabelsOfImage]:
    """What a detector finds in each image, of any score, without duplicates."""
    model, options = to_best_device(loaded.model).eval(), {"batch_size": BATCH_SIZE, "num_workers": num_workers}
    find = functools.partial(_find_instances, loaded.processor) if masks else None
    for batch in detect(model, stream, loaded.processor, find=find, **options):
        for image, labels in zip(batch.found, batch.labels):
            boxes, scores, classes = (image[name].numpy() for name in ("boxes", "scores", "labels"))
            boxes[:, 2:] -= boxes[:, :2]
            large = np.flatnonzero(boxes[:, 2:].min(1) >= MIN_SIDE)
            kept = large[_without_duplicates(boxes[large], scores[large], classes[large])]
            texts = _encoded_masks(loaded.processor, image, kept) if masks else None
            yield LabelsOfImage(int(labels["image_id"]), boxes[kept], classes[kept], scores[kept], texts)


def _find_instances(processor: Any, outputs: Any, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    found = processor.find_instances(outputs, threshold=0.0, target_sizes=sizes)
    return [{name: value.cpu() if name != "size" else value for name, value in image.items()} for image in found]


def _encoded_masks(processor: Any, image: dict[str, Any], kept: Any) -> list[str]:
    """Masks of what is kept in an image as text, "" for an empty one."""
    chunks = processor.binary_masks(image["mask_logits"][torch.from_numpy(kept)], image["size"])
    return [segmentation_text(encoded) for chunk in chunks for encoded in encode_masks(chunk)]


def _without_duplicates(boxes: Any, scores: Any, classes: Any) -> list[int]:
    """Indices of the boxes (x, y, width, height) that overlap no better one of their class much, best first."""
    return list(cv2.dnn.NMSBoxesBatched(boxes.tolist(), scores.tolist(), classes.tolist(), 0.0, MAX_IOU))
