"""The built-in images: handwritten digits pasted into crops of two photographs, rendered on the fly, offline.

Both sources are real pictures that scikit-learn ships: `load_digits` (1,797 digits of 8x8 pixels; Alpaydin and
Kaynak, UCI Machine Learning Repository, 1998) and `load_sample_images`. A scene is a function of (seed, split, index)
alone, so any position can be rendered again. The splits have no digit and no part of a photograph in common.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from hf_vlm.data.scenes.canvas import (
    LUMA,
    MIN_VISIBLE_FRACTION,
    STRIP_WIDTH,
    Canvas,
    Pictures,
    Scene,
    load_pictures,
    reflect,
    rotate_and_resize,
)

__all__ = [
    "NUM_SAMPLES",
    "PRESETS",
    "Scene",
    "SceneSettings",
    "render_clip",
    "render_scene",
    "scene_settings",
]

Array = np.ndarray[Any, Any]

# Default number of scenes in a split: training has more than any run reads, evaluation must end.
NUM_SAMPLES = {"train": 2**20, "validation": 1000, "test": 1000}
MAX_PLACEMENT_ATTEMPTS = 12  # to find a free position for a digit


@dataclass(frozen=True, kw_only=True)
class SceneSettings:
    """The distribution that scenes are sampled from.

    Sizes are in pixels of the scene; contrast is a difference of brightness in 0..1.
    """

    image_size: int = 64
    num_classes: int = 10
    min_digits: int = 1  # fewer only where no free position is found
    max_digits: int = 3
    min_digit_size: float = 20.0  # height of the upright digit
    max_digit_size: float = 32.0
    max_rotation: float = 10.0  # degrees, either way
    min_contrast: float = 0.4  # between a digit and the mean of what lies below it
    max_contrast: float = 0.6
    max_overlap: float = 0.0  # fraction of a digit that later digits may cover
    min_crop: int = 64  # side of the piece of photograph that fills the scene
    max_speed: float = 2.0  # of a digit in a clip, in pixels per frame

    def __post_init__(self) -> None:
        bounds = [
            (1, "num_classes", self.num_classes, 10),
            (1, "min_digits", self.min_digits, self.max_digits),
            (1, "max_digits", self.max_digits, 255),  # an instance mask is uint8
            (4, "min_digit_size", self.min_digit_size, self.max_digit_size),
            (4, "max_digit_size", self.max_digit_size, self.image_size / 1.8),  # it fits in however it is turned
            (0, "max_rotation", self.max_rotation, 180),
            (0, "min_contrast", self.min_contrast, self.max_contrast),
            (0, "max_contrast", self.max_contrast, 0.8),
            (0, "max_overlap", self.max_overlap, 1 - MIN_VISIBLE_FRACTION),
            (8, "min_crop", self.min_crop, STRIP_WIDTH),
        ]
        for low, name, value, high in bounds:
            if not low <= value <= high:
                raise ValueError(f"SceneSettings: {name}={value} must be between {low} and {high:g}")


PRESETS = {
    # For demos: as few pixels, objects and classes as show what is to be shown, so that a step is cheap.
    "easy": SceneSettings(
        image_size=48,
        num_classes=5,
        max_digits=2,
        min_digit_size=18.0,
        max_digit_size=26.0,
        min_crop=48,
    ),
    "hard": SceneSettings(
        image_size=128,
        min_digits=3,
        max_digits=10,
        min_digit_size=10.0,
        max_digit_size=40.0,
        max_rotation=30.0,
        min_contrast=0.12,
        max_contrast=0.35,
        max_overlap=0.4,
        min_crop=80,
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


def render_scene(seed: int, index: int, settings: SceneSettings, *, split: str = "train") -> Scene:
    """Render the scene at a position of a split.

    Raises:
        ValueError: There is no such split.
    """
    pictures = load_pictures(split)
    rng = np.random.default_rng([list(NUM_SAMPLES).index(split), seed, index])
    canvas = Canvas(_sample_background(rng, pictures, settings)(0.0))
    for number in range(rng.integers(settings.min_digits, settings.max_digits, endpoint=True)):
        category, glyph = _sample_glyph(rng, pictures, settings)
        size = rng.uniform(settings.min_digit_size, settings.max_digit_size)
        opacity = rotate_and_resize(glyph, size, rng.uniform(-settings.max_rotation, settings.max_rotation))
        left, top, width, height = cv2.boundingRect(opacity)
        opacity = opacity[top : top + height, left : left + width]
        position = _sample_position(rng, canvas, opacity, settings)
        if position is not None:
            color = _sample_color(rng, canvas.brightness(opacity, *position), settings)
            canvas.paint(opacity, *position, color=color, category=category, track_id=number)
    return canvas.scene()


def render_clip(
    seed: int, index: int, num_frames: int, settings: SceneSettings, *, split: str = "train"
) -> list[Scene]:
    """Render a clip: digits drift, turn and cross each other before a slowly panning photograph.

    Raises:
        ValueError: There is no such split.
    """
    pictures = load_pictures(split)
    rng = np.random.default_rng([len(NUM_SAMPLES) + list(NUM_SAMPLES).index(split), seed, index])
    view = _sample_background(rng, pictures, settings)
    pan = rng.uniform(-0.02, 0.02, 2)  # per frame, as a fraction of the way across the photograph
    count = int(rng.integers(settings.min_digits, settings.max_digits, endpoint=True))
    glyphs = [_sample_glyph(rng, pictures, settings) for _ in range(count)]
    brightness = float(view(0.0).mean(axis=(0, 1)) @ LUMA)
    colors = [_sample_color(rng, brightness, settings) for _ in range(count)]
    sizes = rng.uniform(settings.min_digit_size, settings.max_digit_size, (count, 1))
    starts = rng.uniform(0, settings.image_size, (count, 2))
    velocities = rng.uniform(-settings.max_speed, settings.max_speed, (count, 2))
    angles = rng.uniform(-settings.max_rotation, settings.max_rotation, count)
    spins = rng.uniform(-2, 2, count)  # degrees per frame

    frames = []
    for frame in range(num_frames):  # positions are closed forms of the frame: its rounding does not add up
        canvas = Canvas(view(frame * pan))
        centers = sizes / 2 + reflect(starts + frame * velocities, settings.image_size - sizes)  # (count, 2)
        for digit, (category, glyph) in enumerate(glyphs):
            whole, fraction = np.divmod(centers[digit], 1)
            opacity = rotate_and_resize(glyph, sizes[digit, 0], angles[digit] + frame * spins[digit], shift=fraction)
            x, y = (int(side) - opacity.shape[0] // 2 for side in whole)
            canvas.paint(opacity, x, y, color=colors[digit], category=category, track_id=digit)
        frames.append(canvas.scene())
    return frames


def _sample_background(
    rng: np.random.Generator, pictures: Pictures, settings: SceneSettings
) -> Callable[[Array | float], Array]:
    """Sample a piece of photograph and its light.

    Returns:
        A function that maps an offset (2,), as a fraction of the way across the photograph, to the background there
        (image_size, image_size, 3), float32 in 0..255.
    """
    strip = pictures.strips[rng.integers(len(pictures.strips))]
    side = rng.uniform(settings.min_crop, STRIP_WIDTH)
    corner = rng.random(2)
    gain = np.diag(rng.uniform(0.9, 1.1, 3) * rng.uniform(0.8, 1.1))
    mirror = rng.random() < 0.5
    size = settings.image_size
    free = np.array([STRIP_WIDTH - side, strip.shape[0] - side])

    def view(offset: Array | float) -> Array:
        x, y = reflect(corner + offset, 1.0) * free
        step = side / size
        first = 0.5 * step - 0.5  # pixel centres lie on halves
        across = [-step, 0, x + side - 1 - first] if mirror else [step, 0, x + first]
        matrix = np.array([across, [0, step, y + first]])
        crop = cv2.warpAffine(
            strip, matrix, (size, size), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE
        )
        return cv2.transform(crop, gain).astype(np.float32)

    return view


def _sample_glyph(rng: np.random.Generator, pictures: Pictures, settings: SceneSettings) -> tuple[int, Array]:
    category = int(rng.integers(settings.num_classes))
    samples = pictures.glyphs[category]
    return category, samples[rng.integers(len(samples))]


def _sample_position(
    rng: np.random.Generator, canvas: Canvas, opacity: Array, settings: SceneSettings
) -> tuple[int, int] | None:
    limits = [settings.image_size - side for side in opacity.shape]
    ys, xs = (rng.integers(0, limit, MAX_PLACEMENT_ATTEMPTS, endpoint=True).tolist() for limit in limits)
    for x, y in zip(xs, ys):
        if canvas.is_free(opacity, x, y, max_overlap=settings.max_overlap):
            return x, y
    return None


def _sample_color(rng: np.random.Generator, brightness: float, settings: SceneSettings) -> Array:
    """A colour, (3,) float32 in 0..255, whose brightness is the sampled contrast away from what lies below it."""
    contrast = 255 * rng.uniform(settings.min_contrast, settings.max_contrast)
    darker, brighter = brightness - contrast, brightness + contrast
    is_dark = rng.random() < 0.5 if darker >= 0 and brighter <= 255 else darker >= 255 - brighter
    color = rng.uniform(-90, 90, 3)
    color += (darker if is_dark else brighter) - color @ LUMA
    return np.minimum(np.maximum(color, 0), 255).astype(np.float32)
