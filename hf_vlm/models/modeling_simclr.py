"""SimCLR: contrastive learning of two views of each image (arXiv 2002.05709)."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers.utils import ModelOutput, auto_docstring

from .modeling_vlm_vit import VLMViTModel
from .ranks import gather_with_gradient, rank
from .ssl_contrastive import fast_contrastive_cross_entropy
from .ssl_layers import ProjectionHead, check_views, feature_std, flatten_views_view_major
from .ssl_model import SSLConfig, SSLPreTrainedModel, returns_loss


@strict
class SimCLRConfig(SSLConfig):
    r"""Configuration of [`SimCLRForPreTraining`].

    Args:
        backbone_config (`VLMViTConfig` or `dict`, *optional*): The encoder.
        projection_hidden_size (`int`, defaults to 2048): Width of the projection head's hidden layers.
        projection_size (`int`, defaults to 128): Width of the projections that are compared.
        num_projection_layers (`int`, defaults to 3): Layers of the projection head (3 as in SimCLR v2); batch norm
            follows each, the last one too. In the official code that has a gain, which MoCo v3 and this leave out.
        temperature (`float`, defaults to 0.2): Temperature of the similarities. Between lightly-train's 0.1 and
            lightly's 0.5; solo-learn uses 0.2 on small images.
    """

    model_type = "vlm_simclr"

    projection_hidden_size: int = 2048
    projection_size: int = 128
    num_projection_layers: int = 3
    temperature: float | int = 0.2

    def __post_init__(self, **kwargs: Any) -> None:
        if self.temperature <= 0:
            raise ValueError(f"SimCLRConfig: temperature must be positive, but is {self.temperature}.")
        super().__post_init__(**kwargs)


@auto_docstring
@dataclass
class SimCLROutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`): NT-Xent.
    projections (`torch.FloatTensor` of shape `(2 * batch, projection_size)`): Normalised; first views first.
    accuracy (`torch.FloatTensor` of shape `()`): Fraction of views whose nearest other view is their own partner.
    feature_std (`torch.FloatTensor` of shape `()`): Spread of the projections: 1 when even, 0 when collapsed.
    """

    loss: Tensor | None = None
    projections: Tensor | None = None
    accuracy: Tensor | None = None
    feature_std: Tensor | None = None


def nt_xent(projections: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """NT-Xent, the normalised temperature-scaled cross entropy, over the 2N views of all ranks.

    -log(exp(z_i . z_partner / t) / sum over k != i of exp(z_i . z_k / t)), the mean over this rank's views i: a view's
    positive is its partner, its negatives are all other views of all ranks. Computed in float32: bfloat16 resolves
    logits near 10 to 0.06 only.

    Args:
        projections: (2 x batch, dim), L2-normalised, first views first.
        temperature: t.

    Returns:
        The loss (), and the fraction () of views whose nearest other view is their partner.
    """
    projections = projections.float()
    num_local = projections.shape[0]
    rows = torch.arange(num_local, device=projections.device)
    offset = rank() * num_local
    partners = (rows + num_local // 2) % num_local + offset
    keys = gather_with_gradient(projections)  # (world x 2 x batch, dim)
    with torch.autocast(projections.device.type, enabled=False):
        return fast_contrastive_cross_entropy(projections, keys, rows + offset, partners, temperature)


@auto_docstring
class SimCLRForPreTraining(SSLPreTrainedModel):
    """An encoder with a projection head; partners are pulled together, all other images of the batch pushed apart."""

    config_class = SimCLRConfig
    # Views as in SimCLR, appendix A, at its strength 0.5 for CIFAR; crops from 0.2 of the area on, not 0.08.
    default_views = {
        "num_views": 2,
        "crop_scale": [0.2, 1.0],
        "flip_probability": 0.5,
        "jitter": [0.4, 0.4, 0.4, 0.1],
        "jitter_probability": 0.8,
        "grayscale_probability": 0.2,
        "blur_probability": 0.5,
    }

    def __init__(self, config: SimCLRConfig):
        super().__init__(config)
        self.backbone = VLMViTModel(config.backbone_config)
        self.projection_head = ProjectionHead(
            config.backbone_config.hidden_size,
            config.projection_hidden_size,
            config.projection_size,
            num_layers=config.num_projection_layers,
            last_norm=True,
        )
        self.post_init()

    @returns_loss
    @auto_docstring
    def forward(self, pixel_values: Tensor) -> SimCLROutput:
        r"""
        pixel_values (`torch.FloatTensor` of shape `(batch, 2, channels, height, width)`):
            Two views of each image.
        """
        views = flatten_views_view_major(check_views(pixel_values, num_views=2))  # (2 * batch, channels, h, w)
        pooled = self.backbone(views, class_token_only=True).pooler_output  # (2 * batch, hidden_size)
        projections = F.normalize(self.projection_head(pooled).float(), dim=-1)  # (2 * batch, projection_size)
        loss, accuracy = nt_xent(projections, self.config.temperature)
        return SimCLROutput(
            loss=loss, projections=projections, accuracy=accuracy, feature_std=feature_std(projections)
        )


__all__ = ["SimCLRConfig", "SimCLRForPreTraining", "SimCLROutput", "nt_xent"]
