"""Configuration of the segmenter whose queries share the last layers of the encoder."""

from typing import Any, cast

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .configuration_vlm_vit import VLMViTConfig, own_encoder_config
from .modeling_semantic_segmentation import check_num_labels


@strict
class VLMViTMaskQuerySegmentationConfig(PreTrainedConfig):
    r"""Shape and training of a [`VLMViTForMaskQuerySegmentation`].

    Defaults are EoMT's for semantic segmentation (arXiv 2503.19108), but for the width of its maps and the number of
    points. The class names come from `id2label` (or their number from `num_labels`), as everywhere in transformers.

    Args:
        backbone_config (`VLMViTConfig` or `dict`, *optional*): The encoder.
        num_queries (`int`, defaults to 100): How many masks an image has; each class in it needs one.
        num_query_layers (`int`, defaults to 4): How many of the encoder's last layers the queries go through, beside
            the patches.
        mask_feature_size (`int`, defaults to 64): Channels of the map that masks are made of.
        mask_point_ratio (`int`, defaults to 4): Pixels of a mask per point at which its loss is computed.
        use_masked_attention (`bool`, defaults to `True`): Whether in training queries first see only the patches
            within their masks (Mask2Former, arXiv 2112.01527), until that is annealed away, layer by layer.
        class_loss_weight, mask_loss_weight, dice_loss_weight: Weights in the loss of each layer and in the matching:
            of classes, and of cross entropy and Dice of the masks.
        no_object_weight (`float`, defaults to 0.1): Weight of queries without a class against those with one.
        freeze_encoder (`bool`, defaults to `False`): Whether the head alone is trained: the queries, which go through
            the frozen layers, their classes and masks.
        initializer_range (`float`, *optional*): Standard deviation of the initial weights of the head; `None` for
            Xavier's rule: from 0.02 the masks of a narrow encoder learn far slower.

    Raises:
        ValueError: for more layers than the encoder has, a number of classes out of 2 to 255, or another number below
            its least.
    """

    model_type = "vlm_vit_mask_query_segmentation"
    sub_configs = {"backbone_config": VLMViTConfig}
    keys_to_ignore_at_inference = ["hidden_states", "attentions"]

    backbone_config: dict[str, Any] | PreTrainedConfig | None = None
    num_queries: int = 100
    num_query_layers: int = 4
    mask_feature_size: int = 64
    mask_point_ratio: int = 4
    use_masked_attention: bool = True
    class_loss_weight: float | int = 2
    mask_loss_weight: float | int = 5
    dice_loss_weight: float | int = 5
    no_object_weight: float | int = 0.1
    freeze_encoder: bool = False
    initializer_range: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.backbone_config = own_encoder_config(self.backbone_config)
        self.check(kwargs.get("num_labels", 2) if self.id2label is None else len(self.id2label))
        super().__post_init__(**kwargs)

    @property
    def encoder(self) -> VLMViTConfig:
        """The encoder's configuration: `backbone_config`, which is no longer a dict here."""
        return cast(VLMViTConfig, self.backbone_config)

    def check(self, num_labels: int) -> None:
        """ValueError where a field, or the number of classes, is out of its range."""
        name = type(self).__name__
        if not 1 <= self.num_query_layers <= self.encoder.num_hidden_layers:
            raise ValueError(
                f"{name}: num_query_layers is {self.num_query_layers}, but must be 1 to "
                f"{self.encoder.num_hidden_layers}, the number of the encoder's layers."
            )
        for field in ("num_queries", "mask_feature_size", "mask_point_ratio"):
            if getattr(self, field) < 1:
                raise ValueError(f"{name}: {field} is {getattr(self, field)}, but must be at least 1.")
        check_num_labels(self, num_labels)


__all__ = ["VLMViTMaskQuerySegmentationConfig"]
