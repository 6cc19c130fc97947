"""SimMIM: pixels of mask blocks by the encoder and one linear layer (arXiv 2111.09886), written from the paper."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.utils import ModelOutput, auto_docstring

from .modeling_vlm_vit import VLMViTModel
from .ssl_layers import flatten_views
from .ssl_masks import block_grid, grid_block_masking, pixel_mask
from .ssl_model import SSLConfig, SSLPreTrainedModel, returns_loss
from .vit_layers import patch_grid, patchify, unpatchify


@strict
class SimMIMConfig(SSLConfig):
    r"""Configuration of [`SimMIMForPreTraining`].

    Args:
        backbone_config (`VLMViTConfig` or `dict`, *optional*): The encoder.
        mask_ratio (`float`, defaults to 0.6): Fraction of the mask blocks that are masked, their number rounded up.
        mask_patch_size (`int`, defaults to 32):
            Side of a mask block in pixels, a multiple of the patch. The paper's 32 is meant for images of 192 to 224.

    Raises:
        ValueError: if the ratio is out of its range, or mask blocks are not made of whole patches.
    """

    model_type = "vlm_simmim"
    renamed_fields: ClassVar[dict[str, str]] = {"mask_unit_size": "mask_patch_size"}

    mask_ratio: float = 0.6
    mask_patch_size: int = 32

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"SimMIMConfig: mask_ratio must lie between 0 and 1, but is {self.mask_ratio}.")
        for patch in self.backbone_config.patch_hw:
            if self.mask_patch_size < 1 or self.mask_patch_size % patch:
                raise ValueError(
                    f"SimMIMConfig: mask_patch_size {self.mask_patch_size} is not a multiple of the patch of {patch} "
                    "pixels: set mask_patch_size so that whole patches are masked."
                )

    @property
    def mask_block_hw(self) -> tuple[int, int]:
        """Rows and columns of patches in a mask block."""
        patch_height, patch_width = self.backbone_config.patch_hw
        return self.mask_patch_size // patch_height, self.mask_patch_size // patch_width


@auto_docstring
@dataclass
class SimMIMOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`): Mean absolute error of the masked pixels of an image, over the images.
    predictions (`torch.FloatTensor` of shape `(batch, patches, channels * patch_height * patch_width)`):
        Predicted pixels of all patches; those of visible patches are not trained.
    masked (`torch.BoolTensor` of shape `(batch, patches)`): True for the masked patches.
    """

    loss: Tensor | None = None
    predictions: Tensor | None = None
    masked: Tensor | None = None


def masked_l1(predictions: Tensor, targets: Tensor, masked: Tensor) -> Tensor:
    """Mean absolute error where masked (batch, patches) of values (batch, patches, values), in float32.

    Averaged within each image first: mask blocks that the border cuts off leave images unequal numbers of masked
    patches, and ranks average over images.
    """
    errors = (predictions.float() - targets.float()).abs().mean(-1) * masked  # (batch, patches)
    return (errors.sum(1) / masked.sum(1)).mean()


@auto_docstring
class SimMIMForPreTraining(SSLPreTrainedModel):
    """An encoder of all patches, masked ones included, and a linear layer that predicts the pixels of these."""

    config_class = SimMIMConfig
    default_views = {"num_views": 1, "crop_scale": [0.67, 1.0], "flip_probability": 0.5}  # the paper's

    def __init__(self, config: SimMIMConfig):
        super().__init__(config)
        encoder = config.backbone_config
        self.backbone = VLMViTModel(encoder)
        self.mask_token = nn.Parameter(torch.empty(1, 1, encoder.hidden_size))
        self.head = nn.Linear(encoder.hidden_size, encoder.patch_dim)
        self.post_init()

    @returns_loss
    @auto_docstring
    def forward(self, pixel_values: Tensor, noise: Tensor | None = None) -> SimMIMOutput:
        r"""
        pixel_values (`torch.FloatTensor` of shape `(batch, views, channels, height, width)` or without views):
            Images; each view counts as an image.
        noise (`torch.FloatTensor` of shape `(batch * views, mask blocks)`, *optional*):
            The mask blocks of the highest values are masked; uniform random when not given.
        """
        images, encoder = flatten_views(pixel_values), self.config.backbone_config
        grid_hw = patch_grid(images, encoder.patch_hw)
        if noise is None:
            noise = _noise(self.config, grid_hw, images.shape[0], images.device)
        masked = grid_block_masking(
            noise, grid_hw, self.config.mask_block_hw, self.config.mask_ratio
        )  # (batch, patches)
        tokens = self.backbone(images, masked=masked, mask_token=self.mask_token).last_hidden_state
        predictions = self.head(tokens[:, encoder.num_prefix_tokens :])  # (batch, patches, patch_dim)
        loss = masked_l1(predictions, patchify(images, encoder.patch_hw), masked)
        return SimMIMOutput(loss=loss, predictions=predictions, masked=masked)

    @torch.no_grad()
    def reconstruct(self, pixel_values: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Reconstructs images from their visible patches.

        Takes what `forward` takes. Returns the reconstruction (batch, channels, height, width) in the input's
        normalisation, with the visible patches of the input, and the mask (batch, 1, height, width), true where
        pixels are predicted.
        """
        images, patch_hw = flatten_views(pixel_values), self.config.backbone_config.patch_hw
        output = self(pixel_values, noise=noise, return_dict=True)
        mask = pixel_mask(output.masked, images, patch_hw)
        predicted = unpatchify(output.predictions.float(), patch_grid(images, patch_hw), patch_hw)
        return torch.where(mask, predicted, images.float()), mask

    @staticmethod
    def sample_mask(
        config: SimMIMConfig, grid_hw: tuple[int, int], num_images: int, device: torch.device | None = None
    ) -> Tensor:
        noise = _noise(config, grid_hw, num_images, device)
        return grid_block_masking(noise, grid_hw, config.mask_block_hw, config.mask_ratio)


def _noise(config: SimMIMConfig, grid_hw: tuple[int, int], num_images: int, device: torch.device | None) -> Tensor:
    """Uniform noise (images, mask blocks); ValueError where there is only one block, which would be masked or not."""
    rows, columns = block_grid(grid_hw, config.mask_block_hw)
    if rows * columns < 2:
        raise ValueError(
            f"An image of {grid_hw[0]} x {grid_hw[1]} patches is a single mask block of mask_patch_size "
            f"{config.mask_patch_size} pixels: set a smaller mask_patch_size, or use larger images."
        )
    return torch.rand(num_images, rows * columns, device=device)


__all__ = ["SimMIMConfig", "SimMIMForPreTraining", "SimMIMOutput", "masked_l1"]
