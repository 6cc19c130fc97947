"""Image processor of semantic segmentation: whole images or windows of them, and logits to a class for each pixel."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import SizeDict
from transformers.processing_utils import ImagesKwargs

from .image_processing_vlm_vit import VLMViTImageProcessor

MODES = ("whole", "slide")
STRIDE = 2 / 3  # of a window, as in MMSegmentation and DINOv3

Size = tuple[int, int]  # height and width in pixels


class SemanticSegmentationImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """
    inference (`str`, *optional*, defaults to `"whole"`):
        `"whole"` resizes each image to `size`. `"slide"` cuts it into windows of `size` that overlap by a third and
        averages their logits where they do, which keeps what is small in images larger than the model's input; images
        smaller than a window are enlarged to it.
    """

    inference: str


class VLMViTSemanticSegmentationImageProcessor(VLMViTImageProcessor):
    """Images to `pixel_values` as [`VLMViTImageProcessor`] makes them, or windows of them, and logits to classes.

    With `inference="slide"` there are as many rows of `pixel_values` as windows: those of the first image, then those
    of the second. `post_process_semantic_segmentation` puts them together by the images' sizes.

    Raises:
        ValueError: for another value of `inference`, or for windows of padded images.
    """

    recipe_fields: ClassVar[tuple[str, ...]] = ("image_mean", "image_std", "do_pad", "inference")
    valid_kwargs = SemanticSegmentationImageProcessorKwargs
    inference = "whole"

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        check_inference(self.inference, self.do_pad)

    def _preprocess(self, images: list[Any], inference: str = "whole", **kwargs: Any) -> BatchFeature:
        check_inference(inference, kwargs.get("do_pad"))
        if inference == "whole":
            return super()._preprocess(images, **kwargs)
        window = kwargs["size"].height, kwargs["size"].width
        cut = []
        for image in images:
            height, width = sliding_size(image.shape[-2:], window)
            resized = self.resize(image, SizeDict(height=height, width=width), resample=kwargs["resample"])
            cut += [resized[:, rows, columns] for rows, columns in sliding_windows((height, width), window)]
        return super()._preprocess(cut, **{**kwargs, "do_resize": False})

    def post_process_semantic_segmentation(
        self, outputs: Any, target_sizes: Tensor | Sequence[Size] | None = None
    ) -> list[Tensor]:
        """The class of each pixel from the `logits` of a [`VLMViTForSemanticSegmentation`], resized bilinearly.

        Args:
            target_sizes: (height, width) of each original image in pixels. Without it, which is for whole images only,
                there is one class per patch.

        Returns:
            one map (height, width) int64 per image.

        Raises:
            ValueError: if there are not as many target sizes as images, or none where windows are to be put together.
        """
        logits = outputs.logits.float()  # (images or windows, classes, rows, columns)
        if target_sizes is None and self.inference == "whole":
            return list(logits.argmax(dim=1))
        sizes = [] if target_sizes is None else [(int(height), int(width)) for height, width in target_sizes]
        counts = [1 if self.inference == "whole" else self.num_windows(size) for size in sizes]
        if sum(counts) != logits.shape[0]:
            raise ValueError(
                f"There are logits of {logits.shape[0]} images or windows, but {len(sizes)} target_sizes, for which "
                f"there must be {sum(counts)}: give the height and width of each image."
            )
        parts = logits.split(counts)
        return [self._at_size(part, size).argmax(dim=0) for part, size in zip(parts, sizes)]

    def num_windows(self, size: Size) -> int:
        """Number of windows that an image of a size is cut into by `inference="slide"`."""
        return len(list(sliding_windows(sliding_size(size, self.input_hw), self.input_hw)))

    def _at_size(self, logits: Tensor, size: Size) -> Tensor:
        """Logits (1 or windows, classes, rows, columns) of an image to (classes, height, width)."""
        if self.inference == "slide":
            logits = joined_windows(logits, sliding_size(size, self.input_hw), self.input_hw)[None]
        return self.resize_maps(logits, size)[0]


def check_inference(inference: str, do_pad: Any) -> None:
    """ValueError for another mode than those there are, or for padding beside windows."""
    if inference not in MODES:
        raise ValueError(f"inference is {inference!r}, but must be one of {', '.join(MODES)}.")
    if inference == "slide" and do_pad:
        raise ValueError('inference="slide" keeps the aspect ratio without padding: set do_pad to False.')


def sliding_size(size: Size, window: Size) -> Size:
    """The size of an image that windows are cut from: its own, or enlarged until a window fits into it."""
    scale = max(1.0, window[0] / size[0], window[1] / size[1])
    height, width = (max(round(side * scale), least) for side, least in zip(size, window))
    return height, width


def sliding_windows(size: Size, window: Size) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of the windows that cover an image, each two thirds of a window after the last one.

    The last of each row and column ends with the image, and so may overlap the one before by more.
    """
    for top in _starts(size[0], window[0]):
        for left in _starts(size[1], window[1]):
            yield slice(top, top + window[0]), slice(left, left + window[1])


def joined_windows(logits: Tensor, size: Size, window: Size) -> Tensor:
    """Logits (windows, classes, rows, columns) to their mean at each pixel (classes, height, width) of `size`."""
    total, count = logits.new_zeros(logits.shape[1], *size), logits.new_zeros(size)
    resized = F.interpolate(logits, window, mode="bilinear", align_corners=False)
    for part, (rows, columns) in zip(resized, sliding_windows(size, window)):
        total[:, rows, columns] += part
        count[rows, columns] += 1
    return total / count


def _starts(length: int, window: int) -> list[int]:
    stride = max(math.floor(STRIDE * window), 1)
    count = math.ceil((length - window) / stride) + 1
    return [min(i * stride, length - window) for i in range(count)]


__all__ = ["VLMViTSemanticSegmentationImageProcessor"]
