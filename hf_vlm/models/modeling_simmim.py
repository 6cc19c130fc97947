"""SimMIM: pixels of masked squares by the encoder and one linear layer (arXiv 2111.09886), written from the paper."""

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.utils import ModelOutput, auto_docstring
from transformers.utils.generic import can_return_tuple

from .modeling_vlm_vit import VLMViTModel, VLMViTPreTrainedModel
from .ssl_layers import SSLConfig, flatten_views
from .ssl_masks import block_grid, grid_block_masking, pixel_mask
from .vit_layers import patch_grid, patchify, unpatchify


@strict
class SimMIMConfig(SSLConfig):
    r"""Configuration of [`SimMIMForPreTraining`].

    Args:
        backbone_config (`VLMViTConfig` or `dict`, *optional*): The encoder.
        mask_ratio (`float`, defaults to 0.6): Share of the squares that are hidden.
        mask_unit_size (`int`, defaults to 32):
            Side of these squares in pixels, a multiple of the patch. The paper's 32 is meant for images of 192 to 224.
    """

    model_type = "vlm_simmim"

    mask_ratio: float = 0.6
    mask_unit_size: int = 32
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"SimMIMConfig: mask_ratio must lie between 0 and 1, but is {self.mask_ratio}.")
        for patch in self.backbone_config.patch_hw:
            if self.mask_unit_size < 1 or self.mask_unit_size % patch:
                raise ValueError(
                    f"SimMIMConfig: mask_unit_size {self.mask_unit_size} is not a multiple of the patch of {patch} "
                    "pixels: set mask_unit_size so that whole patches are masked."
                )

    @property
    def unit_hw(self) -> tuple[int, int]:
        """Rows and columns of patches of a square."""
        patch_height, patch_width = self.backbone_config.patch_hw
        return self.mask_unit_size // patch_height, self.mask_unit_size // patch_width


@auto_docstring
@dataclass
class SimMIMOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`): Mean absolute error of the masked pixels of an image, over the images.
    predictions (`torch.FloatTensor` of shape `(batch, patches, channels * patch_height * patch_width)`):
        Predicted pixels of all patches; those that were seen are not trained.
    masked (`torch.BoolTensor` of shape `(batch, patches)`): True for the patches that were hidden.
    """

    loss: Tensor | None = None
    predictions: Tensor | None = None
    masked: Tensor | None = None


def masked_l1(predictions: Tensor, targets: Tensor, masked: Tensor) -> Tensor:
    """Mean absolute error where masked (batch, patches) of values (batch, patches, values), in float32.

    Averaged within each image first: squares that the border cuts off leave images unequal numbers of masked patches,
    and ranks average over images.
    """
    errors = (predictions.float() - targets.float()).abs().mean(-1) * masked  # (batch, patches)
    return (errors.sum(1) / masked.sum(1)).mean()


@auto_docstring
class SimMIMForPreTraining(VLMViTPreTrainedModel):
    """An encoder of the whole image, hidden squares and all, and a linear layer that says what they hide."""

    config_class = SimMIMConfig
    default_views = {"num_views": 1, "crop_scale": [0.67, 1.0], "flip_probability": 0.5}  # the paper's

    def __init__(self, config: SimMIMConfig):
        super().__init__(config)
        encoder = config.backbone_config
        self.backbone = VLMViTModel(encoder)
        self.mask_token = nn.Parameter(torch.empty(1, 1, encoder.hidden_size))
        self.head = nn.Linear(encoder.hidden_size, encoder.patch_dim)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(self, pixel_values: Tensor, noise: Tensor | None = None, **kwargs: Any) -> SimMIMOutput:
        r"""
        pixel_values (`torch.FloatTensor` of shape `(batch, views, channels, height, width)` or without views):
            Images; each view counts as an image.
        noise (`torch.FloatTensor` of shape `(batch * views, squares)`, *optional*):
            The squares of the highest values are hidden; uniform random when not given.
        """
        images, encoder = flatten_views(pixel_values), self.config.backbone_config
        grid_hw = patch_grid(images, encoder.patch_hw)
        if noise is None:
            noise = _noise(self.config, grid_hw, len(images), images.device)
        masked = grid_block_masking(noise, grid_hw, self.config.unit_hw, self.config.mask_ratio)  # (batch, patches)
        tokens = self.backbone(images, masked=masked, mask_token=self.mask_token).last_hidden_state
        predictions = self.head(tokens[:, encoder.num_prefix_tokens :])  # (batch, patches, patch_dim)
        loss = masked_l1(predictions, patchify(images, encoder.patch_hw), masked)
        return SimMIMOutput(loss=loss, predictions=predictions, masked=masked)

    @torch.no_grad()
    def reconstruct(self, pixel_values: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Paints the hidden squares of images into the images.

        Takes what `forward` takes. Returns the reconstruction (batch, channels, height, width) in the input's
        normalisation, visible patches as they were, and the mask (batch, 1, height, width), true where painted.
        """
        images, patch_hw = flatten_views(pixel_values), self.config.backbone_config.patch_hw
        output = self(pixel_values, noise=noise, return_dict=True)
        mask = pixel_mask(output.masked, images, patch_hw)
        painted = unpatchify(output.predictions.float(), patch_grid(images, patch_hw), patch_hw)
        return torch.where(mask, painted, images.float()), mask

    @staticmethod
    def sample_mask(config: SimMIMConfig, grid_hw: tuple[int, int], num_images: int) -> Tensor:
        """Draws masks as `forward` does: (images, patches) bool, true where hidden."""
        return grid_block_masking(_noise(config, grid_hw, num_images), grid_hw, config.unit_hw, config.mask_ratio)


def _noise(
    config: SimMIMConfig, grid_hw: tuple[int, int], num_images: int, device: torch.device | None = None
) -> Tensor:
    """Random numbers (images, squares); ValueError where there is only one square, so that nothing could be seen."""
    rows, columns = block_grid(grid_hw, config.unit_hw)
    if rows * columns < 2:
        raise ValueError(
            f"An image of {grid_hw[0]} x {grid_hw[1]} patches is a single square of mask_unit_size "
            f"{config.mask_unit_size} pixels: set a smaller mask_unit_size, or use larger images."
        )
    return torch.rand(num_images, rows * columns, device=device)


__all__ = ["SimMIMConfig", "SimMIMForPreTraining", "SimMIMOutput", "masked_l1"]
