"""MAE: masked auto-encoding (arXiv 2111.06377), written from the paper."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers.utils import ModelOutput, auto_docstring

from .configuration_vlm_vit import VLMViTConfig
from .modeling_vlm_vit import VLMViTModel
from .ssl_layers import flatten_views
from .ssl_masks import block_grid, blocks_to_patches, mask_from_indices, pixel_mask, random_masking
from .ssl_model import SSLConfig, SSLPreTrainedModel, as_vit_config, returns_loss
from .ssl_pixels import normalise_patches, reconstruct_images
from .ssl_predictor import MaskedPredictor
from .vit_layers import gather_patches, patch_grid

DECODER_DEFAULTS = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 16}
# Fields of `MAEImageLossesConfig` that plain configurations held as well before the two were separate.
FORMER_PREFIXES = ("perceptual_", "adversarial_", "discriminator_", "image_mean", "image_std", "momentum")


@strict
class MAEConfig(SSLConfig):
    r"""Configuration of [`MAEForPreTraining`].

    Args:
        backbone_config (`VLMViTConfig` or `dict`, *optional*): The encoder; sin-cos positions when not given.
        decoder_config (`VLMViTConfig` or `dict`, *optional*):
            Width, depth and heads of the light decoder; 512 x 8 with 16 heads as in the paper when not given. Image,
            patch and channels are the encoder's.
        mask_ratio (`float`, defaults to 0.75): Fraction of the patches that are hidden from the encoder.
        mask_block_size (`int`, defaults to 1):
            Rows and columns of patches that are masked together, as in Pixio (arXiv 2512.15715), which masks 2 x 2 to
            4 x 4; the fraction is kept to the patch.
        norm_pix_loss (`bool`, defaults to `True`):
            Whether each patch is normalised as a target (unbiased variance, eps 1e-6), the paper's better variant.
        use_cross_attention (`bool`, defaults to `False`):
            Whether the decoder's masked tokens attend to the visible ones alone and not to each other, as in CrossMAE
            (arXiv 2401.14391). The cost of a layer is then that of what is predicted, and predictions do not depend on
            each other. It is MAE's decoder in all else, and not CrossMAE's, whose layers read learned mixtures of all
            encoder layers.
        prediction_ratio (`float`, defaults to 1.0):
            Fraction of the masked patches that are predicted in training, sampled in each step: less work per step.

    Raises:
        ValueError: if a ratio is out of its range, or the configuration is one of `MAEImageLossesConfig`.
    """

    model_type = "vlm_mae"
    sub_configs = {"backbone_config": VLMViTConfig, "decoder_config": VLMViTConfig}

    decoder_config: Any = None
    mask_ratio: float = 0.75
    mask_block_size: int = 1
    norm_pix_loss: bool = True
    use_cross_attention: bool = False
    prediction_ratio: float | int = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        encoder = as_vit_config(self.backbone_config, position_embedding_type="sincos")
        of_encoder = {name: getattr(encoder, name) for name in ("image_size", "patch_size", "num_channels")}
        self.backbone_config = encoder
        self.decoder_config = as_vit_config(self.decoder_config, **DECODER_DEFAULTS, **of_encoder)
        former = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith(FORMER_PREFIXES)}
        super().__post_init__(**kwargs)
        if former.get("perceptual_weight") or former.get("adversarial_weight"):
            raise ValueError(
                "MAEConfig: perceptual_weight and adversarial_weight are fields of the method mae_image_losses: use "
                "it, or MAEImageLossesForPreTraining, which also loads what MAEForPreTraining saved with such losses."
            )
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"MAEConfig: mask_ratio must lie between 0 and 1, but is {self.mask_ratio}.")
        if self.mask_block_size < 1:
            raise ValueError(f"MAEConfig: mask_block_size must be 1 or more patches, but is {self.mask_block_size}.")
        if not 0 < self.prediction_ratio <= 1:
            raise ValueError(
                f"MAEConfig: prediction_ratio must lie above 0 and up to 1, but is {self.prediction_ratio}."
            )


def sample_noise(
    config: MAEConfig, grid_hw: tuple[int, int], num_images: int, device: torch.device | None = None
) -> Tensor:
    """Uniform noise (images, patches), the same for the patches of a mask block; those of the lowest stay visible."""
    block_hw = (config.mask_block_size, config.mask_block_size)
    noise = torch.rand(num_images, math.prod(block_grid(grid_hw, block_hw)), device=device)
    return blocks_to_patches(noise, grid_hw, block_hw)


@auto_docstring
@dataclass
class MAEOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`): Mean squared error on the masked patches.
    predictions (`torch.FloatTensor` of shape `(batch, predicted, channels * patch_height * patch_width)`):
        Predicted pixels of masked patches, in the order of `masked_indices`.
    masked_indices (`torch.LongTensor` of shape `(batch, predicted)`):
        Row-major indices of the masked patches; in training, of the fraction `prediction_ratio` of them.
    """

    loss: Tensor | None = None
    predictions: Tensor | None = None
    masked_indices: Tensor | None = None


@auto_docstring
class MAEForPreTraining(SSLPreTrainedModel):
    """An encoder of a quarter of the patches, and a light decoder that predicts the pixels of the others."""

    config_class = MAEConfig
    # The paper's only augmentation: random resized crop and flip.
    default_views = {"num_views": 1, "crop_scale": [0.2, 1.0], "flip_probability": 0.5}

    def __init__(self, config: MAEConfig):
        super().__init__(config)
        self.build(config)
        self.post_init()

    def build(self, config: Any) -> None:
        """Makes the parts of the model."""
        decoder, use_cross_attention = config.decoder_config, config.use_cross_attention
        width = config.backbone_config.hidden_size
        self.backbone = VLMViTModel(config.backbone_config)
        self.decoder = MaskedPredictor(decoder, width, decoder.patch_dim, use_cross_attention=use_cross_attention)

    @returns_loss
    @auto_docstring
    def forward(self, pixel_values: Tensor, noise: Tensor | None = None) -> MAEOutput:
        r"""
        pixel_values (`torch.FloatTensor` of shape `(batch, views, channels, height, width)` or without views):
            Images; each view counts as an image.
        noise (`torch.FloatTensor` of shape `(batch * views, patches)`, *optional*):
            The patches of the lowest values stay visible; uniform random when not given.
        """
        images = flatten_views(pixel_values)
        predictions, masked = self._predict(images, noise)
        targets = gather_patches(images, masked, self.config.backbone_config.patch_hw).float()
        if self.config.norm_pix_loss:
            targets = normalise_patches(targets)
        loss = F.mse_loss(predictions.float(), targets)
        return MAEOutput(loss=loss, predictions=predictions, masked_indices=masked)

    def _predict(self, images: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Predictions (batch, predicted, patch_dim) and the indices (batch, predicted) of their patches."""
        grid_hw = patch_grid(images, self.config.backbone_config.patch_hw)
        if noise is None:
            noise = sample_noise(self.config, grid_hw, images.shape[0], images.device)
        visible, masked = random_masking(noise, self.config.mask_ratio)
        if self.training:
            masked = masked[:, : max(1, round(masked.shape[1] * self.config.prediction_ratio))]
        encoded = self.backbone(images, visible_indices=visible).last_hidden_state  # (batch, prefix + visible, dim)
        return self.decoder(encoded, visible, masked, grid_hw), masked

    def _reconstruct(self, images: Tensor, predictions: Tensor, masked: Tensor) -> Tensor:
        patch_hw, normalised = self.config.backbone_config.patch_hw, self.config.norm_pix_loss
        return reconstruct_images(images, predictions, masked, patch_hw, normalised)

    @torch.no_grad()
    def reconstruct(self, pixel_values: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Reconstructs images from their visible patches.

        Takes what `forward` takes. Returns the reconstruction (batch, channels, height, width) in the input's
        normalisation, with the visible patches of the input, and the mask (batch, 1, height, width), true where
        pixels are predicted. Patches predicted in normalised form get the mean and deviation of the true patch. In
        training mode a `prediction_ratio` below 1 leaves some masked patches as they are.
        """
        images, patch_hw = flatten_views(pixel_values), self.config.backbone_config.patch_hw
        predictions, masked = self._predict(images, noise)
        is_masked = mask_from_indices(masked, math.prod(patch_grid(images, patch_hw)))
        return self._reconstruct(images, predictions, masked), pixel_mask(is_masked, images, patch_hw)

    @staticmethod
    def sample_mask(
        config: MAEConfig, grid_hw: tuple[int, int], num_images: int, device: torch.device | None = None
    ) -> Tensor:
        noise = sample_noise(config, grid_hw, num_images, device)
        return mask_from_indices(random_masking(noise, config.mask_ratio)[1], math.prod(grid_hw))


__all__ = ["MAEConfig", "MAEForPreTraining", "MAEOutput"]
