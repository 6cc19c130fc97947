"""MAE: masked auto-encoding (arXiv 2111.06377), written from the paper; and losses of what it paints."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import AutoConfig
from transformers.utils import ModelOutput, auto_docstring
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .configuration_vlm_vit import VLMViTConfig
from .modeling_vlm_vit import VLMViTModel, VLMViTPreTrainedModel
from .ssl_adversarial import PatchDiscriminator, adversarial_losses
from .ssl_frozen import FrozenEncoderMixin, nearest_hw, patch_size_of, read_frozen, renormalise, resize_map
from .ssl_layers import SSLConfig, as_vit_config, flatten_views
from .ssl_masks import mask_from_indices, pixel_mask, random_masking
from .ssl_perceptual import choose_layers, count_layers, features_of_layers, perceptual_distance
from .ssl_predictor import MaskedPredictor
from .ssl_teacher import TeacherMixin
from .vit_layers import gather_patches, gather_tokens, patch_grid, patchify, unpatchify

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
        perceptual_weight (`float`, defaults to 0.0):
            Weight, beside the pixel loss, of the distance of the painted image to the original in the features of an
            encoder that does not learn from it (see `perceptual_distance`), as in Perceptual MAE (arXiv 2212.14504).
            Distances are small: a frozen encoder that knows such images has shown a gain at 30, and none at 1.
        perceptual_encoder (`str`, defaults to `""`):
            That encoder: a folder or Hub id of a model of transformers that gives hidden states, or of an encoder of
            this package. When not given, the moving average of the model's own encoder, which needs no other weights.
        perceptual_encoder_revision, perceptual_encoder_config, perceptual_encoder_mean, perceptual_encoder_std:
            Its commit, configuration and normalisation; found when not given.
        perceptual_layers (`list`, *optional*): Its layers that are compared; the ends of four quarters when not given.
        momentum (`float`, defaults to 0.996): Momentum of the moving average at the start; 1 at the end.
        image_mean, image_std (`list`, *optional*):
            Of the images that `forward` is given; ImageNet's for three channels when not given, else 0.5.
        adversarial_weight (`float`, defaults to 0.0):
            Weight of the loss by which the decoder learns to be taken for real (see `adversarial_losses`).
        adversarial_start (`float`, defaults to 0.25): Share of training before both players of that game learn.
        discriminator_weight (`float`, defaults to 1.0): Weight of the discriminator's own loss. Adam takes no notice
            of it; the clipping of gradients does.
        discriminator_size (`int`, defaults to 64): Channels of its first layer.
        discriminator_layers (`int`, defaults to 3): Layers that halve the resolution.
    """

    model_type = "vlm_mae"
    sub_configs = {
        "backbone_config": VLMViTConfig,
        "decoder_config": VLMViTConfig,
        "perceptual_encoder_config": AutoConfig,
    }

    decoder_config: Any = None
    mask_ratio: float = 0.75
    norm_pix_loss: bool = True
    use_cross_attention: bool = False
    prediction_ratio: float | int = 1.0
    perceptual_weight: float | int = 0.0
    perceptual_encoder: str = ""
    perceptual_encoder_revision: str | None = None
    perceptual_encoder_config: Any = None
    perceptual_encoder_mean: list[float] | tuple[float, ...] | None = None
    perceptual_encoder_std: list[float] | tuple[float, ...] | None = None
    perceptual_layers: list[int] | tuple[int, ...] | None = None
    momentum: float | int = 0.996
    image_mean: list[float] | tuple[float, ...] | None = None
    image_std: list[float] | tuple[float, ...] | None = None
    adversarial_weight: float | int = 0.0
    adversarial_start: float | int = 0.25
    discriminator_weight: float | int = 1.0
    discriminator_size: int = 64
    discriminator_layers: int = 3
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        encoder = as_vit_config(self.backbone_config, position_embedding_type="sincos")
        of_encoder = {name: getattr(encoder, name) for name in ("image_size", "patch_size", "num_channels")}
        self.backbone_config = encoder
        self.decoder_config = as_vit_config(self.decoder_config, **DECODER_DEFAULTS, **of_encoder)
        if self.perceptual_weight:
            read_frozen(self, "perceptual_encoder")
        super().__post_init__(**kwargs)
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"MAEConfig: mask_ratio must lie between 0 and 1, but is {self.mask_ratio}.")
        if not 0 < self.prediction_ratio <= 1:
            raise ValueError(
                f"MAEConfig: prediction_ratio must lie above 0 and up to 1, but is {self.prediction_ratio}."
            )
        if self.has_image_losses and self.prediction_ratio < 1:
            raise ValueError(
                "MAEConfig: perceptual and adversarial losses are of whole painted images: they need prediction_ratio "
                f"1, but it is {self.prediction_ratio}."
            )
        for name in ("perceptual_weight", "adversarial_weight", "discriminator_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"MAEConfig: {name} must not be negative, but is {getattr(self, name)}.")
        if min(self.discriminator_size, self.discriminator_layers) < 1:
            raise ValueError("MAEConfig: discriminator_size and discriminator_layers must be 1 at least.")
        if not 0 <= self.adversarial_start < 1:
            raise ValueError(
                f"MAEConfig: adversarial_start is a share of training from 0 to below 1, but {self.adversarial_start}."
            )

    @property
    def has_image_losses(self) -> bool:
        """Whether there is a loss beside that of the pixels."""
        return self.perceptual_weight > 0 or self.adversarial_weight > 0


@auto_docstring
@dataclass
class MAEOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`):
        Mean squared error on the masked patches, and the weighted other parts where there are any.
    predictions (`torch.FloatTensor` of shape `(batch, predicted, channels * patch_height * patch_width)`):
        Predicted pixels of masked patches, in the order of `masked_indices`.
    masked_indices (`torch.LongTensor` of shape `(batch, predicted)`):
        Row-major indices of the masked patches; in training, of the share of them that `prediction_ratio` leaves.
    loss_pixel (`torch.FloatTensor` of shape `()`): The mean squared error, where it is not all of the loss.
    loss_perceptual (`torch.FloatTensor` of shape `()`):
        Distance of features of the painted image and of the original: 0 when alike, 2 when unrelated.
    loss_adversarial (`torch.FloatTensor` of shape `()`):
        Minus the discriminator's score of painted images. Above 1 it is sure that they are painted.
    loss_discriminator (`torch.FloatTensor` of shape `()`):
        Its hinge loss on both kinds: 2 when it cannot tell them apart, 0 when it is sure of all.
    """

    loss: Tensor | None = None
    predictions: Tensor | None = None
    masked_indices: Tensor | None = None
    loss_pixel: Tensor | None = None
    loss_perceptual: Tensor | None = None
    loss_adversarial: Tensor | None = None
    loss_discriminator: Tensor | None = None


def normalise_patches(patches: Tensor) -> Tensor:
    """Standardises each patch (..., values) by its mean and unbiased deviation, eps 1e-6 within the root.

    Layer normalisation, whose variance is the biased one, does it in one pass when its scale and eps make up for that.
    """
    size = patches.shape[-1]
    share = (size - 1) / size  # of the unbiased variance is the biased one
    return F.layer_norm(patches, (size,), patches.new_full((size,), math.sqrt(share)), eps=share * 1e-6)


def reconstruct_images(
    images: Tensor, predictions: Tensor, masked: Tensor, patch_hw: tuple[int, int], normalised: bool
) -> Tensor:
    """Paints patches into images; gradients reach the predictions.

    Args:
        images: (batch, channels, height, width).
        predictions: (batch, predicted, channels x patch height x patch width).
        masked: (batch, predicted) indices of the patches, row-major.
        normalised: Whether predictions are of normalised patches, and get the true patches' means and deviations.

    Returns:
        (batch, channels, height, width) float32, other patches as they were.
    """
    patches, predictions = patchify(images, patch_hw).float(), predictions.float()
    if normalised:
        var, mean = torch.var_mean(gather_tokens(patches, masked), dim=-1, keepdim=True)
        predictions = predictions * (var + 1e-6).sqrt() + mean
    painted = patches.scatter(1, masked[:, :, None].expand_as(predictions), predictions)
    return unpatchify(painted, patch_grid(images, patch_hw), patch_hw)


@auto_docstring
class MAEForPreTraining(FrozenEncoderMixin, TeacherMixin, VLMViTPreTrainedModel):
    """An encoder that sees a quarter of the patches and a light decoder that paints the others."""

    config_class = MAEConfig
    frozen_name = "perceptual_encoder"
    # The paper's only augmentation: random resized crop and flip.
    default_views = {"num_views": 1, "crop_scale": [0.2, 1.0], "flip_probability": 0.5}

    def __init__(self, config: MAEConfig):
        super().__init__(config)
        encoder = config.backbone_config
        self.backbone = VLMViTModel(encoder)
        self.decoder = MaskedPredictor(
            config.decoder_config,
            encoder.hidden_size,
            config.decoder_config.patch_dim,
            use_cross_attention=config.use_cross_attention,
        )
        if config.adversarial_weight:
            self.discriminator = PatchDiscriminator(
                encoder.num_channels, config.discriminator_size, config.discriminator_layers
            )
        self.post_init()
        if config.has_image_losses:  # which is what the progress of training matters to
            self.build_teacher(*(["backbone"] if config.perceptual_weight and not config.perceptual_encoder else []))
        if config.perceptual_weight:
            seeing, size = config.perceptual_encoder_config or encoder, self._perceptual_size(encoder.image_hw)
            self.perceptual_layers = choose_layers(config.perceptual_layers, count_layers(seeing, size))
            self.load_frozen()

    @can_return_tuple
    @auto_docstring
    def forward(self, pixel_values: Tensor, noise: Tensor | None = None, **kwargs: Any) -> MAEOutput:
        r"""
        pixel_values (`torch.FloatTensor` of shape `(batch, views, channels, height, width)` or without views):
            Images; each view counts as an image.
        noise (`torch.FloatTensor` of shape `(batch * views, patches)`, *optional*):
            The patches of the lowest values stay visible; uniform random when not given.
        """
        images, config = flatten_views(pixel_values), self.config
        predictions, masked = self._predict(images, noise)
        targets = gather_patches(images, masked, config.backbone_config.patch_hw).float()
        if config.norm_pix_loss:
            targets = normalise_patches(targets)
        loss = F.mse_loss(predictions.float(), targets)
        output = MAEOutput(loss=loss, predictions=predictions, masked_indices=masked)
        return self._add_image_losses(output, images) if config.has_image_losses else output

    def _predict(self, images: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Predictions (batch, predicted, patch_dim) and the indices (batch, predicted) of their patches."""
        grid_hw = patch_grid(images, self.config.backbone_config.patch_hw)
        if noise is None:
            noise = torch.rand(len(images), math.prod(grid_hw), device=images.device)
        visible, masked = random_masking(noise, self.config.mask_ratio)
        if self.training:
            masked = masked[:, : max(1, round(masked.shape[1] * self.config.prediction_ratio))]
        encoded = self.backbone(images, visible_indices=visible).last_hidden_state  # (batch, prefix + visible, dim)
        return self.decoder(encoded, visible, masked, grid_hw), masked

    def _add_image_losses(self, output: Any, images: Tensor) -> MAEOutput:
        """Adds to the pixel loss those of the painted images."""
        config, painted = self.config, self._reconstruct(images, output.predictions, output.masked_indices)
        output.loss_pixel = output.loss
        if config.perceptual_weight:
            with torch.no_grad():
                truth = self._features(images)
            output.loss_perceptual = perceptual_distance(self._features(painted), truth)
            output.loss = output.loss + config.perceptual_weight * output.loss_perceptual
        if config.adversarial_weight:
            game = adversarial_losses(self.discriminator, images, painted)
            output.loss_adversarial, output.loss_discriminator = game
            has_begun = self.progress >= config.adversarial_start  # decided on the device, which is not waited for
            of_game = config.adversarial_weight * game[0] + config.discriminator_weight * game[1]
            output.loss = output.loss + has_begun * of_game
        return output

    def _reconstruct(self, images: Tensor, predictions: Tensor, masked: Tensor) -> Tensor:
        return reconstruct_images(
            images, predictions, masked, self.config.backbone_config.patch_hw, self.config.norm_pix_loss
        )

    def _features(self, images: Tensor) -> list[Tensor]:
        """What the encoder of the perceptual loss makes of images: (batch, positions, dim) of each layer."""
        encoder = self._perceptual_encoder
        if self.config.perceptual_encoder:
            images = resize_map(
                renormalise(images.float(), self.config, self.frozen_name),
                self._perceptual_size((images.shape[2], images.shape[3])),
            ).to(encoder.dtype)
        return features_of_layers(encoder, images, self.perceptual_layers)

    @property
    def _perceptual_encoder(self) -> Any:
        return self.perceptual_encoder if self.config.perceptual_encoder else self.teacher["backbone"]

    def _perceptual_size(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Height and width at which the encoder of the perceptual loss sees images of `image_hw`."""
        of_encoder = self.config.perceptual_encoder_config
        return image_hw if of_encoder is None else nearest_hw(image_hw, patch_size_of(of_encoder))

    def load_frozen(self) -> None:
        """Loads the perceptual encoder from its source, where it has one."""
        if self.config.perceptual_weight:
            super().load_frozen()
            if self.device.type != "meta":
                maybe_install_capturing_hooks(self._perceptual_encoder)  # else the first step that is compiled would

    @torch.no_grad()
    def reconstruct(self, pixel_values: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Paints the masked patches of images into the images.

        Takes what `forward` takes. Returns the reconstruction (batch, channels, height, width) in the input's
        normalisation, visible patches as they were, and the mask (batch, 1, height, width), true where painted.
        Patches predicted in normalised form get the mean and deviation of the true patch. In training mode a
        `prediction_ratio` below 1 leaves some masked patches as they are.
        """
        images, patch_hw = flatten_views(pixel_values), self.config.backbone_config.patch_hw
        predictions, masked = self._predict(images, noise)
        is_masked = mask_from_indices(masked, math.prod(patch_grid(images, patch_hw)))
        return self._reconstruct(images, predictions, masked), pixel_mask(is_masked, images, patch_hw)

    @staticmethod
    def sample_mask(config: MAEConfig, grid_hw: tuple[int, int], num_images: int) -> Tensor:
        """Draws masks as `forward` does: (images, patches) bool, true where hidden."""
        num_patches = grid_hw[0] * grid_hw[1]
        return mask_from_indices(
            random_masking(torch.rand(num_images, num_patches), config.mask_ratio)[1], num_patches
        )


__all__ = ["MAEConfig", "MAEForPreTraining", "MAEOutput", "reconstruct_images"]
