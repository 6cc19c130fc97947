"""Image processor of the encoder and base of every task's own: resize, rescale, normalise."""

from typing import Any

import torch
import torch.nn.functional as F
from transformers.image_processing_backends import PilBackend
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

    Models have as many channels as `image_mean` has values (3 when it is one number). PIL images become RGB for three
    channels and grayscale for one; for any other number give arrays. 8-bit images of one or three channels are resized
    by Pillow, all others as float32, so that nothing is cut to 8 bits.

    Raises:
        ValueError: if an image has other channels than the model.
    """

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 224, "width": 224}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

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


__all__ = ["VLMViTImageProcessor"]
