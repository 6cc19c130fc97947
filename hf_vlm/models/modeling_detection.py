"""Object detection on the plain ViT: a two-stage set-prediction head in pure torch."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput
from transformers.utils import auto_docstring
from transformers.utils.output_capturing import capture_outputs

from .configuration_detection import VLMViTDetectionConfig
from .detection_layers import (
    BoxHead,
    BoxLayer,
    ClassHead,
    DenseHead,
    DetectionDecoderLayer,
    DetectionNeck,
    LevelSizes,
    SamplingOffsets,
    ZeroInitLinear,
    box_position_embedding,
    grid_anchors,
    refine_boxes,
)
from .loss_detection import DetectionTargets, MatchedLoss, detection_loss
from .model_on_encoder import ModelOnEncoder, wanted_outputs
from .modeling_vlm_vit import SMALL_STD, VLMViTBackbone
from .vit_layers import gather_tokens


@auto_docstring
@dataclass
class VLMViTObjectDetectionOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `labels` is given):
        Weighted sum of the losses of the proposals, of each decoder layer and of the dense head.
    loss_dict (`dict[str, torch.Tensor]`, *optional*, returned when `labels` is given):
        Detached parts of the loss: `loss_class`, `loss_bbox`, `loss_giou` of the last layer, `loss_proposals`,
        `loss_aux` of the earlier layers, `loss_dense`.
    logits (`torch.FloatTensor` of shape `(batch, queries, num_labels)`):
        Class scores before the sigmoid. There is no background class.
    pred_boxes (`torch.FloatTensor` of shape `(batch, queries, 4)`):
        Boxes (centre x, centre y, width, height) as fractions of the image, float32.
    last_hidden_state (`torch.FloatTensor` of shape `(batch, queries, hidden_size)`):
        The queries after the decoder's final norm.
    reference_boxes (`torch.FloatTensor` of shape `(batch, queries, 4)`):
        The proposals that the queries started from, best first.
    hidden_states (`tuple[torch.FloatTensor]`, *optional*, returned when `output_hidden_states=True`):
        What enters the encoder's first layer, and the output of each layer: (batch, prefix + patches, dim).
    attentions (`tuple[torch.FloatTensor]`, *optional*, returned when `output_attentions=True`):
        Attention weights (batch, heads, tokens, tokens) of each layer of the encoder.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    last_hidden_state: Tensor | None = None
    reference_boxes: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class Detected(NamedTuple):
    """What a detector finds: by the proposals and then by each decoder layer, or by the last layer alone."""

    encoded: Any  # the output of the encoder
    feature_maps: tuple[Tensor, ...]  # (batch, hidden_size, rows, columns) of each level of the neck
    anchors: Tensor  # (locations, 4)
    reference_boxes: Tensor  # (batch, queries, 4)
    states: list[Tensor]  # (batch, queries, hidden_size) of each stage
    logits: list[Tensor]  # (batch, queries, labels)
    boxes: list[Tensor]  # (batch, queries, 4)

    def outputs(self) -> dict[str, Any]:
        """Fields of a [`VLMViTObjectDetectionOutput`]."""
        return {
            "logits": self.logits[-1],
            "pred_boxes": self.boxes[-1],
            "last_hidden_state": self.states[-1],
            "reference_boxes": self.reference_boxes,
            "hidden_states": self.encoded.hidden_states,
            "attentions": self.encoded.attentions,
        }


class ProposalHead(nn.Module):
    """First stage: a class and a box for each location; the best locations become queries."""

    def __init__(self, config: VLMViTDetectionConfig):
        super().__init__()
        width = config.hidden_size
        self.projection = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.class_head = ClassHead(width, config.num_labels)
        self.box_head = BoxHead(width)

    def forward(self, source: Tensor, anchors: Tensor, num_queries: int) -> tuple[Tensor, Tensor, Tensor]:
        """States (batch, queries, dim), logits (.., labels) and boxes (.., 4) of the best locations, best first."""
        states = self.norm(self.projection(source))  # (batch, locations, dim)
        logits = self.class_head(states)  # (batch, locations, labels)
        scores = logits.amax(-1)
        best = scores.topk(min(num_queries, scores.shape[1]), dim=1).indices  # (batch, queries)
        states = gather_tokens(states, best)
        return states, gather_tokens(logits, best), refine_boxes(anchors[best], self.box_head(states))


class DetectionDecoder(nn.Module):
    """Second stage: queries that start from proposals look at the neck maps and at each other.

    The queries' contents are the features of their proposals, through which gradients flow, not LW-DETR's learned
    contents: with few images and steps those learn far slower, and they fix the number of queries.
    """

    def __init__(self, config: VLMViTDetectionConfig):
        super().__init__()
        width = config.hidden_size
        self.position = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(DetectionDecoderLayer(config) for _ in range(config.num_decoder_layers))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(
        self, queries: Tensor, reference_boxes: Tensor, source: Tensor, level_sizes: LevelSizes
    ) -> list[Tensor]:
        """Normed queries (batch, queries, dim) after each layer."""
        embedding = box_position_embedding(reference_boxes, queries.shape[-1] // 2)  # (batch, queries, 2 * dim)
        positions = self.position(embedding.to(queries.dtype))
        outputs = []
        for layer in self.layers:
            queries = layer(queries, positions, reference_boxes, source, level_sizes)
            outputs.append(self.norm(queries))
        return outputs


@auto_docstring
class VLMViTForObjectDetection(ModelOnEncoder):
    """Set-prediction detector in the manner of LW-DETR and RF-DETR (arXiv 2406.03459, 2511.09554) on the plain ViT.

    Encoder layers are tapped and merged by the neck, each location proposes a box, and a deformable decoder refines
    the best. There is no suppression of overlapping boxes. While labels are given, a dense one-to-many head beside it
    teaches neck and encoder. The number of queries is `config.num_queries`, free to change at run time.
    """

    config_class = VLMViTDetectionConfig
    head_shape: ClassVar[tuple[str, ...]] = (
        "num_feature_taps",
        "hidden_size",
        "neck_num_blocks",
        "num_neck_levels",
        "num_decoder_layers",
        "intermediate_size",
        "num_self_attention_heads",
        "num_cross_attention_heads",
        "num_points",
        "hidden_act",
        "anchor_size",
    )
    _no_split_modules = ["VLMViTLayer", "DetectionDecoderLayer"]
    _can_record_outputs: dict[str, Any] = {}  # the backbone records its own
    # transformers picks a loss by the class name, which would be DETR's for this one.
    loss_function = staticmethod(detection_loss)

    def __init__(self, config: VLMViTDetectionConfig):
        super().__init__(config)
        self.backbone = VLMViTBackbone(config.encoder)
        self.neck = DetectionNeck(config)
        self.proposal_head = ProposalHead(config)
        self.decoder = DetectionDecoder(config)
        self.class_head = ClassHead(config.hidden_size, config.num_labels)
        self.box_head = BoxHead(config.hidden_size)
        self.dense_head = DenseHead(config) if config.dense_loss_weight else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Only on modules with parameters of their own: transformers passes over all others of a class outside itself.
        super()._init_weights(module)
        if isinstance(module, ClassHead):
            init.trunc_normal_(module.weight, std=SMALL_STD)  # so small that all scores are about the prior
            init.constant_(module.bias, math.log(self.config.prior_probability / (1 - self.config.prior_probability)))
        elif isinstance(module, BoxLayer):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, ZeroInitLinear):
            init.zeros_(module.weight)
        elif isinstance(module, SamplingOffsets):
            init.zeros_(module.weight)
            init.copy_(module.bias, module.initial_bias())

    def class_layers(self) -> set[str]:
        heads = {name: module for name, module in self.named_modules() if isinstance(module, ClassHead)}
        return {f"{name}.{parameter}" for name, head in heads.items() for parameter, _ in head.named_parameters()}

    def detect(self, pixel_values: Tensor, *, all_stages: bool, **wanted: bool) -> Detected:
        """Runs encoder and head; `wanted` are options of the encoder."""
        encoded = self.backbone(pixel_values, **wanted)
        feature_maps = self.neck(encoded.feature_maps)
        level_sizes = [(m.shape[2], m.shape[3]) for m in feature_maps]
        source = torch.cat([m.flatten(2) for m in feature_maps], dim=-1).transpose(1, 2)  # (batch, locations, dim)
        anchors = grid_anchors(level_sizes, self.config.anchor_size, source.device)  # (locations, 4)

        proposals, proposal_logits, proposal_boxes = self.proposal_head(source, anchors, self.config.num_queries)
        reference_boxes = proposal_boxes.detach()  # each stage learns its own boxes
        states = self.decoder(proposals, reference_boxes, source, level_sizes)
        if not all_stages:
            states = states[-1:]  # what the earlier layers predict serves the loss only
        logits = [self.class_head(queries) for queries in states]
        boxes = [refine_boxes(reference_boxes, self.box_head(queries)) for queries in states]
        if all_stages:
            states, logits, boxes = [proposals, *states], [proposal_logits, *logits], [proposal_boxes, *boxes]
        return Detected(encoded, feature_maps, anchors, reference_boxes, states, logits, boxes)

    def loss_of(
        self, found: Detected, targets: DetectionTargets, other: MatchedLoss | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of all stages and its parts; see [`detection_loss`]."""
        stages = torch.stack(found.logits), torch.stack(found.boxes)
        dense = None if self.dense_head is None else self.dense_head(found.feature_maps, found.anchors)
        return self.loss_function(*stages, dense, found.anchors, targets, self.config, other)

    @capture_outputs  # records nothing, but without it the hooks of the encoder's layers break the compiled graph
    @auto_docstring
    def forward(
        self,
        pixel_values: Tensor,
        labels: list[dict[str, Tensor]] | None = None,
        *,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> VLMViTObjectDetectionOutput:
        r"""
        labels (`list[dict[str, torch.Tensor]]`, *optional*):
            One dict per image: `class_labels` (n,), and `boxes` (n, 4) as (centre x, centre y, width, height) in
            fractions of the image. Other keys are ignored. ValueError when a class or a box is out of its range.
        """
        wanted = wanted_outputs(
            self.config, output_hidden_states=output_hidden_states, output_attentions=output_attentions
        )
        found = self.detect(pixel_values, all_stages=labels is not None, **wanted)
        loss = loss_dict = None
        if labels is not None:
            targets = DetectionTargets.from_labels(
                labels,
                batch_size=pixel_values.shape[0],
                num_labels=self.config.num_labels,
                device=found.anchors.device,
            )
            loss, loss_dict = self.loss_of(found, targets)
        return VLMViTObjectDetectionOutput(loss=loss, loss_dict=loss_dict, **found.outputs())


__all__ = ["Detected", "VLMViTDetectionConfig", "VLMViTForObjectDetection", "VLMViTObjectDetectionOutput"]
