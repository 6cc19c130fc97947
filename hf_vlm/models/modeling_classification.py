"""Image classification on the plain ViT: pooled tokens, a norm and a linear layer."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import auto_docstring
from transformers.utils.generic import can_return_tuple

from .configuration_vlm_vit import VLMViTConfig, own_encoder_config
from .model_on_encoder import HeadOnFreezableEncoder, wanted_outputs
from .modeling_vlm_vit import VLMViTModel
from .vit_layers import VLMViTAttention, build_norm

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification")
POOLINGS = ("mean", "class", "both", "attentive")


@strict
class VLMViTClassificationConfig(PreTrainedConfig):
    r"""Shape and loss of a [`VLMViTForImageClassification`].

    The class names come from `id2label` (or their number from `num_labels`), as everywhere in transformers.

    Args:
        backbone_config (`VLMViTConfig` or `dict`, *optional*): The encoder.
        problem_type (`str`, defaults to `"single_label_classification"`): One class per image, with a softmax over the
            classes, or `"multi_label_classification"`: any number of classes per image, with a sigmoid for each. It is
            set when the model is built, from what the data hold; a batch never changes it.
        pooling (`str`, *optional*): What the classifier reads: `"mean"` of the patch tokens, the `"class"` token,
            `"both"` side by side, which is the default where the encoder has a class token, or what a learned query
            finds in all tokens by cross-attention (`"attentive"`).
        freeze_encoder (`bool`, defaults to `False`): Whether the head alone is trained, which measures the
            encoder's features.
        label_smoothing (`float`, defaults to 0.0): Probability that is taken from the labels and spread evenly over
            all classes (arXiv 1512.00567); for several labels per image over "present" and "absent" of each class.
        temperature (`float`, defaults to 1.0): What the logits are divided by in evaluation mode, so that scores are
            the probabilities of being right (arXiv 1706.04599): in `forward`, so that pipelines and exported models
            agree. Fine-tuning fits it on held-out images. The loss is that of the undivided logits.

    Raises:
        ValueError: for a value out of its choices or its range, a pooling that the encoder has no token for, or fewer
            than two classes.
    """

    model_type = "vlm_vit_classification"
    sub_configs = {"backbone_config": VLMViTConfig}
    keys_to_ignore_at_inference = ["hidden_states", "attentions"]

    backbone_config: dict[str, Any] | PreTrainedConfig | None = None
    problem_type: str = "single_label_classification"  # never None: transformers would choose by the first labels
    pooling: str | None = None
    freeze_encoder: bool = False
    label_smoothing: float | int = 0.0
    temperature: float | int = 1.0
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        self.backbone_config = own_encoder_config(self.backbone_config)
        if self.pooling is None:
            self.pooling = "both" if self.encoder.use_class_token else "mean"
        self.check(kwargs.get("num_labels", 2) if self.id2label is None else len(self.id2label))
        super().__post_init__(**kwargs)

    @property
    def encoder(self) -> VLMViTConfig:
        """The encoder's configuration: `backbone_config`, which is no longer a dict here."""
        return cast(VLMViTConfig, self.backbone_config)

    def check(self, num_labels: int) -> None:
        """ValueError where a field, or the number of classes, is out of its range."""
        for name, choices in (("problem_type", PROBLEM_TYPES), ("pooling", POOLINGS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"VLMViTClassificationConfig: {name} is {getattr(self, name)!r}, but must be one of "
                    f"{', '.join(choices)}."
                )
        if self.pooling in ("class", "both") and not self.encoder.use_class_token:
            raise ValueError(
                f"VLMViTClassificationConfig: pooling is {self.pooling!r}, but the encoder has no class token: use "
                "'mean' or 'attentive'."
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"VLMViTClassificationConfig: label_smoothing is {self.label_smoothing}, but must be at least 0 and "
                "below 1."
            )
        if not self.temperature > 0:
            raise ValueError(f"VLMViTClassificationConfig: temperature is {self.temperature}, but must be above 0.")
        if num_labels < 2:
            raise ValueError(
                f"VLMViTClassificationConfig: num_labels is {num_labels}, but at least 2 classes are needed, of which "
                "one may be 'none of the others': transformers takes a single label for a regression."
            )


def classification_loss(logits: Tensor, labels: Tensor, *, problem_type: str, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy of the images, or mean binary cross entropy of the images and classes.

    Args:
        logits: (batch, classes).
        labels: (batch,) int64, or (batch, classes) float as mixed images have it; for several labels per image
            (batch, classes) of 0 to 1.
        label_smoothing: Probability spread evenly over the outcomes.

    Raises:
        ValueError: if the labels have another shape or type. Classes out of their range are torch's to refuse: to look
            at the values here would make the device wait.
    """
    logits = logits.float()
    is_multi_label = problem_type == "multi_label_classification"
    has_classes = labels.ndim == 2
    fits = labels.ndim in (1, 2) and labels.shape[0] == logits.shape[0]
    fits = fits and (labels.shape[1] == logits.shape[1] if has_classes else not is_multi_label)
    if not fits or (not is_multi_label and has_classes != labels.is_floating_point()):
        wanted = "(batch, classes)" if is_multi_label else "(batch,) integers or (batch, classes) probabilities"
        raise ValueError(
            f"Labels must be {wanted} for logits of the shape {tuple(logits.shape)}, but are of the shape "
            f"{tuple(labels.shape)} and the type {labels.dtype}."
        )
    if has_classes:
        labels = labels.to(logits.dtype)
    if is_multi_label:
        targets = labels * (1 - label_smoothing) + label_smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, targets)
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)


class AttentivePooling(nn.Module):
    """One learned query that attends to all tokens, as in the attentive probes of I-JEPA's successors (V-JEPA, arXiv
    2404.08471, whose MLP it leaves out): what MAE-like encoders know of an image is in no single token.
    """

    def __init__(self, config: VLMViTConfig):
        super().__init__()
        self.norm = build_norm(config, config.hidden_size)
        self.query_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.attention = VLMViTAttention(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (batch, tokens, dim) to features (batch, 1, dim)."""
        tokens = self.norm(tokens)
        return self.attention(self.query_token.expand(tokens.shape[0], -1, -1), context=tokens)[0]


@auto_docstring
class VLMViTForImageClassification(HeadOnFreezableEncoder):
    """The encoder with a classifier on its pooled tokens.

    As in BEiT and MAE (arXiv 2106.08254, 2111.06377), whose classifiers read the mean of the patches, the pooled
    features are normalised once more: a mean over patches is smaller than any of them, by a factor that differs from
    encoder to encoder, and so one learning rate would not do for all. The class token is normalised apart from the
    mean, so that neither outweighs the other.
    """

    config_class = VLMViTClassificationConfig
    # transformers picks a loss by the class name, which would turn soft labels into a multi-label problem.
    loss_function = staticmethod(classification_loss)

    def __init__(self, config: VLMViTClassificationConfig):
        super().__init__(config)
        config.check(config.num_labels)  # again: from_pretrained(..., num_labels=1) sets fields that were checked
        width = config.encoder.hidden_size
        self.backbone = VLMViTModel(config.encoder)
        self.attentive_pooling = AttentivePooling(config.encoder) if config.pooling == "attentive" else None
        self.pooled_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.classifier = nn.Linear((2 if config.pooling == "both" else 1) * width, config.num_labels)
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
    ) -> ImageClassifierOutput:
        r"""
        labels (`torch.Tensor` of shape `(batch,)` or `(batch, num_labels)`, *optional*):
            Class of each image, or the probability of each class as mixed images have it; for several labels per
            image 1 for each class that is present. ValueError when the shape or the type fits neither.
        """
        wanted = wanted_outputs(
            self.config, output_hidden_states=output_hidden_states, output_attentions=output_attentions
        )
        outputs = self.backbone(pixel_values, **wanted)
        logits = self.classifier(self._pool(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, problem_type=self.config.problem_type, label_smoothing=self.config.label_smoothing
            )
        if not self.training:
            logits = logits / self.config.temperature
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _pool(self, tokens: Tensor) -> Tensor:
        """Tokens (batch, prefix + patches, dim) to normalised features (batch, dim or 2 x dim), class token first."""
        if self.attentive_pooling is not None:
            return self.pooled_norm(self.attentive_pooling(tokens)).flatten(1)
        parts = [tokens[:, 0]] if self.config.pooling != "mean" else []
        if self.config.pooling != "class":
            parts.append(tokens[:, self.config.encoder.num_prefix_tokens :].mean(dim=1))
        return self.pooled_norm(torch.stack(parts, dim=1)).flatten(1)


__all__ = ["VLMViTClassificationConfig", "VLMViTForImageClassification", "classification_loss"]
