"""SimCLR: contrastive learning of two views of each image (arXiv 2002.05709)."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers.utils import ModelOutput, auto_docstring
from transformers.utils.generic import can_return_tuple

from .modeling_vlm_vit import VLMViTModel, VLMViTPreTrainedModel
from .ssl_layers import ProjectionHead, SSLConfig, check_views, first_views_first, gather_with_gradient, rank


@strict
class SimCLRConfig(SSLConfig):
    r"""Configuration of [`SimCLRForPreTraining`].

    Args:
        backbone_config (`VLMViTConfig` or `dict`, *optional*): The encoder.
        projection_hidden_size (`int`, defaults to 2048): Width of the projection head's hidden layers.
        projection_size (`int`, defaults to 128): Width of the projections that are compared.
        num_projection_layers (`int`, defaults to 3): Layers of the projection head (3 as in SimCLR v2).
        temperature (`float`, defaults to 0.2): Temperature of the similarities. Between lightly-train's 0.1 and
            lightly's 0.5; solo-learn uses 0.2 on small images.
    """

    model_type = "vlm_simclr"

    projection_hidden_size: int = 2048
    projection_size: int = 128
    num_projection_layers: int = 3
    temperature: float | int = 0.2
    initializer_range: float = 0.02

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
    accuracy (`torch.FloatTensor` of shape `()`): Share of views whose nearest other view is their own partner.
    """

    loss: Tensor | None = None
    projections: Tensor | None = None
    accuracy: Tensor | None = None


def nt_xent(projections: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Normalised temperature-scaled cross entropy over the 2N views of all ranks.

    `projections` (2 x batch, dim) are L2-normalised, first views first. A view's positive is its partner, its
    negatives are all other views of all ranks; itself is left out of the denominator. Computed in float32: bfloat16
    is 0.06 coarse where logits are near 10. Returns the mean over the local views, and the top-1 accuracy.
    """
    projections = projections.float()
    num_local = len(projections)
    rows = torch.arange(num_local, device=projections.device)
    offset = rank() * num_local
    logits = projections @ gather_with_gradient(projections).T / temperature  # (2 * batch, world * 2 * batch)
    logits = logits.index_put((rows, rows + offset), logits.new_tensor(float("-inf")))
    partners = (rows + num_local // 2) % num_local + offset
    accuracy = (logits.detach().argmax(dim=1) == partners).float().mean()
    return F.cross_entropy(logits, partners), accuracy


@auto_docstring
class SimCLRForPreTraining(VLMViTPreTrainedModel):
    """An encoder with a projection head; partners are pulled together, all other images of the batch pushed apart."""

    config_class = SimCLRConfig
    # Views as in SimCLR, appendix A; strength 0.5 of its colour distortion as its CIFAR setting.
    default_views = {
        "num_views": 2,
        "crop_scale": [0.2, 1.0],
        "flip": 0.5,
        "jitter": [0.4, 0.4, 0.4, 0.1],
        "jitter_probability": 0.8,
        "grey": 0.2,
        "blur": 0.5,
    }

    def __init__(self, config: SimCLRConfig):
        super().__init__(config)
        self.backbone = VLMViTModel(config.backbone_config)
        self.projection_head = ProjectionHead(
            config.backbone_config.hidden_size,
            config.projection_hidden_size,
            config.projection_size,
            num_layers=config.num_projection_layers,
        )
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> SimCLROutput:
        r"""
        pixel_values (`torch.FloatTensor` of shape `(batch, 2, channels, height, width)`):
            Two views of each image.
        """
        views = first_views_first(check_views(pixel_values, num_views=2))  # (2 * batch, channels, height, width)
        pooled = self.backbone(views, class_token_only=True).pooler_output  # (2 * batch, hidden_size)
        projections = F.normalize(self.projection_head(pooled).float(), dim=-1)  # (2 * batch, projection_size)
        loss, accuracy = nt_xent(projections, self.config.temperature)
        return SimCLROutput(loss=loss, projections=projections, accuracy=accuracy)


__all__ = ["SimCLRConfig", "SimCLRForPreTraining", "SimCLROutput", "nt_xent"]
