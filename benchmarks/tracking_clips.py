"""Clips with truth for `tracking.py`, rendered or sequences of MOTChallenge, and detections made from the truth."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hf_vlm.data.scenes.render import SceneSettings, render_clip
from hf_vlm.data.video import open_video
from hf_vlm.deploy.mot import read_mot
from hf_vlm.deploy.prediction import Prediction

SETTINGS = SceneSettings(
    objects="symbols",
    backgrounds="landscapes",
    image_size=96,
    num_classes=1,
    min_objects=5,
    max_objects=7,
    min_object_size=18.0,
    max_object_size=26.0,
    max_rotation=15.0,
    min_contrast=0.3,
    max_contrast=0.55,
    min_crop=72,
    max_speed=3.0,
    camera_shake=3.0,
)
MISSES, NOISE = 0.15, 0.06  # fraction of detections that are left out; standard deviation relative to the box
FALSE_NOISE = 0.25  # the same of false detections beside an object


@dataclass(frozen=True)
class Clip:
    """Images (height, width, 3) uint8, the rows of MOT of each frame's truth, and its detections."""

    images: list[NDArray[np.uint8]]
    truth: list[NDArray[np.float64]]
    found: list[Prediction]

    def with_appearance(self, features: list[NDArray[np.float32]]) -> "Clip":
        """The clip with features (n, dim) of each frame's detections."""
        found = [dataclasses.replace(one, appearance=of) for one, of in zip(self.found, features, strict=True)]
        return dataclasses.replace(self, found=found)


def rendered_clips(
    seed: int, num_clips: int, num_frames: int, *, split: str = "test", num_false: float = 0.0
) -> Iterator[Clip]:
    """Objects of one class that cross and hide each other before a panning background and a shaking camera."""
    for index in range(num_clips):
        scenes = render_clip(seed, index, num_frames, SETTINGS, split=split)
        truth = [_truth(scene, frame) for frame, scene in enumerate(scenes, 1)]
        yield _with_detections(
            [scene.image for scene in scenes], truth, np.random.default_rng([seed, index]), num_false
        )


def mot_clips(folder: Path, seed: int, *, num_false: float = 0.0) -> Iterator[Clip]:
    """The sequences of a folder of MOTChallenge: `SEQUENCE/img1/000001.jpg`, ... and `SEQUENCE/gt/gt.txt`.

    Boxes whose score is 0 are to be ignored, and are left out.

    Raises:
        ValueError: There is no sequence, or one cannot be read.
    """
    files = sorted(folder.glob("*/gt/gt.txt"))
    if not files:
        raise ValueError(f"{folder} has no SEQUENCE/gt/gt.txt: give the folder of sequences of MOTChallenge")
    for index, file in enumerate(files):
        images = [frame.image for frame in open_video(file.parents[1])]
        rows = read_mot(file)
        rows = rows[rows[:, 6] != 0]
        truth = [rows[rows[:, 0] == frame] for frame in range(1, len(images) + 1)]
        yield _with_detections(images, truth, np.random.default_rng([seed, index]), num_false)


def write_frames(folder: Path, num_clips: int) -> None:
    """Single frames of the clips of the training split, two per clip, to pretrain an encoder on."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(num_clips):
        for number, scene in enumerate(render_clip(0, index, 4, SETTINGS, split="train")[::3]):
            Image.fromarray(scene.image).save(folder / f"{index:05d}_{number}.png")


def _truth(scene: Any, frame: int) -> NDArray[np.float64]:
    ones = np.ones(len(scene.boxes))
    columns = [frame * ones, scene.track_ids + 1, *scene.boxes.T, ones, ones, ones]
    return np.stack(columns, axis=1).astype(np.float64)


def _with_detections(
    images: list[Any], truth: list[NDArray[np.float64]], rng: np.random.Generator, num_false: float
) -> Clip:
    """The true boxes with misses, noise and scores of 0.3 to 0.95, and per frame that many false detections."""
    found = []
    for frame, (image, rows) in enumerate(zip(images, truth, strict=True)):
        height, width = image.shape[:2]
        boxes = rows[rng.uniform(size=len(rows)) >= MISSES, 2:6]
        size = np.tile(boxes[:, 2:], 2)
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        noisy = corners + rng.normal(scale=NOISE, size=corners.shape) * size
        scores = rng.uniform(0.3, 0.95, len(boxes))
        if num_false > 0 and len(boxes):
            wrong = _false_boxes(corners[rng.integers(len(boxes), size=rng.poisson(num_false))], (height, width), rng)
            noisy = np.concatenate([noisy, wrong])
            scores = np.concatenate([scores, rng.uniform(0.1, 0.55, len(wrong))])
        found.append(
            Prediction(
                scores=scores.astype(np.float32),
                labels=np.zeros(len(scores), dtype=np.int64),
                label_names=["object"] * len(scores),
                image_size=(height, width),
                boxes=np.clip(noisy, 0, [width, height, width, height]).astype(np.float32),
                frame=frame,
            )
        )
    return Clip(images, truth, found)


def _false_boxes(boxes: NDArray[np.float64], size: tuple[int, int], rng: np.random.Generator) -> NDArray[np.float64]:
    """Boxes (n, 4) of the sizes of true ones, one half beside these and the other half anywhere."""
    sides = boxes[:, 2:] - boxes[:, :2]
    beside = boxes[:, :2] + rng.normal(scale=FALSE_NOISE, size=sides.shape) * sides
    anywhere = rng.uniform(size=sides.shape) * np.maximum(np.array(size[::-1]) - sides, 0)
    low = np.where(rng.uniform(size=(len(boxes), 1)) < 0.5, beside, anywhere)
    return np.concatenate([low, low + sides], axis=1)
