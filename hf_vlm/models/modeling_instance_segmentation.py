"""Instance segmentation on the plain ViT: the detector, with a mask for each of its queries."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import auto_docstring
from transformers.utils.output_capturing import capture_outputs

from .configuration_instance_segmentation import VLMViTInstanceSegmentationConfig
from .loss_instance_segmentation import InstanceTargets, MaskLoss, PointLogits, sample_points
from .mask_layers import MaskHead
from .model_on_encoder import wanted_outputs
from .modeling_detection import VLMViTForObjectDetection, VLMViTObjectDetectionOutput


@auto_docstring
@dataclass
class VLMViTInstanceSegmentationOutput(VLMViTObjectDetectionOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `labels` is given):
        Weighted sum of the losses of the proposals, of each decoder layer and of the dense head.
    loss_dict (`dict[str, torch.Tensor]`, *optional*, returned when `labels` is given):
        Detached parts of the loss: `loss_class`, `loss_bbox`, `loss_giou`, `loss_mask` (cross entropy), `loss_dice` of
        the last layer, `loss_proposals`, `loss_aux` of the earlier layers, `loss_dense`.
    logits (`torch.FloatTensor` of shape `(batch, queries, num_labels)`):
        Class scores before the sigmoid. There is no background class.
    pred_boxes (`torch.FloatTensor` of shape `(batch, queries, 4)`):
        Boxes (centre x, centre y, width, height) as fractions of the image, float32.
    pred_masks (`torch.FloatTensor` of shape `(batch, queries, rows, columns)`, *optional*, returned when `labels` is \
    not given):
        Masks before the sigmoid, at a fourth of the image's size (`mask_stride`).
    last_hidden_state (`torch.FloatTensor` of shape `(batch, queries, hidden_size)`):
        The queries after the decoder's final norm.
    reference_boxes (`torch.FloatTensor` of shape `(batch, queries, 4)`):
        The proposals that the queries started from, best first.
    hidden_states (`tuple[torch.FloatTensor]`, *optional*, returned when `output_hidden_states=True`):
        What enters the encoder's first layer, and the output of each layer: (batch, prefix + patches, dim).
    attentions (`tuple[torch.FloatTensor]`, *optional*, returned when `output_attentions=True`):
        Attention weights (batch, heads, tokens, tokens) of each layer of the encoder.
    """

    pred_masks: Tensor | None = None


@auto_docstring
class VLMViTForInstanceSegmentation(VLMViTForObjectDetection):
    """The detector with a mask head in the manner of RF-DETR's (arXiv 2511.09554): boxes are found as by the detector.

    While labels are given, masks are formed only of the queries that are matched to an object, and only at points.
    """

    config_class = VLMViTInstanceSegmentationConfig
    head_shape: ClassVar[tuple[str, ...]] = (*VLMViTForObjectDetection.head_shape, "mask_feature_size", "mask_stride")

    def __init__(self, config: VLMViTInstanceSegmentationConfig):
        super().__init__(config)
        self.mask_head = MaskHead(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MaskHead):
            init.zeros_(module.bias)

    def auto_map(self) -> dict[str, str]:
        names = super().auto_map()
        return names | {"AutoModelForImageSegmentation": names["AutoModel"]}  # by which pipelines load it

    @capture_outputs
    @auto_docstring
    def forward(
        self,
        pixel_values: Tensor,
        labels: list[dict[str, Tensor]] | None = None,
        points: Tensor | None = None,
        *,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> VLMViTInstanceSegmentationOutput:
        r"""
        labels (`list[dict[str, torch.Tensor]]`, *optional*):
            One dict per image: `class_labels` (n,), `boxes` (n, 4) as (centre x, centre y, width, height) in fractions
            of the image, and `masks` (n, height, width) bool, of any size. Other keys are ignored. ValueError when a
            class or a box is out of its range, or masks are missing.
        points (`torch.Tensor` of shape `(batch, points, 2)`, *optional*):
            Points at which the masks may be compared with their labels, x and y as fractions of the image; random ones
            when not given.
        """
        wanted = wanted_outputs(
            self.config, output_hidden_states=output_hidden_states, output_attentions=output_attentions
        )
        found = self.detect(pixel_values, all_stages=labels is not None, **wanted)
        feature_map = found.feature_maps[-1]
        if labels is None:
            masks = self.mask_head(feature_map, found.states[-1], found.boxes[-1], pixel_values)
            return VLMViTInstanceSegmentationOutput(pred_masks=masks, **found.outputs())
        batch_size, device = pixel_values.shape[0], found.anchors.device
        targets = InstanceTargets.from_labels(
            labels, batch_size=batch_size, num_labels=self.config.num_labels, device=device
        )
        if points is None:
            mask_hw = self.mask_head.mask_hw((pixel_values.shape[2], pixel_values.shape[3]))
            points = sample_points(targets, mask_hw, self.config.mask_point_ratio)
        pixels, queries = self.mask_head.at_points(feature_map, found.states, points.float(), pixel_values)
        boxes = torch.stack(found.boxes).detach()  # which masks do not move
        logits = PointLogits(pixels, queries, self.mask_head.bias.float(), boxes, points.float())
        masks = MaskLoss(logits, targets.at(points), self.config)
        loss, loss_dict = self.loss_of(found, targets, masks)
        return VLMViTInstanceSegmentationOutput(loss=loss, loss_dict=loss_dict, **found.outputs())


__all__ = [
    "VLMViTForInstanceSegmentation",
    "VLMViTInstanceSegmentationConfig",
    "VLMViTInstanceSegmentationOutput",
]
