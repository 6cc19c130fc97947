"""MAE: masked auto-encoding (arXiv 2111.06377), written from the paper."""

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers.utils import ModelOutput, auto_docstring
from transformers.utils.generic import can_return_tuple

from .configuration_vlm_vit import VLMViTConfig
from .modeling_vlm_vit import VLMViTModel, VLMViTPreTrainedModel
from .ssl_layers import SSLConfig, as_vit_config, flatten_views
from .ssl_masks import mask_of, pixels_of, random_masking
from .ssl_predictor import MaskedPredictor
from .vit_layers import gather_tokens, patch_grid, patchify, unpatchify

DECODER_DEFAULTS = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 16}


@strict
class MAEConfig(SSLConfig):
    r"""Configuration of [`MAEForPreTraining`].

    Args:
        backbone_config (`VLMViTConfig` or `dict`, *optional*): The encoder; sin-cos positions when not given.
        decoder_config (`VLMViTConfig` or `dict`, *optional*):
            Width, depth and heads of the light decoder; 512 x 8 with 16 heads as in the paper when not given. Image,
            patch and channels are the encoder's.
        mask_ratio (`float`, defaults to 0.75): Share of the patches that the encoder does not see.
        norm_pix_loss (`bool`, defaults to `True`):
            Whether targets are normalised a patch (unbiased variance, eps 1e-6), the paper's better variant.
        use_cross_attention (`bool`, defaults to `False`):
            Whether the decoder's masked tokens attend to the visible ones alone and not to each other (CrossMAE,
            arXiv 2401.14391). A layer then costs what is predicted, and predictions do not depend on each other.
        prediction_ratio (`float`, defaults to 1.0):
            Share of the masked patches that are predicted in training, drawn anew each time: less work a step.
    """

    model_type = "vlm_mae"
    sub_configs = {"backbone_config": VLMViTConfig, "decoder_config": VLMViTConfig}

    decoder_config: Any = None
    mask_ratio: float = 0.75
    norm_pix_loss: bool = True
    use_cross_attention: bool = False
    prediction_ratio: float | int = 1.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        encoder = as_vit_config(self.backbone_config, position_embedding_type="sincos")
        of_encoder = {name: getattr(encoder, name) for name in ("image_size", "patch_size", "num_channels")}
        self.backbone_config = encoder
        self.decoder_config = as_vit_config(self.decoder_config, **DECODER_DEFAULTS, **of_encoder)
        super().__post_init__(**kwargs)
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"MAEConfig: mask_ratio must lie between 0 and 1, but is {self.mask_ratio}.")
        if not 0 < self.prediction_ratio <= 1:
            raise ValueError(
                f"MAEConfig: prediction_ratio must lie above 0 and up to 1, but is {self.prediction_ratio}."
            )


@auto_docstring
@dataclass
class MAEOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`): Mean squared error on the masked patches.
    predictions (`torch.FloatTensor` of shape `(batch, predicted, channels * patch_height * patch_width)`):
        Predicted pixels of masked patches, in the order of `masked_indices`.
    masked_indices (`torch.LongTensor` of shape `(batch, predicted)`):
        Row-major indices of the masked patches; in training, of the share of them that `prediction_ratio` leaves.
    """

    loss: Tensor | None = None
    predictions: Tensor | None = None
    masked_indices: Tensor | None = None


def normalise_patches(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Standardises each patch (..., values); returns the result, the means and the standard deviations."""
    mean = patches.mean(dim=-1, keepdim=True)
    std = (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    return (patches - mean) / std, mean, std


@auto_docstring
class MAEForPreTraining(VLMViTPreTrainedModel):
    """An encoder that sees a quarter of the patches and a light decoder that paints the others."""

    config_class = MAEConfig
    # The paper's only augmentation: random resized crop and flip.
    default_views = {"num_views": 1, "crop_scale": [0.2, 1.0], "flip": 0.5}

    def __init__(self, config: MAEConfig):
        super().__init__(config)
        self.backbone = VLMViTModel(config.backbone_config)
        self.decoder = MaskedPredictor(
            config.decoder_config,
            config.backbone_config.hidden_size,
            config.decoder_config.patch_dim,
            use_cross_attention=config.use_cross_attention,
        )
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(self, pixel_values: Tensor, noise: Tensor | None = None, **kwargs: Any) -> MAEOutput:
        r"""
        pixel_values (`torch.FloatTensor` of shape `(batch, views, channels, height, width)` or without views):
            Images; each view counts as an image.
        noise (`torch.FloatTensor` of shape `(batch * views, patches)`, *optional*):
            The patches of the lowest values stay visible; uniform random when not given.
        """
        images, patch_hw = flatten_views(pixel_values), self.config.backbone_config.patch_hw
        targets = patchify(images, patch_hw)  # (batch, patches, patch_dim)
        if noise is None:
            noise = torch.rand(targets.shape[:2], device=targets.device)
        visible, masked = random_masking(noise, self.config.mask_ratio)
        if self.training:
            masked = masked[:, : max(1, round(masked.shape[1] * self.config.prediction_ratio))]
        encoded = self.backbone(images, visible_indices=visible).last_hidden_state  # (batch, prefix + visible, dim)
        predictions = self.decoder(
            encoded, visible, masked, patch_grid(images, patch_hw)
        )  # (batch, predicted, patch_dim)
        targets = gather_tokens(targets, masked).float()
        if self.config.norm_pix_loss:
            targets = normalise_patches(targets)[0]
        loss = (predictions.float() - targets).square().mean()
        return MAEOutput(loss=loss, predictions=predictions, masked_indices=masked)

    @torch.no_grad()
    def reconstruct(self, pixel_values: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Paints the masked patches of images into the images.

        Takes what `forward` takes. Returns the reconstruction (batch, channels, height, width) in the input's
        normalisation, visible patches as they were, and the mask (batch, 1, height, width), true where painted.
        Patches predicted in normalised form get the mean and deviation of the true patch. In training mode a
        `prediction_ratio` below 1 leaves some masked patches as they are.
        """
        images, patch_hw = flatten_views(pixel_values), self.config.backbone_config.patch_hw
        output = self(pixel_values, noise=noise, return_dict=True)
        patches = patchify(images, patch_hw).float()
        predictions = output.predictions.float()
        if self.config.norm_pix_loss:
            _, mean, std = normalise_patches(gather_tokens(patches, output.masked_indices))
            predictions = predictions * std + mean
        painted = patches.scatter(1, output.masked_indices[:, :, None].expand_as(predictions), predictions)
        masked = mask_of(output.masked_indices, patches.shape[1])
        return unpatchify(painted, patch_grid(images, patch_hw), patch_hw), pixels_of(masked, images, patch_hw)

    @staticmethod
    def hidden_patches(config: MAEConfig, grid_hw: tuple[int, int], num_images: int) -> Tensor:
        """Draws masks as `forward` does: (images, patches) bool, true where hidden."""
        num_patches = grid_hw[0] * grid_hw[1]
        return mask_of(random_masking(torch.rand(num_images, num_patches), config.mask_ratio)[1], num_patches)


__all__ = ["MAEConfig", "MAEForPreTraining", "MAEOutput"]
