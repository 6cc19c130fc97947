"""Image processor of every model of the package: resize, rescale, normalise; boxes back to pixels."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
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

    def post_process_object_detection(
        self,
        outputs: Any,
        threshold: float = 0.5,
        target_sizes: Tensor | Sequence[tuple[int, int]] | None = None,
        max_detections: int = 300,
    ) -> list[dict[str, Tensor]]:
        """Detections of each image from the `logits` and `pred_boxes` of a [`VLMViTForObjectDetection`].

        The best pairs of query and class are kept, so one query may give two classes, as COCO's evaluation wants it.

        Args:
            threshold: lowest score kept, 0 to 1.
            target_sizes: (height, width) of each original image in pixels. Without it boxes are fractions.
            max_detections: Largest number of detections per image.

        Returns:
            One dict per image: `scores` (n,) falling, `labels` (n,), `boxes` (n, 4) (x0, y0, x1, y1) within the image.

        Raises:
            ValueError: if there are not as many target sizes as images.
        """
        logits, boxes = outputs.logits.float(), outputs.pred_boxes.float()
        num_labels = logits.shape[-1]
        scores, index = logits.sigmoid().flatten(1).topk(min(max_detections, logits[0].numel()))  # (batch, kept)
        centre, size = boxes[..., :2], boxes[..., 2:]
        corners = torch.cat([centre - size / 2, centre + size / 2], dim=-1).clamp(0, 1)
        corners = corners.gather(1, (index // num_labels)[..., None].expand(-1, -1, 4))  # (batch, kept, 4)
        if target_sizes is not None:
            if len(target_sizes) != len(logits):
                raise ValueError(f"{len(target_sizes)} target_sizes are given for {len(logits)} images.")
            height_width = torch.as_tensor(target_sizes, dtype=torch.float32, device=corners.device)  # (batch, 2)
            corners = corners * height_width.flip(1).repeat(1, 2)[:, None]
        keep = scores > threshold
        return [
            {"scores": s[k], "labels": i[k] % num_labels, "boxes": b[k]}
            for s, i, b, k in zip(scores, index, corners, keep)
        ]


__all__ = ["VLMViTImageProcessor"]
