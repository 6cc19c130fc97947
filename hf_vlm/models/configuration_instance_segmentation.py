"""Configuration of the detector that finds a mask for each object."""

from huggingface_hub.dataclasses import strict

from .configuration_detection import VLMViTDetectionConfig


@strict
class VLMViTInstanceSegmentationConfig(VLMViTDetectionConfig):
    r"""Shape and loss of a [`VLMViTForInstanceSegmentation`]: those of the detector, and of its mask head.

    The mask head's defaults are RF-DETR's (arXiv 2511.09554), but for its width and its part in matching and loss.

    Args:
        mask_feature_size (`int`, defaults to 64): Channels of the map that masks are made of.
        mask_stride (`int`, defaults to 4): Pixels of the image, in each direction, per pixel of a mask.
        mask_point_ratio (`int`, defaults to 16): Pixels of a mask per point at which its loss is computed.
        mask_cost, dice_cost: Weights in the matching cost: cross entropy and Dice of the masks. RF-DETR's are 5, from
            pretrained weights; with less, boxes decide which query learns which object while masks are new.
        mask_loss_weight, dice_loss_weight: Weights in the loss of each stage. RF-DETR's are 5, from pretrained
            weights; with as much, the gradients of new masks drown those of the boxes.

    Raises:
        ValueError: if sizes and heads do not divide, or a count is out of its range.
    """

    model_type = "vlm_vit_instance_segmentation"

    mask_feature_size: int = 64
    mask_stride: int = 4
    mask_point_ratio: int = 16
    mask_cost: float | int = 1
    dice_cost: float | int = 1
    mask_loss_weight: float | int = 1
    dice_loss_weight: float | int = 1

    def _check(self) -> None:
        super()._check()
        for name in ("mask_feature_size", "mask_stride", "mask_point_ratio"):
            if getattr(self, name) < 1:
                raise ValueError(f"{type(self).__name__}: {name} is {getattr(self, name)}, but must be at least 1.")


__all__ = ["VLMViTInstanceSegmentationConfig"]
