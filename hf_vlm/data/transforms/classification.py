"""Decodes an example with a class, or with objects of classes, and gives what a classifier is trained on."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from hf_vlm.data.io.decode import decode_image
from hf_vlm.data.transforms.collate import stack
from hf_vlm.data.transforms.image_ops import Normalizer, resize
from hf_vlm.data.transforms.mixing import MixSettings, erase, mix_labels, mix_pixels, sample_mix
from hf_vlm.data.transforms.options import as_probability, build_settings, check_keys
from hf_vlm.data.transforms.views import ViewSettings, render_view, required_size, sample_view

__all__ = ["ClassificationSettings", "ClassificationTransform", "collate_classification"]

WHERE = "the classification augmentation"
# ImageNet's recipes crop from 0.08 of the area on and train for hundreds of epochs; with few images the crops would
# too often miss what the label names.
CROP_SCALE = (0.35, 1.0)


@dataclass(frozen=True, kw_only=True)
class ClassificationSettings:
    """How training images are augmented.

    Args:
        view: Crop, flips and colours.
        erasing_probability: Probability that a random rectangle is replaced by noise.
        mix: How images are mixed with each other.

    Raises:
        ValueError: for a value out of its range.
    """

    view: ViewSettings
    erasing_probability: float = 0.0
    mix: MixSettings = dataclasses.field(default_factory=MixSettings)

    def __post_init__(self) -> None:
        as_probability("erasing_probability", self.erasing_probability)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, size: int | tuple[int, int]) -> Self:
        """Build the settings from plain values: the fields of `ViewSettings` but `size`, those of `MixSettings`, and
        `erasing_probability`.

        For example `{"crop_scale": [0.35, 1.0], "jitter": [0.3, 0.3, 0.3, 0.0], "mixup_alpha": 0.8}`.

        Args:
            size: Pixels of the output or (height, width).

        Raises:
            ValueError: for an unknown name (with the nearest known one) and for values out of range.
        """
        mix_names = [field.name for field in dataclasses.fields(MixSettings)]
        view_names = [field.name for field in dataclasses.fields(ViewSettings) if field.name != "size"]
        check_keys(values, [*view_names, *mix_names, "erasing_probability"], where=WHERE)
        view = {"crop_scale": CROP_SCALE, **{name: values[name] for name in view_names if name in values}}
        return cls(
            view=build_settings(ViewSettings, {**view, "size": size}, where=WHERE),
            mix=build_settings(MixSettings, {n: values[n] for n in mix_names if n in values}, where=WHERE),
            erasing_probability=values.get("erasing_probability", 0.0),
        )


class ClassificationTransform:
    """Turns an example with a class into a classifier's input and label, for `ExampleStream`.

    Gives `pixel_values` (C, H, W) float32, normalised, and `label`: an integer where the source has the column
    `label`, else (classes,) float32, 1 for each class of which there are `objects` in the image. In training, where
    images are mixed, also `mix`, how this one is (`collate_classification` mixes them).

    Without training the whole image is resized, as the image processor does. A training crop keeps all labels of its
    image, even where it shows an object no more: raise `crop_scale` where objects are small.

    Args:
        settings: Augmentation, and the size of the output.
        train: Augment.
        num_classes: Number of classes, which class ids are checked to lie below.
        image_mean: Mean of values in 0 to 1, one number or one per channel.
        image_std: Standard deviation of these, one number or one per channel.
        num_channels: Channels of the images. Colour jitter and grayscale are for 3.

    Raises:
        ValueError: for options that do not fit each other; on a call, for an example without a class, and for a class
            that is missing or unknown. `BadImageError` for an image that cannot be decoded.
    """

    def __init__(
        self,
        settings: ClassificationSettings,
        *,
        train: bool,
        num_classes: int,
        image_mean: float | Sequence[float],
        image_std: float | Sequence[float],
        num_channels: int = 3,
    ) -> None:
        self.settings = settings
        self.size = settings.view.size
        self.train = train
        self.num_classes = num_classes
        self.num_channels = num_channels
        self.normalize = Normalizer(image_mean, image_std, num_channels=num_channels)
        if num_channels != 3 and settings.view.needs_colors:
            raise ValueError(
                f"jitter and grayscale_probability need images of 3 channels, these have {num_channels}: "
                "set jitter to [0, 0, 0, 0] and grayscale_probability to 0."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, size: int | tuple[int, int], **options: Any) -> Self:
        """Build the transform with the plain values of `ClassificationSettings.from_dict`, and the options of the
        class.

        Raises:
            ValueError: for an unknown name (with the nearest known one) and for values out of range.
        """
        return cls(ClassificationSettings.from_dict(values, size=size), **options)

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        pixel_values = np.empty((self.num_channels, *self.size), dtype=np.float32)  # (C, H, W)
        label = self._read_label(example)
        if not self.train:
            image, _ = decode_image(example["image"], num_channels=self.num_channels, at_least=self.size)
            self.normalize(resize(image, self.size), pixel_values)
            return {"pixel_values": torch.from_numpy(pixel_values), "label": label}
        view, mix = self.settings.view, self.settings.mix
        parameters = sample_view(view, rng)
        at_least = required_size(view, parameters)
        image, _ = decode_image(example["image"], num_channels=self.num_channels, at_least=at_least)
        self.normalize(render_view(image, view, parameters), pixel_values)
        if rng.random() < self.settings.erasing_probability:
            erase(pixel_values, rng)
        transformed = {"pixel_values": torch.from_numpy(pixel_values), "label": label}
        return {**transformed, "mix": sample_mix(mix, self.size, rng)} if mix.mixes else transformed

    def _read_label(self, example: dict[str, Any]) -> int | Tensor:
        if "label" in example:
            label = example["label"]
            if label is None or label < 0:
                raise ValueError(
                    f"Image {example.get('image_id')} has no class: take images without one out of the data."
                )
            self._check_class(label, example)
            return int(label)
        if "objects" not in example:
            raise ValueError(
                f"Image {example.get('image_id')} has neither a column 'label' nor 'objects', only "
                f"{', '.join(example)}: classification needs labelled images."
            )
        present = torch.zeros(self.num_classes)
        for category in example["objects"]["category"]:
            self._check_class(category, example)
            present[category] = 1
        return present

    def _check_class(self, index: int, example: dict[str, Any]) -> None:
        if not 0 <= index < self.num_classes:
            raise ValueError(
                f"Image {example.get('image_id')} is of class {index}, but there are {self.num_classes} classes, 0 to "
                f"{self.num_classes - 1}. Compare the names of the source's classes with the model's."
            )


def collate_classification(examples: Sequence[dict[str, Any]], *, num_classes: int) -> dict[str, Tensor]:
    """Stack the examples of a `ClassificationTransform`; where they carry `mix`, mix each with the next one.

    The last image is mixed with the first.

    Args:
        num_classes: Number of classes of mixed labels.

    Returns:
        `pixel_values` (B, C, H, W) and `labels`: (B,) int64, or (B, num_classes) float32 where images have several
        classes or are mixed.
    """
    images = [example["pixel_values"] for example in examples]
    labels = _stack_labels([example["label"] for example in examples])
    if "mix" in examples[0]:
        parameters = [example["mix"] for example in examples]
        images = [mix_pixels(*mixed) for mixed in zip(images, [*images[1:], images[0]], parameters)]
        if labels.ndim == 1:
            labels = torch.nn.functional.one_hot(labels, num_classes).float()
        labels = mix_labels(labels, parameters)
    return {"pixel_values": stack(images), "labels": labels}


def _stack_labels(labels: Sequence[int | Tensor]) -> Tensor:
    if isinstance(labels[0], Tensor):
        return torch.stack([label for label in labels if isinstance(label, Tensor)])
    return torch.tensor(labels, dtype=torch.int64)
