"""Semantic segmentation on the plain ViT: a batch norm and a linear layer on the maps of its last layers."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.utils import auto_docstring
from transformers.utils.generic import can_return_tuple

from .configuration_vlm_vit import VLMViTConfig, own_encoder_config
from .model_on_encoder import HeadOnFreezableEncoder, wanted_outputs
from .modeling_vlm_vit import VLMViTBackbone
from .ssl_layers import SyncedBatchNorm1d

IGNORED = 255  # label of pixels without a class


@strict
class VLMViTSemanticSegmentationConfig(PreTrainedConfig):
    r"""Shape and training of a [`VLMViTForSemanticSegmentation`].

    The class names come from `id2label` (or their number from `num_labels`), as everywhere in transformers.

    Args:
        backbone_config (`VLMViTConfig` or `dict`, *optional*): The encoder; its `out_indices` are set from
            `num_feature_layers`.
        num_feature_layers (`int`, defaults to 1): How many of the encoder's last layers the head reads, side by side
            (DINOv2's evaluation has 1 and 4, arXiv 2304.07193).
        freeze_encoder (`bool`, defaults to `False`): Whether the head alone is trained. That measures what the
            features hold of each place: DINOv2's linear evaluation.

    Raises:
        ValueError: for more layers than the encoder has, or a number of classes out of 2 to 255.
    """

    model_type = "vlm_vit_semantic_segmentation"
    sub_configs = {"backbone_config": VLMViTConfig}
    keys_to_ignore_at_inference = ["hidden_states", "attentions"]

    backbone_config: dict[str, Any] | PreTrainedConfig | None = None
    num_feature_layers: int = 1
    freeze_encoder: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        self.backbone_config = own_encoder_config(self.backbone_config)
        self.check(kwargs.get("num_labels", 2) if self.id2label is None else len(self.id2label))
        last = self.encoder.num_hidden_layers
        self.encoder.reshape_hidden_states = self.encoder.apply_layernorm = True
        self.encoder.out_indices = list(range(last - self.num_feature_layers + 1, last + 1))
        super().__post_init__(**kwargs)

    @property
    def encoder(self) -> VLMViTConfig:
        """The encoder's configuration: `backbone_config`, which is no longer a dict here."""
        return cast(VLMViTConfig, self.backbone_config)

    def check(self, num_labels: int) -> None:
        """ValueError where a field, or the number of classes, is out of its range."""
        if not 1 <= self.num_feature_layers <= self.encoder.num_hidden_layers:
            raise ValueError(
                f"VLMViTSemanticSegmentationConfig: num_feature_layers is {self.num_feature_layers}, but must be 1 to "
                f"{self.encoder.num_hidden_layers}, the number of the encoder's layers."
            )
        check_num_labels(self, num_labels)


def check_num_labels(config: PreTrainedConfig, num_labels: int) -> None:
    """ValueError for a number of classes that masks cannot hold."""
    if not 2 <= num_labels <= IGNORED:
        raise ValueError(
            f"{type(config).__name__}: num_labels is {num_labels}, but must be 2 to {IGNORED}: one of them may be the "
            f"background, and {IGNORED} is the label of pixels without a class."
        )


def check_labels(labels: Tensor, batch_size: int) -> None:
    """ValueError for labels of pixels that are not (batch, height, width) integers."""
    if labels.ndim != 3 or labels.shape[0] != batch_size or labels.is_floating_point():
        raise ValueError(
            f"Labels must be (batch, height, width) integers for {batch_size} images, but are of the shape "
            f"{tuple(labels.shape)} and the type {labels.dtype}."
        )


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of the pixels that have a class; 0 where none has.

    Args:
        logits: (batch, classes, rows, columns), resized bilinearly to the labels.
        labels: (batch, height, width) integers, 255 for pixels without a class.

    Raises:
        ValueError: if the labels have another shape or type. Classes out of their range are torch's to refuse: to look
            at the values here would make the device wait.
    """
    check_labels(labels, logits.shape[0])
    labels = labels.long()
    logits = F.interpolate(logits.float(), (labels.shape[1], labels.shape[2]), mode="bilinear", align_corners=False)
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


@auto_docstring
class VLMViTForSemanticSegmentation(HeadOnFreezableEncoder):
    """The encoder with a class for each patch, from which those of the pixels are interpolated.

    The head is that of DINOv2's and DINOv3's linear evaluation: the encoder's final norm on each of its last layers,
    batch norm over the patches of all ranks, and one linear layer. Batch norm brings features of any scale to one, so
    that one learning rate does for all encoders.
    """

    config_class = VLMViTSemanticSegmentationConfig
    _can_record_outputs: dict[str, Any] = {}  # the backbone records its own
    # transformers picks a loss by the class name, which is NaN for a batch without labelled pixels.
    loss_function = staticmethod(segmentation_loss)

    def __init__(self, config: VLMViTSemanticSegmentationConfig):
        super().__init__(config)
        config.check(config.num_labels)  # again: from_pretrained(..., num_labels=1) sets fields that were checked
        width = config.num_feature_layers * config.encoder.hidden_size
        self.backbone = VLMViTBackbone(config.encoder)
        self.feature_norm = SyncedBatchNorm1d(width)
        self.classifier = nn.Linear(width, config.num_labels)
        self.post_init()
        self.train(self.training)

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        *,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> SemanticSegmenterOutput:
        r"""
        labels (`torch.Tensor` of shape `(batch, height, width)`, *optional*):
            Class of each pixel, integers from 0, and 255 for pixels without one; of any size, to which the logits are
            resized. ValueError when the shape or the type does not fit.
        """
        wanted = wanted_outputs(
            self.config, output_hidden_states=output_hidden_states, output_attentions=output_attentions
        )
        encoded = self.backbone(pixel_values, **wanted)
        features = torch.cat(encoded.feature_maps, dim=1)  # (batch, layers * dim, rows, columns)
        batch, _, rows, columns = features.shape
        features = features.flatten(2).transpose(1, 2).flatten(0, 1)  # (batch * patches, layers * dim)
        logits = self.classifier(self.feature_norm(features))  # (batch * patches, classes)
        logits = logits.reshape(batch, rows, columns, -1).permute(0, 3, 1, 2)  # (batch, classes, rows, columns)
        return SemanticSegmenterOutput(
            loss=None if labels is None else self.loss_function(logits, labels),
            logits=logits,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )


__all__ = [
    "IGNORED",
    "VLMViTForSemanticSegmentation",
    "VLMViTSemanticSegmentationConfig",
    "check_labels",
    "check_num_labels",
    "segmentation_loss",
]
