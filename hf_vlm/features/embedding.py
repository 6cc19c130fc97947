"""Features of images from anywhere, of a frozen encoder with its image processor.

Images are paths (of files, of folders, or with wildcards), Pillow images or uint8 arrays.
"""

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hf_vlm.data.images import ImageLike, expand_images, load_image
from hf_vlm.features.extraction import encode, feature_size
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_vlm_vit import VLMViTModel

__all__ = ["embed_images", "prepare_images"]


def embed_images(
    encoder: VLMViTModel,
    images: ImageLike | Iterable[ImageLike],
    processor: VLMViTImageProcessor,
    *,
    pooling: str = "mean",
    batch_size: int = 32,
) -> Tensor:
    """Features (images, features) float32 of images; see `encode`.

    Raises:
        ValueError: An image cannot be read, a path matches none, or the encoder has no such pooling.
    """
    everything = expand_images(images)
    features = []
    while batch := list(itertools.islice(everything, batch_size)):
        features.append(encode(encoder, prepare_images(encoder, batch, processor), pooling=pooling))
    return torch.cat(features) if features else torch.empty(0, feature_size(encoder, pooling))


def prepare_images(encoder: VLMViTModel, images: Sequence[ImageLike], processor: VLMViTImageProcessor) -> Tensor:
    """`pixel_values` (images, channels, height, width), as the processor makes them."""
    arrays = [load_image(image, num_channels=encoder.config.num_channels) for image in images]
    return processor(arrays, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
