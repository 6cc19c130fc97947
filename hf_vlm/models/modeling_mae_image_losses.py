"""MAE with losses of the reconstructed image: perceptual, as in arXiv 2212.14504, and adversarial."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import AutoConfig
from transformers.utils import auto_docstring
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .configuration_vlm_vit import VLMViTConfig
from .modeling_mae import MAEConfig, MAEForPreTraining, MAEOutput
from .ssl_adversarial import PatchDiscriminator, adversarial_losses
from .ssl_frozen import FrozenEncoderMixin, nearest_hw, patch_size_of, read_frozen, renormalise, resize_map
from .ssl_layers import flatten_views
from .ssl_model import as_vit_config, returns_loss
from .ssl_perceptual import choose_layers, count_layers, features_of_layers, perceptual_distance
from .ssl_teacher import TeacherMixin


@strict
class MAEImageLossesConfig(MAEConfig):
    r"""Configuration of [`MAEImageLossesForPreTraining`]: that of [`MAEConfig`], and the weights of the losses.

    Args:
        perceptual_weight (`float`, defaults to 0.0):
            Weight, beside the pixel loss, of the distance of the reconstructed image to the original in the features
            of an encoder that does not learn from it (see `perceptual_distance`), as in Perceptual MAE
            (arXiv 2212.14504). Distances are small: a frozen encoder that knows such images has shown a gain at 30,
            and none at 1.
        perceptual_encoder (`str`, defaults to `""`):
            That encoder: a folder or Hub id of a model of transformers that gives hidden states, or of an encoder of
            this package. When not given, the moving average of the model's own encoder, which needs no other weights.
        perceptual_encoder_revision, perceptual_encoder_config, perceptual_encoder_mean, perceptual_encoder_std:
            Its commit, configuration and normalisation; found when not given.
        perceptual_layers (`list`, *optional*): Its layers that are compared; the ends of four quarters when not given.
        momentum (`float`, defaults to 0.996): Momentum of the moving average at the start; 1 at the end.
        image_mean, image_std (`list`, *optional*):
            Normalisation of the images that `forward` is given; ImageNet's for three channels when not given, else
            0.5.
        adversarial_weight (`float`, defaults to 0.0):
            Weight of the loss by which the decoder learns to make the discriminator take its images for real (see
            `adversarial_losses`).
        adversarial_start (`float`, defaults to 0.25): Fraction of training before decoder and discriminator learn from
            the adversarial losses. Until then the discriminator's learning rate is 0 (see `late_parameters`, which the
            package's trainer reads).
        discriminator_weight (`float`, defaults to 1.0): Weight of the discriminator's own loss. Adam takes no notice
            of it; the clipping of gradients does.
        discriminator_size (`int`, defaults to 64): Channels of its first layer.
        discriminator_layers (`int`, defaults to 3): Layers that halve the resolution.

    Raises:
        ValueError: if a weight or size is out of its range, or the perceptual encoder cannot be used.
    """

    model_type = "vlm_mae_image_losses"
    sub_configs = {
        "backbone_config": VLMViTConfig,
        "decoder_config": VLMViTConfig,
        "perceptual_encoder_config": AutoConfig,
    }
    batch_scaled_momentum: ClassVar[tuple[str, ...]] = ("momentum",)
    needs_image_statistics: ClassVar[bool] = True

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

    def __post_init__(self, **kwargs: Any) -> None:
        self.backbone_config = as_vit_config(self.backbone_config, position_embedding_type="sincos")
        if self.perceptual_weight:
            read_frozen(self, "perceptual_encoder")
        super().__post_init__(**kwargs)
        self.check_range(0, float("inf"), "perceptual_weight", "adversarial_weight", "discriminator_weight")
        self.check_range(1, float("inf"), "discriminator_size", "discriminator_layers")
        if not 0 <= self.adversarial_start < 1:
            raise ValueError(
                "MAEImageLossesConfig: adversarial_start is a fraction of training, from 0 to below 1, but is "
                f"{self.adversarial_start}."
            )
        if self.prediction_ratio < 1:
            raise ValueError(
                "MAEImageLossesConfig: perceptual and adversarial losses are of whole reconstructed images: they need "
                f"prediction_ratio 1, but it is {self.prediction_ratio}."
            )

    def external_weights(self) -> list[str]:
        return [self.perceptual_encoder] if self.perceptual_weight and self.perceptual_encoder else []


@auto_docstring
@dataclass
class MAEImageLossesOutput(MAEOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`): The pixel loss plus the weighted others.
    predictions (`torch.FloatTensor` of shape `(batch, predicted, channels * patch_height * patch_width)`):
        Predicted pixels of masked patches, in the order of `masked_indices`.
    masked_indices (`torch.LongTensor` of shape `(batch, predicted)`): Row-major indices of the masked patches.
    loss_pixel (`torch.FloatTensor` of shape `()`): Mean squared error on the masked patches.
    loss_perceptual (`torch.FloatTensor` of shape `()`):
        Distance of features of the reconstructed image and of the original: 0 for the same, 2 for unrelated ones.
    loss_adversarial (`torch.FloatTensor` of shape `()`):
        Minus the discriminator's score of reconstructed images. Above 1 it is sure that they are not real.
    loss_discriminator (`torch.FloatTensor` of shape `()`):
        Its hinge loss on real and reconstructed images: 2 when it cannot distinguish them, 0 when it is sure of all.
    """

    loss_pixel: Tensor | None = None
    loss_perceptual: Tensor | None = None
    loss_adversarial: Tensor | None = None
    loss_discriminator: Tensor | None = None


@auto_docstring
class MAEImageLossesForPreTraining(FrozenEncoderMixin, TeacherMixin, MAEForPreTraining):
    """MAE whose decoder also learns from features of the images that it reconstructs, and from a discriminator."""

    config_class = MAEImageLossesConfig
    frozen_name = "perceptual_encoder"
    other_model_types = ("vlm_mae",)  # as version 0.1 saved them

    def __init__(self, config: MAEImageLossesConfig):
        if not (config.perceptual_weight or config.adversarial_weight):
            raise ValueError(
                "MAEImageLossesConfig: set perceptual_weight or adversarial_weight; without both it is the method mae."
            )
        super().__init__(config)
        if config.perceptual_weight:
            encoder = config.backbone_config
            compared, size = config.perceptual_encoder_config or encoder, self._perceptual_size(encoder.image_hw)
            self.perceptual_layers = choose_layers(config.perceptual_layers, count_layers(compared, size))
            self.load_frozen()

    def build(self, config: MAEImageLossesConfig) -> None:
        super().build(config)
        if config.adversarial_weight:
            self.discriminator = PatchDiscriminator(
                config.backbone_config.num_channels, config.discriminator_size, config.discriminator_layers
            )
        self.build_teacher(*(["backbone"] if config.perceptual_weight and not config.perceptual_encoder else []))

    @returns_loss
    @auto_docstring
    def forward(self, pixel_values: Tensor, noise: Tensor | None = None) -> MAEImageLossesOutput:
        r"""
        pixel_values (`torch.FloatTensor` of shape `(batch, views, channels, height, width)` or without views):
            Images; each view counts as an image.
        noise (`torch.FloatTensor` of shape `(batch * views, patches)`, *optional*):
            The patches of the lowest values stay visible; uniform random when not given.
        """
        config, images = self.config, flatten_views(pixel_values)
        plain = super().forward(images, noise, return_dict=True)
        output: Any = MAEImageLossesOutput(**plain, loss_pixel=plain.loss)
        reconstructed = self._reconstruct(images, plain.predictions, plain.masked_indices)
        if config.perceptual_weight:
            with torch.no_grad():
                original_features = self._features(images)
            output.loss_perceptual = perceptual_distance(self._features(reconstructed), original_features)
            output.loss = output.loss + config.perceptual_weight * output.loss_perceptual
        if config.adversarial_weight:
            of_decoder, of_discriminator = adversarial_losses(self.discriminator, images, reconstructed)
            output.loss_adversarial, output.loss_discriminator = of_decoder, of_discriminator
            has_started = self.progress >= config.adversarial_start  # decided on the device, which is not waited for
            output.loss = output.loss + has_started * config.adversarial_weight * of_decoder
            output.loss = output.loss + config.discriminator_weight * of_discriminator
        return output

    def _features(self, images: Tensor) -> list[Tensor]:
        """Features of images in the encoder of the perceptual loss: (batch, positions, dim) of each layer."""
        encoder = self._perceptual_encoder
        if self.config.perceptual_encoder:
            images = resize_map(
                renormalise(images.float(), self.config, self.frozen_name),
                self._perceptual_size((images.shape[2], images.shape[3])),
            ).to(encoder.dtype)
        with self.teaching():
            return features_of_layers(encoder, images, self.perceptual_layers)

    @property
    def _perceptual_encoder(self) -> Any:
        return self.perceptual_encoder if self.config.perceptual_encoder else self.teacher["backbone"]

    def _perceptual_size(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Height and width at which the encoder of the perceptual loss is given images of `image_hw`."""
        of_encoder = self.config.perceptual_encoder_config
        return image_hw if of_encoder is None else nearest_hw(image_hw, patch_size_of(of_encoder))

    def load_frozen(self) -> None:
        """Loads the perceptual encoder from its source, where it has one."""
        if self.config.perceptual_weight:
            super().load_frozen()
            if self.device.type != "meta":
                maybe_install_capturing_hooks(self._perceptual_encoder)  # else the first step that is compiled would

    def no_weight_decay(self) -> set[str]:
        """Also the discriminator's: its weights are scaled for a deviation of 1."""
        return super().no_weight_decay() | self._discriminator_names()

    def late_parameters(self) -> dict[str, float]:
        """The discriminator's, by `adversarial_start`."""
        return dict.fromkeys(self._discriminator_names(), self.config.adversarial_start)

    def _discriminator_names(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.startswith("discriminator.")}


__all__ = ["MAEImageLossesConfig", "MAEImageLossesForPreTraining", "MAEImageLossesOutput"]
