"""Image processors of transformers as [`VLMViTImageProcessor`], and back."""

from collections.abc import Sequence
from typing import Any

from transformers import ViTImageProcessorPil

from .configuration_vlm_vit import VLMViTConfig
from .image_processing_vlm_vit import VLMViTImageProcessor


def whole_patches(size: int | Sequence[int], patch_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width in pixels, rounded down to whole patches."""
    sides, patches = ((given, given) if isinstance(given, int) else given for given in (size, patch_size))
    height, width = (side // patch * patch for side, patch in zip(sides, patches))
    return height, width


def load_processor(source: str, config: VLMViTConfig) -> tuple[VLMViTImageProcessor, str]:
    """The image processor of a checkpoint, as far as ours can do the same, and a line on where it comes from.

    Mean, standard deviation, rescaling and filter are the checkpoint's. Ours resizes to a fixed size of whole patches,
    which is the original's crop where it crops the centre. Without a preprocessor_config.json the size is the
    encoder's; without statistics they are ImageNet's, or 0.5 for other than 3 channels.
    """
    try:
        found, origin = ViTImageProcessorPil.get_image_processor_dict(source)[0], "the checkpoint's"
    except OSError:
        found, origin = {}, "no preprocessor_config.json: the encoder's size, default statistics"
    height, width = _processor_size(found, config)
    fields = {name: found[name] for name in ("resample", "do_rescale", "rescale_factor") if name in found}
    for name, neutral in (("image_mean", 0.0), ("image_std", 1.0)):
        if found.get("do_normalize", True) is False:
            fields[name] = [neutral] * config.num_channels
        elif name in found or config.num_channels != 3:
            fields[name] = found.get(name, [0.5] * config.num_channels)
    if found.get("do_center_crop") or "shortest_edge" in str(found.get("size")):
        origin += ", but images are resized to this size as they are, without keeping sides in proportion and cropping"
    return VLMViTImageProcessor(size={"height": height, "width": width}, **fields), f"{height} x {width}: {origin}"


def _processor_size(found: dict[str, Any], config: VLMViTConfig) -> tuple[int, int]:
    size = (found.get("crop_size") if found.get("do_center_crop") else None) or found.get("size") or {}
    if isinstance(size, int):
        size = {"shortest_edge": size}
    sides = [size.get(side) or size.get("shortest_edge") or 0 for side in ("height", "width")]
    height, width = whole_patches(sides, config.patch_hw)
    return (height, width) if height and width else config.image_hw


def load_our_processor(source: str) -> tuple[ViTImageProcessorPil | None, str]:
    """The image processor of transformers that does what ours of a checkpoint does; None where it has none."""
    try:
        ours = VLMViTImageProcessor.from_pretrained(source)
    except OSError:
        return None, "no preprocessor_config.json, and so none was written"
    names = ("size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    processor = ViTImageProcessorPil(**{name: getattr(ours, name) for name in names})
    origin = "the checkpoint's" + (
        ", but without padding, and so not in the images' aspect ratio" if ours.do_pad else ""
    )
    return processor, f"{ours.size['height']} x {ours.size['width']}: {origin}"


__all__ = ["load_our_processor", "load_processor", "whole_patches"]
