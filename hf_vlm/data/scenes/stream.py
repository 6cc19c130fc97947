"""Scenes as a source: rendered on the fly, stored as files are, with labels, boxes and masks."""

import functools
import json
from typing import Any

import cv2
import datasets
import numpy as np

from hf_vlm.data.io.indexed import indexed_stream
from hf_vlm.data.scenes.captions import scene_captions
from hf_vlm.data.scenes.render import NUM_SAMPLES, Scene, SceneSettings, load_material, render_scene, scene_settings
from hf_vlm.data.schema import captions_feature, image_feature, objects_feature
from hf_vlm.data.segmentations import encode_mask
from hf_vlm.data.source import Source

__all__ = ["scenes_source"]

Array = np.ndarray[Any, Any]

JPEG_OPTIONS = (
    cv2.IMWRITE_JPEG_QUALITY,
    92,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR,  # full resolution of colour: strokes are two pixels wide
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
)


def scenes_source(
    preset: str | SceneSettings = "easy",
    split: str = "train",
    *,
    num_samples: int | None = None,
    seed: int = 0,
    masks: bool = True,
    object_masks: bool = False,
) -> Source:
    """Scenes as a source; the index is the `image_id`.

    Args:
        preset: Name of a preset, or settings.
        split: Name of the split.
        num_samples: Number of scenes, from position 0 on; None for `NUM_SAMPLES` of the split.
        seed: Seed of the scenes.
        masks: Whether the source has the columns `mask` and `instance_mask`; without them it is faster.
        object_masks: Whether `objects` have their `segmentation`.

    Raises:
        ValueError: There is no such preset or split, or num_samples is not positive.
    """
    settings = scene_settings(preset)
    load_material(settings, split)  # checks the split; and workers that are forked later share the pictures
    num_samples = NUM_SAMPLES[split] if num_samples is None else num_samples
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be positive")
    names = settings.class_names
    features = datasets.Features(
        {
            "image": image_feature(),
            "image_id": datasets.Value("int64"),
            "label": datasets.ClassLabel(names=list(names)),
            "objects": objects_feature(names, has_masks=object_masks),
            "text": captions_feature(),
        }
    )
    if masks:
        features |= {"mask": image_feature(), "instance_mask": image_feature()}
    options: dict[str, Any] = {
        "seed": seed,
        "settings": settings,
        "split": split,
        "masks": masks,
        "object_masks": object_masks,
    }
    render = functools.partial(_render_example, **options)
    return Source(
        dataset=indexed_stream(render, num_samples, features),
        num_examples=num_samples,
        max_objects=settings.max_objects,
        mask_class_names=("background", *names) if masks else None,
    )


def _render_example(
    index: int, *, seed: int, settings: SceneSettings, split: str, masks: bool, object_masks: bool
) -> dict[str, Any]:
    scene = render_scene(seed, index, settings, split=split)
    example: dict[str, Any] = {
        "image": _encoded(".jpg", scene.image[:, :, ::-1], JPEG_OPTIONS),
        "image_id": index,
        "label": scene.label,
        "objects": {
            "bbox": scene.boxes.tolist(),
            "category": scene.categories.tolist(),
            "area": scene.areas.tolist(),
            "iscrowd": [0] * len(scene.boxes),
        },
        "text": scene_captions(scene, settings),
    }
    if object_masks:
        example["objects"]["segmentation"] = [_segmentation(scene, row) for row in range(len(scene.boxes))]
    if masks:
        example["mask"] = _encoded(".png", scene.semantic_mask)
        example["instance_mask"] = _encoded(".png", scene.instance_mask)
    return example


def _segmentation(scene: Scene, row: int) -> str:
    x, y, width, height = map(int, scene.boxes[row].tolist())
    pixels = scene.instance_mask[y : y + height, x : x + width] == row + 1
    return json.dumps(encode_mask(pixels, offset=(y, x), size=scene.instance_mask.shape[:2]))


def _encoded(extension: str, image: Array, options: tuple[int, ...] = ()) -> dict[str, Any]:
    return {"bytes": cv2.imencode(extension, image, options)[1].tobytes(), "path": None}
