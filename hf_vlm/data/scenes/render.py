"""The built-in images: objects pasted into pictures that Python packages ship, rendered on the fly, offline.

`easy` and `hard` have handwritten digits (Alpaydin and Kaynak, UCI Machine Learning Repository, 1998) in crops of the
two photographs of scikit-learn. `symbols` has pictograms (DejaVu Sans, which matplotlib ships) in crops of the same
photographs and of terrain (the two elevation models among matplotlib's sample data). A scene is a function of (seed,
split, index) alone, so any position can be rendered again. The splits have no digit and no part of a photograph or of
the terrain in common; see `symbols.py` for the glyphs that they share.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from hf_vlm.data.scenes.backgrounds import BACKGROUNDS, STRIP_WIDTH, Strips, reflect, sample_background
from hf_vlm.data.scenes.canvas import MIN_VISIBLE_FRACTION, Canvas, Finish, Scene
from hf_vlm.data.scenes.colors import NAMED_COLORS
from hf_vlm.data.scenes.objects import OBJECTS, Objects
from hf_vlm.data.scenes.splits import NUM_SAMPLES

__all__ = [
    "NUM_SAMPLES",
    "PRESETS",
    "Scene",
    "SceneSettings",
    "load_material",
    "render_clip",
    "render_scene",
    "scene_settings",
]

Array = np.ndarray[Any, Any]

MAX_PLACEMENT_ATTEMPTS = 12  # to find a free position for an object


@dataclass(frozen=True, kw_only=True)
class SceneSettings:
    """The distribution that scenes are sampled from.

    Sizes are in pixels of the scene; contrast is a difference of brightness in 0..1.
    """

    objects: str = "digits"  # a key of OBJECTS
    backgrounds: str = "photographs"  # a key of BACKGROUNDS
    image_size: int = 64
    num_classes: int = 10
    min_objects: int = 1  # fewer only where no free position is found
    max_objects: int = 3
    min_object_size: float = 20.0  # height of the upright digit, longer side of the upright symbol
    max_object_size: float = 32.0
    max_rotation: float = 10.0  # degrees, either way
    min_contrast: float = 0.4  # between an object and the mean of what lies below it
    max_contrast: float = 0.6
    color_names: tuple[str, ...] = ()  # keys of NAMED_COLORS that objects have in place of those by contrast
    max_overlap: float = 0.0  # fraction of an object that later objects may cover
    min_crop: int = 64  # side of the piece of a background that fills the scene
    max_speed: float = 2.0  # of an object in a clip, in pixels per frame
    camera_shake: float = 0.0  # largest displacement of a clip's image by the camera, in pixels either way

    def __post_init__(self) -> None:
        for field, choice, known in (
            ("objects", self.objects, list(OBJECTS)),
            ("backgrounds", self.backgrounds, list(BACKGROUNDS)),
        ):
            if choice not in known:
                raise ValueError(f"SceneSettings: {field}={choice!r} must be one of {', '.join(known)}")
        if unknown := [name for name in self.color_names if name not in NAMED_COLORS]:
            raise ValueError(f"SceneSettings: color_names: {unknown[0]!r} is none of {', '.join(NAMED_COLORS)}")
        kind = OBJECTS[self.objects]
        bounds = [
            (1, "num_classes", self.num_classes, len(kind.names)),
            (1, "min_objects", self.min_objects, self.max_objects),
            (1, "max_objects", self.max_objects, 255),  # an instance mask is uint8
            (4, "min_object_size", self.min_object_size, self.max_object_size),
            (4, "max_object_size", self.max_object_size, self.image_size / kind.max_extent),  # it fits in at any angle
            (0, "max_rotation", self.max_rotation, 180),
            (0, "min_contrast", self.min_contrast, self.max_contrast),
            (0, "max_contrast", self.max_contrast, 0.8),
            (0, "max_overlap", self.max_overlap, 1 - MIN_VISIBLE_FRACTION),
            (8, "min_crop", self.min_crop, STRIP_WIDTH),
            (0, "camera_shake", self.camera_shake, self.image_size / 4),
        ]
        for low, name, value, high in bounds:
            if not low <= value <= high:
                raise ValueError(f"SceneSettings: {name}={value} must be between {low} and {high:g}")

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes of objects, by category."""
        return OBJECTS[self.objects].names[: self.num_classes]

    @property
    def origin(self) -> str:
        """Where objects and backgrounds are from."""
        return f"{OBJECTS[self.objects].origin} and {BACKGROUNDS[self.backgrounds].origin}"

    @property
    def contrast(self) -> tuple[float, float]:
        """The range that an object's contrast is sampled from."""
        return self.min_contrast, self.max_contrast


PRESETS = {
    # For demos: as few pixels, objects and classes as show what is to be shown, so that a step is cheap.
    "easy": SceneSettings(
        image_size=48,
        num_classes=5,
        max_objects=2,
        min_object_size=18.0,
        max_object_size=26.0,
        min_crop=48,
    ),
    "hard": SceneSettings(
        image_size=128,
        min_objects=3,
        max_objects=10,
        min_object_size=10.0,
        max_object_size=40.0,
        max_rotation=30.0,
        min_contrast=0.12,
        max_contrast=0.35,
        max_overlap=0.4,
        min_crop=80,
    ),
    # For texts: few objects of colours that have names, where each lies apart.
    "captions": SceneSettings(
        image_size=64,
        num_classes=6,
        max_objects=3,
        min_object_size=18.0,
        max_object_size=26.0,
        color_names=("red", "green", "blue", "yellow", "purple", "white"),
    ),
    # For people to look at: objects that have names, before backgrounds of many colours; for demos, few large ones.
    "icons": SceneSettings(
        objects="symbols",
        backgrounds="landscapes",
        image_size=96,
        num_classes=6,
        max_objects=3,
        min_object_size=26.0,
        max_object_size=48.0,
        max_rotation=25.0,
        min_contrast=0.35,
        max_contrast=0.6,
        min_crop=72,
    ),
    "symbols": SceneSettings(
        objects="symbols",
        backgrounds="landscapes",
        image_size=96,
        num_classes=8,
        max_objects=4,
        min_object_size=18.0,
        max_object_size=48.0,
        max_rotation=25.0,
        min_contrast=0.25,
        max_contrast=0.45,
        max_overlap=0.15,
        min_crop=72,
    ),
}


def scene_settings(preset: str | SceneSettings) -> SceneSettings:
    """The settings of a preset by its name; settings are passed through.

    Raises:
        ValueError: There is no such preset.
    """
    if isinstance(preset, SceneSettings):
        return preset
    if preset not in PRESETS:
        raise ValueError(f"unknown preset of scenes {preset!r}; there are {', '.join(PRESETS)}")
    return PRESETS[preset]


def load_material(settings: SceneSettings, split: str) -> tuple[Objects, Strips]:
    """What the scenes of a split are made of, loaded once per process.

    Raises:
        ValueError: There is no such split.
    """
    return _load_objects(settings.objects, split), BACKGROUNDS[settings.backgrounds].load(split)


@functools.cache
def _load_objects(name: str, split: str) -> Objects:
    return OBJECTS[name](split)


def render_scene(seed: int, index: int, settings: SceneSettings, *, split: str = "train") -> Scene:
    """Render the scene at a position of a split.

    Raises:
        ValueError: There is no such split.
    """
    objects, strips = load_material(settings, split)
    rng = np.random.default_rng([list(NUM_SAMPLES).index(split), seed, index])
    canvas = Canvas(sample_background(rng, strips, size=settings.image_size, min_crop=settings.min_crop)(0.0))
    for number in range(rng.integers(settings.min_objects, settings.max_objects, endpoint=True)):
        item = objects.sample(rng, settings.num_classes)
        size = rng.uniform(settings.min_object_size, settings.max_object_size)
        shape = item.pose(size, rng.uniform(-settings.max_rotation, settings.max_rotation)).cropped()
        position = _sample_position(rng, canvas, shape.opacity, settings)
        if position is not None:
            color, finish = _sample_finish(rng, canvas, shape.opacity, position, objects, settings)
            canvas.paint(shape, *position, finish=finish, category=item.category, track_id=number, color=color)
    return canvas.scene()


def _sample_finish(
    rng: np.random.Generator,
    canvas: Canvas,
    opacity: Array,
    position: tuple[int, int],
    objects: Objects,
    settings: SceneSettings,
) -> tuple[int, Finish]:
    """A finish, and the index of its colour among the named ones; -1 where there are none."""
    if not settings.color_names:
        below = canvas.mean_color(opacity, *position)
        return -1, objects.sample_finish(rng, below, settings.contrast)
    color = int(rng.integers(len(settings.color_names)))
    return color, objects.plain_finish(np.array(NAMED_COLORS[settings.color_names[color]], dtype=np.float32))


def render_clip(
    seed: int, index: int, num_frames: int, settings: SceneSettings, *, split: str = "train"
) -> list[Scene]:
    """Render a clip: objects drift, turn and cross each other before a slowly panning background.

    The truth leaves an object out while others hide nearly all of it, and its `track_ids` stay the same afterwards.

    Raises:
        ValueError: There is no such split.
    """
    objects, strips = load_material(settings, split)
    rng = np.random.default_rng([len(NUM_SAMPLES) + list(NUM_SAMPLES).index(split), seed, index])
    view = sample_background(rng, strips, size=settings.image_size, min_crop=settings.min_crop)
    pan = rng.uniform(-0.02, 0.02, 2)  # per frame, as a fraction of the way across the strip
    count = int(rng.integers(settings.min_objects, settings.max_objects, endpoint=True))
    items = [objects.sample(rng, settings.num_classes) for _ in range(count)]
    below = view(0.0).mean(axis=(0, 1))
    finishes = [objects.sample_finish(rng, below, settings.contrast) for _ in range(count)]
    sizes = rng.uniform(settings.min_object_size, settings.max_object_size, (count, 1))
    starts = rng.uniform(0, settings.image_size, (count, 2))
    velocities = rng.uniform(-settings.max_speed, settings.max_speed, (count, 2))
    angles = rng.uniform(-settings.max_rotation, settings.max_rotation, count)
    spins = rng.uniform(-2, 2, count)  # degrees per frame
    shake = _sample_shake(rng, settings.camera_shake)

    frames = []
    for frame in range(num_frames):  # positions are closed forms of the frame: its rounding does not add up
        displacement = shake(frame)
        canvas = Canvas(_displaced(view(frame * pan), displacement))
        centers = sizes / 2 + reflect(starts + frame * velocities, settings.image_size - sizes)  # (count, 2)
        for row, (item, finish) in enumerate(zip(items, finishes, strict=True)):
            whole, fraction = np.divmod(centers[row] + displacement, 1)
            shape = item.pose(sizes[row, 0], angles[row] + frame * spins[row], shift=fraction)
            x, y = (int(side) - shape.opacity.shape[0] // 2 for side in whole)
            canvas.paint(shape, x, y, finish=finish, category=item.category, track_id=row)
        frames.append(canvas.scene())
    return frames


def _sample_shake(rng: np.random.Generator, strength: float) -> Callable[[int], Array]:
    """A function from a frame to the displacement (2,) of its image in pixels: a camera in a hand, smooth."""
    rates = rng.uniform(0.2, 1.2, (2, 2))  # radians per frame; two waves for each of x and y
    phases = rng.uniform(0, 2 * np.pi, (2, 2))
    return lambda frame: strength * np.sin(phases + rates * frame).mean(axis=0)


def _displaced(image: Array, displacement: Array) -> Array:
    if not displacement.any():
        return image
    matrix = np.column_stack([np.eye(2), displacement])
    return cv2.warpAffine(image, matrix, image.shape[1::-1], flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)


def _sample_position(
    rng: np.random.Generator, canvas: Canvas, opacity: Array, settings: SceneSettings
) -> tuple[int, int] | None:
    limits = [settings.image_size - side for side in opacity.shape]
    ys, xs = (rng.integers(0, limit, MAX_PLACEMENT_ATTEMPTS, endpoint=True).tolist() for limit in limits)
    for x, y in zip(xs, ys):
        if canvas.is_free(opacity, x, y, max_overlap=settings.max_overlap):
            return x, y
    return None
