"""Configuration of the set-prediction detector on the plain ViT."""

import math
from typing import Any, cast

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .configuration_vlm_vit import VLMViTConfig, own_encoder_config


@strict
class VLMViTDetectionConfig(PreTrainedConfig):
    r"""Shape and loss of a [`VLMViTForObjectDetection`].

    The class names come from `id2label` (or their number from `num_labels`), as everywhere in transformers.

    Args:
        backbone_config (`VLMViTConfig` or `dict`, *optional*): The encoder; its `out_indices` are set from
            `num_feature_taps`.
        num_feature_taps (`int`, defaults to 4): How many evenly spaced encoder layers the neck reads; a shallower
            encoder gives all it has.
        hidden_size (`int`, defaults to 256): Width of the neck and the decoder.
        neck_num_blocks (`int`, defaults to 3): Bottleneck blocks of a neck level.
        num_neck_levels (`int`, defaults to 1): 1 for a map at the patch stride, 2 for a finer one (half the stride)
            beside it: for objects smaller than two patches.
        intermediate_size (`int`, defaults to 2048): Width of the decoder's MLP.
        num_points (`int`, defaults to 2): Points that a cross-attention head samples on a level; 4 go well with two
            levels.
        num_queries (`int`, defaults to 300): Most objects found in an image. Free to change at run time, and clipped
            to the number of locations of the neck maps.
        initializer_range (`float`, *optional*): Standard deviation of the initial weights of neck and decoder; `None`
            for Xavier's rule, as in DETR: 0.02 is far too little for narrow layers.
        anchor_size (`float`, defaults to 2.0): Side of the boxes that proposals start from, in cells of their map.
        prior_probability (`float`, defaults to 0.01): Score that untrained class heads give.
        dense_loss_weight (`float`, defaults to 1.0): Weight of the one-to-many head that only training uses; 0 builds
            none.
        dense_top_k (`int`, defaults to 13): Locations that the one-to-many head assigns to an object at most.
        class_cost, bbox_cost, giou_cost: Weights of the matching cost: focal, L1 and GIoU.
        class_loss_weight, bbox_loss_weight, giou_loss_weight: Weights of the loss of each stage. The class weight is
            twice LW-DETR's: with few images the classes are learned later than the boxes.

    Raises:
        ValueError: if sizes and heads do not divide, or a count is out of its range.
    """

    model_type = "vlm_vit_detection"
    sub_configs = {"backbone_config": VLMViTConfig}
    keys_to_ignore_at_inference = ["loss_dict", "last_hidden_state", "reference_boxes", "hidden_states", "attentions"]

    backbone_config: dict[str, Any] | PreTrainedConfig | None = None
    num_feature_taps: int = 4
    hidden_size: int = 256
    neck_num_blocks: int = 3
    num_neck_levels: int = 1
    num_decoder_layers: int = 3
    intermediate_size: int = 2048
    num_self_attention_heads: int = 8
    num_cross_attention_heads: int = 16
    num_points: int = 2
    num_queries: int = 300
    hidden_act: str = "relu"
    layer_norm_eps: float = 1e-6
    initializer_range: float | None = None
    anchor_size: float | int = 2.0
    prior_probability: float = 0.01
    class_cost: float | int = 2
    bbox_cost: float | int = 5
    giou_cost: float | int = 2
    class_loss_weight: float | int = 2
    bbox_loss_weight: float | int = 5
    giou_loss_weight: float | int = 2
    dense_loss_weight: float | int = 1
    dense_top_k: int = 13

    def __post_init__(self, **kwargs: Any) -> None:
        self._check()
        self.backbone_config = own_encoder_config(self.backbone_config)
        num_layers = self.encoder.num_hidden_layers
        num_taps = min(self.num_feature_taps, num_layers)
        self.encoder.reshape_hidden_states = True  # the neck reads maps
        self.encoder.out_indices = [math.ceil(num_layers * i / num_taps) for i in range(1, num_taps + 1)]
        super().__post_init__(**kwargs)

    @property
    def encoder(self) -> VLMViTConfig:
        """The encoder's configuration: `backbone_config`, which is no longer a dict here."""
        return cast(VLMViTConfig, self.backbone_config)

    def _check(self) -> None:
        for name in ("num_self_attention_heads", "num_cross_attention_heads"):
            if self.hidden_size % getattr(self, name):
                raise ValueError(
                    f"{type(self).__name__}: hidden_size {self.hidden_size} is not divisible by {name} "
                    f"{getattr(self, name)}."
                )
        if self.hidden_size % 4:
            raise ValueError(f"{type(self).__name__}: hidden_size {self.hidden_size} is not divisible by 4.")
        if self.num_neck_levels not in (1, 2):
            raise ValueError(f"{type(self).__name__}: num_neck_levels is {self.num_neck_levels}, but must be 1 or 2.")
        for name in ("num_feature_taps", "num_decoder_layers", "num_queries", "num_points", "dense_top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{type(self).__name__}: {name} is {getattr(self, name)}, but must be at least 1.")
        if not 0 < self.prior_probability < 1 or self.anchor_size <= 0:
            raise ValueError(
                f"{type(self).__name__}: prior_probability must lie between 0 and 1, anchor_size above 0."
            )


__all__ = ["VLMViTDetectionConfig"]
