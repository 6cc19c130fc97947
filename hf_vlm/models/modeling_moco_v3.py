"""MoCo v3: contrastive learning with a momentum encoder, for ViTs (arXiv 2104.02057), written from the paper."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import ModelOutput, auto_docstring

from .modeling_vlm_vit import VLMViTModel
from .ranks import gather_with_gradient, rank
from .ssl_layers import ProjectionHead, check_views, feature_std, flatten_views_view_major
from .ssl_model import SSLConfig, SSLPreTrainedModel, as_vit_config, returns_loss
from .ssl_teacher import TeacherMixin


@strict
class MoCoV3Config(SSLConfig):
    r"""Configuration of [`MoCoV3ForPreTraining`]; the defaults are the paper's for ViTs.

    Args:
        backbone_config (`VLMViTConfig` or `dict`, *optional*): The encoder; sin-cos positions when not given.
        freeze_patch_projection (`bool`, defaults to `True`): Whether the patch projection stays as it was initialised
            or loaded: the paper's remedy for sudden drops of accuracy in training. The encoder is then initialised as
            in the official code, by Xavier, and otherwise as that of every method.
        projection_hidden_size (`int`, defaults to 4096): Width of the hidden layers of projector and predictor.
        projection_size (`int`, defaults to 256): Width of what is compared.
        predictor_norm (`bool`, defaults to `True`): Whether batch norm ends the predictor, as in the official code for
            ViTs; there is none in its code for ResNets.
        temperature (`float`, defaults to 0.2): Temperature of the similarities.
        momentum (`float`, defaults to 0.99): Momentum of the teacher at the start; 1 at the end.
    """

    model_type = "vlm_moco_v3"
    batch_scaled_momentum: ClassVar[tuple[str, ...]] = ("momentum",)

    freeze_patch_projection: bool = True
    projection_hidden_size: int = 4096
    projection_size: int = 256
    predictor_norm: bool = True
    temperature: float | int = 0.2
    momentum: float | int = 0.99

    def __post_init__(self, **kwargs: Any) -> None:
        if self.temperature <= 0:
            raise ValueError(f"MoCoV3Config: temperature must be positive, but is {self.temperature}.")
        self.backbone_config = as_vit_config(self.backbone_config, position_embedding_type="sincos")
        super().__post_init__(**kwargs)


@auto_docstring
@dataclass
class MoCoV3Output(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`): InfoNCE of both views x 2 x temperature.
    accuracy (`torch.FloatTensor` of shape `()`): Fraction of views whose nearest key is that of their own image.
    feature_std (`torch.FloatTensor` of shape `()`):
        Standard deviation of the normalised encoder outputs x sqrt(dim): 1 when spread evenly, 0 when all are
        the same. The projections would not show a collapse: batch norm gives them a deviation of 1.
    """

    loss: Tensor | None = None
    accuracy: Tensor | None = None
    feature_std: Tensor | None = None


def contrastive_loss(queries: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE x 2 x temperature of queries (batch, dim) whose positives are the keys (batch, dim) of the same rows.

    The keys of all ranks are compared, in float32: bfloat16 resolves logits near 5 to 0.03 only. The factor keeps
    gradients of one size at any temperature. Returns the mean over the local queries, and the top-1 accuracy.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys = F.normalize(queries.float(), dim=-1), F.normalize(keys.float(), dim=-1)
        logits = queries @ gather_with_gradient(keys).T / temperature  # (batch, world * batch)
        own = torch.arange(queries.shape[0], device=queries.device) + rank() * queries.shape[0]
        loss = 2 * temperature * F.cross_entropy(logits, own)
        return loss, (logits.argmax(dim=1) == own).float().mean()


@auto_docstring
class MoCoV3ForPreTraining(TeacherMixin, SSLPreTrainedModel):
    """Queries of a student find the keys that its moving average makes of the other view of the same image."""

    config_class = MoCoV3Config
    # BYOL's unequal views (arXiv 2006.07733), with the paper's crops for ViTs.
    default_views = {
        "crop_scale": [0.08, 1.0],
        "flip_probability": 0.5,
        "jitter": [0.4, 0.4, 0.2, 0.1],
        "jitter_probability": 0.8,
        "grayscale_probability": 0.2,
        "views": [{"blur_probability": 1.0}, {"blur_probability": 0.1, "solarize_probability": 0.2}],
    }

    def __init__(self, config: MoCoV3Config):
        super().__init__(config)
        size, hidden_size = config.projection_size, config.projection_hidden_size
        self.backbone = VLMViTModel(config.backbone_config)
        self.projector = ProjectionHead(
            config.backbone_config.hidden_size, hidden_size, size, num_layers=3, last_norm=True
        )
        self.predictor = ProjectionHead(size, hidden_size, size, num_layers=2, last_norm=config.predictor_norm)
        self.build_teacher("backbone", "projector")
        self.post_init()

    def finish_init(self) -> None:
        if self.config.freeze_patch_projection:
            self.init_encoder()
        super().finish_init()

    def init_encoder(self) -> None:
        """The official initialisation of the encoder, by Xavier: the patch projection, if frozen, keeps its scale."""
        for module in self.backbone.modules():
            if isinstance(module, nn.Linear):
                init.xavier_uniform_(module.weight)
        if self.config.backbone_config.use_class_token:
            init.normal_(self.backbone.embeddings.class_token, std=1e-6)

    def freeze(self) -> None:
        super().freeze()
        if self.config.freeze_patch_projection:
            self.backbone.embeddings.patch_projection.requires_grad_(False)

    @returns_loss
    @auto_docstring
    def forward(self, pixel_values: Tensor) -> MoCoV3Output:
        r"""
        pixel_values (`torch.FloatTensor` of shape `(batch, 2, channels, height, width)`):
            Two views of each image.
        """
        views = flatten_views_view_major(check_views(pixel_values, num_views=2))  # (2 * batch, channels, h, w)
        pooled = self.backbone(views, class_token_only=True).pooler_output  # (2 * batch, hidden_size)
        with torch.no_grad(), self.teaching():
            pooled_by_teacher = self.teacher["backbone"](views, class_token_only=True).pooler_output
            # Batch norm sees one view at a time, as unequal views have unequal statistics.
            keys = [self.teacher["projector"](view) for view in pooled_by_teacher.chunk(2)]  # (batch, dim) each
        queries = [self.predictor(self.projector(view)) for view in pooled.chunk(2)]
        temperature = self.config.temperature
        first, first_accuracy = contrastive_loss(queries[0], keys[1], temperature)
        second, second_accuracy = contrastive_loss(queries[1], keys[0], temperature)
        return MoCoV3Output(
            loss=first + second,
            accuracy=(first_accuracy + second_accuracy) / 2,
            feature_std=feature_std(pooled),
        )


__all__ = ["MoCoV3Config", "MoCoV3ForPreTraining", "MoCoV3Output", "contrastive_loss"]
