"""Image processor of the encoder and base of every task's own: resize, pad, rescale, normalise."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
)

TORCH_MODES = {PILImageResampling.BILINEAR: "bilinear", PILImageResampling.BICUBIC: "bicubic"}


class VLMViTImageProcessor(PilBackend):
    r"""Images to `pixel_values` (batch, channels, height, width): resized to `size` without keeping the aspect ratio.

    With `do_pad` (letterbox) the aspect ratio is kept: images are resized to fit into `size`, and padded to it at the
    right or the bottom with the mean colour.

    Models have as many channels as `image_mean` has values (3 when it is one number). PIL images become RGB for three
    channels and grayscale for one; for any other number give arrays. 8-bit images of one or three channels are resized
    by Pillow, all others as float32, so that nothing is cut to 8 bits.

    Attributes:
        recipe_fields: Settings that training follows, beside `size`.

    Raises:
        ValueError: if an image has other channels than the model, or `do_pad` is set where it has no meaning.
    """

    recipe_fields: ClassVar[tuple[str, ...]] = ("image_mean", "image_std")

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 224, "width": 224}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_pad = False

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        check_padding(self.do_pad, self.do_resize, self.do_center_crop, self.pad_size)

    @property
    def input_hw(self) -> tuple[int, int]:
        """Height and width of `pixel_values`."""
        return self.size["height"], self.size["width"]

    @property
    def num_channels(self) -> int:
        """Channels of the images that models of this processor take."""
        return 3 if isinstance(self.image_mean, float | int) else len(self.image_mean)

    def to_dict(self) -> dict[str, Any]:
        """The settings as they are saved; `auto_map` names the class in a list.

        From a string transformers derives the name of a video processor, and each pipeline asks whether its code may
        be run.
        """
        settings: dict[str, Any] = super().to_dict()
        auto_map = settings.get("auto_map") or {}
        for name, reference in auto_map.items():
            auto_map[name] = [reference] if isinstance(reference, str) else reference
        return settings

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Any,
    ) -> Any:
        """One image to an array (channels, height, width)."""
        mean = kwargs.get("image_mean", self.image_mean)
        num_channels = 3 if isinstance(mean, float | int) else len(mean)
        if num_channels == 1 and hasattr(image, "convert"):  # a PIL image
            image = image.convert("L")
        is_stack = not hasattr(image, "convert") and image.ndim == 3
        if is_stack and input_data_format is None and num_channels not in (1, 3):
            input_data_format = infer_channel_dimension_format(image, num_channels=num_channels)
        array = super().process_image(
            image, do_convert_rgb=do_convert_rgb and num_channels == 3, input_data_format=input_data_format, **kwargs
        )
        if len(array) != num_channels:
            raise ValueError(
                f"An image has {len(array)} channels, but image_mean is given for {num_channels}: give images of that "
                "many channels, or set image_mean and image_std for these."
            )
        return array

    def resize(self, image: Any, size: SizeDict, resample: Any = None, **kwargs: Any) -> Any:
        """Resizes an array (channels, height, width) with antialiasing."""
        if str(image.dtype) == "uint8" and len(image) in (1, 3):
            return super().resize(image, size, resample=resample, **kwargs)
        if resample not in TORCH_MODES:
            raise ValueError(
                f"Images of type {image.dtype} with {len(image)} channels are resized with resample=2 (bilinear) or 3 "
                f"(bicubic), not {resample}."
            )
        batch = torch.from_numpy(image).float()[None]
        resized = F.interpolate(batch, (size.height, size.width), mode=TORCH_MODES[resample], antialias=True)
        return resized[0].numpy()

    def _preprocess(self, images: list[Any], **kwargs: Any) -> BatchFeature:
        check_padding(kwargs["do_pad"], kwargs["do_resize"], kwargs["do_center_crop"], kwargs["pad_size"])
        if kwargs["do_pad"]:
            images = [self._letterbox(image, **kwargs) for image in images]
            kwargs |= {"do_resize": False, "do_pad": False}
        return super()._preprocess(images, **kwargs)

    def _letterbox(
        self,
        image: Any,
        size: SizeDict,
        resample: Any,
        image_mean: float | list[float],
        do_rescale: bool,
        rescale_factor: float,
        **kwargs: Any,
    ) -> Any:
        """An array (channels, height, width), resized to fit into `size` and padded to it."""
        height, width = fitted_size(image.shape[-2:], (size.height, size.width))
        resized = torch.from_numpy(self.resize(image, SizeDict(height=height, width=width), resample=resample))
        color = torch.as_tensor(image_mean, dtype=torch.float64).reshape(-1, 1, 1)
        if do_rescale:  # of whole values, as training pads
            color = (color * (1 / rescale_factor)).round()
        padded = color.to(resized.dtype).repeat(resized.shape[0] // color.shape[0], size.height, size.width)
        padded[:, :height, :width] = resized
        return padded.numpy()

    def covered_size(self, image_size: tuple[int, int]) -> tuple[float, float]:
        """Height and width of what the model's input shows, in pixels of an image (height, width): with `do_pad` the
        image and its padding, else the image."""
        if not self.do_pad:
            return image_size
        fitted = fitted_size(image_size, self.input_hw)
        height, width = (side * full / part for side, full, part in zip(image_size, self.input_hw, fitted))
        return height, width

    def resize_maps(self, maps: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Maps (n, channels, rows, columns) of the model's input to the height and width of its image, bilinearly.

        Padding is cut off in between, at the size of the input, where it ends between two pixels.
        """
        if self.do_pad and maps.shape[2:] != image_size:
            height, width = fitted_size(image_size, self.input_hw)
            maps = F.interpolate(maps, self.input_hw, mode="bilinear", align_corners=False)[..., :height, :width]
        return F.interpolate(maps, image_size, mode="bilinear", align_corners=False)


def fitted_size(image_size: tuple[float, float], size: tuple[int, int]) -> tuple[int, int]:
    """The largest height and width within `size` that have the aspect ratio of `image_size`, to whole pixels."""
    scale = min(most / side for side, most in zip(image_size, size))
    height, width = (min(max(round(side * scale), 1), most) for side, most in zip(image_size, size))
    return height, width


def check_padding(do_pad: Any, do_resize: Any, do_center_crop: Any, pad_size: Any) -> None:
    """ValueError where `do_pad` is no truth value, or set beside settings that exclude it."""
    if do_pad not in (None, False, True):
        raise ValueError(f"do_pad is {do_pad!r}, but must be true or false.")
    if do_pad and (do_center_crop or not do_resize or pad_size is not None):
        raise ValueError(
            "do_pad resizes images to fit into `size` and pads them to it: set do_resize to True, do_center_crop to "
            "False, and leave pad_size out."
        )


__all__ = ["VLMViTImageProcessor", "fitted_size"]
