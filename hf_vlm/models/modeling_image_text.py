"""Images and texts in one space, by the pairs of an image with its caption: SigLIP, CLIP, LiT and dino.txt."""

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedConfig
from transformers import initialization as init
from transformers.utils import ModelOutput, auto_docstring

from .configuration_vlm_vit import VLMViTConfig
from .modeling_vlm_vit import VLMViTModel
from .ranks import gather_with_gradient, rank
from .self_initialised import SelfInitialised
from .ssl_layers import check_views, feature_std
from .ssl_model import SSLConfig, SSLPreTrainedModel, returns_loss
from .vit_layers import VLMViTLayer, build_norm

MAX_LOG_SCALE = math.log(100)  # CLIP's bound of the factor of the cosines
INITIAL_SCALE = {"sigmoid": 10.0, "softmax": 1 / 0.07}  # of SigLIP and CLIP
SMALL_TEXT_MODEL = {  # as wide and deep as suits captions of one's own; without dropout, as SigLIP's
    "model_type": "bert",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@strict
class ImageTextConfig(SSLConfig):
    r"""Configuration of [`ImageTextForPreTraining`].

    Args:
        backbone_config (`VLMViTConfig` or `dict`, *optional*): The encoder of images.
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            The encoder of texts: any model of transformers with one state per token, such as those of BERT and CLIP.
            A small BERT when not given; fields without `model_type` change that one.
        text_pooling (`str`, defaults to `"mean"`):
            What texts are read from: the `"mean"` of their tokens, as in sentence-transformers, or `"pooler"`, the
            model's own vector per text, as CLIP's. Those of a new BERT hardly differ, and the loss with them stays
            where it is for long.
        projection_size (`int`, defaults to 512): Width of the space that images and texts share.
        loss_type (`str`, defaults to `"sigmoid"`):
            `"sigmoid"`, each pair of an image and a text is classified by itself (SigLIP, arXiv 2303.15343), which is
            better with up to some thousands of pairs per batch; or `"softmax"`, each image chooses among all texts and
            each text among all images (CLIP, arXiv 2103.00020).
        initial_bias (`float`, defaults to -10.0):
            What the sigmoid loss adds to logits at first. SigLIP's -10 suits its batches of 32,768 pairs, of which
            one in as many is right; -log(pairs - 1) suits others. With a lower one, all images and texts first
            become alike, as a higher cosine is what the loss then asks of nearly every pair.
        lock_encoder (`bool`, defaults to `False`):
            Whether the encoder of images neither learns nor drops anything, as in LiT (arXiv 2111.07991).
        num_extra_blocks (`int`, defaults to 0):
            Trained layers on top of the encoder, before pooling: two on a locked encoder in dino.txt (arXiv
            2412.16334).
        use_patch_mean (`bool`, defaults to `True`):
            Whether images are read from the mean of the patch tokens beside the class token, as in dino.txt, so that
            patches can be compared with texts, too. An encoder without class token has this mean alone.
        templates (`list`, defaults to `["a photo of a {}."]`):
            Sentences in which the name of a class is a text, with {} in its place.
    """

    model_type = "vlm_image_text"
    sub_configs = {"backbone_config": VLMViTConfig, "text_config": AutoConfig}

    text_config: Any = None
    text_pooling: str = "mean"
    projection_size: int = 512
    loss_type: str = "sigmoid"
    initial_bias: float | int = -10.0
    lock_encoder: bool = False
    num_extra_blocks: int = 0
    use_patch_mean: bool = True
    templates: list[str] | tuple[str, ...] = ("a photo of a {}.",)

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = as_text_config(self.text_config or {})
        super().__post_init__(**kwargs)
        if self.loss_type not in INITIAL_SCALE:
            raise ValueError(f"ImageTextConfig: loss_type must be sigmoid or softmax, but is {self.loss_type!r}.")
        if self.text_pooling not in ("mean", "pooler"):
            raise ValueError(f"ImageTextConfig: text_pooling must be mean or pooler, but is {self.text_pooling!r}.")
        if not self.templates or any(text.count("{}") != 1 or text.count("{") != 1 for text in self.templates):
            raise ValueError(f"ImageTextConfig: templates need one {{}} each, but are {list(self.templates)}.")
        self.check_range(1, math.inf, "projection_size")
        self.check_range(0, math.inf, "num_extra_blocks")

    @property
    def image_size(self) -> int:
        """Width of the features that images are projected from."""
        both = self.use_patch_mean and self.backbone_config.use_class_token
        return self.backbone_config.hidden_size * (2 if both else 1)  # type: ignore[no-any-return]


def as_text_config(fields: dict[str, Any]) -> PreTrainedConfig:
    """Configuration of a text model by its fields; ValueError where transformers has no such model by itself."""
    fields = dict(fields) if "model_type" in fields else {**SMALL_TEXT_MODEL, **fields}
    model_type = fields.pop("model_type")
    try:
        config = AutoConfig.for_model(model_type, **fields)
    except ValueError:
        config = None
    if type(config) not in MODEL_MAPPING or config.is_encoder_decoder:
        raise ValueError(
            f"ImageTextConfig: text_config names the model_type {model_type!r}, which is no encoder of texts that "
            "AutoModel of transformers knows: name one, such as bert, roberta or clip_text_model."
        )
    return config


@auto_docstring
@dataclass
class ImageTextOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`): Contrastive loss over the pairs of all ranks.
    logits_per_image (`torch.FloatTensor` of shape `(images, texts)`): Scaled cosines of this rank's images and texts.
    logits_per_text (`torch.FloatTensor` of shape `(texts, images)`): The same, transposed.
    image_embeds (`torch.FloatTensor` of shape `(images, projection_size)`): Images, L2-normalised.
    text_embeds (`torch.FloatTensor` of shape `(texts, projection_size)`): Texts, L2-normalised.
    accuracy (`torch.FloatTensor` of shape `()`):
        Fraction of this rank's images whose most similar text, among this rank's, is their own.
    feature_std (`torch.FloatTensor` of shape `()`): Spread of the images: 1 when even, 0 when collapsed.
    text_std (`torch.FloatTensor` of shape `()`): Spread of the texts.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    accuracy: Tensor | None = None
    feature_std: Tensor | None = None
    text_std: Tensor | None = None


class CosineScale(SelfInitialised):
    """The learned factor and, for the sigmoid loss, offset that turn cosines into logits."""

    def __init__(self, loss_type: str, initial_bias: float = -10.0):
        super().__init__()
        self.loss_type, self.initial_bias = loss_type, initial_bias
        self.log_scale = nn.Parameter(torch.empty(1))  # not of shape (), which FSDP does not shard
        if loss_type == "sigmoid":
            self.bias = nn.Parameter(torch.empty(1))

    def init_parameters(self) -> None:
        init.constant_(self.log_scale, math.log(INITIAL_SCALE[self.loss_type]))
        if self.loss_type == "sigmoid":
            init.constant_(self.bias, self.initial_bias)

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        """Logits (images, texts) of L2-normalised images (images, dim) and texts (texts, dim)."""
        logits = images @ texts.T * self.log_scale.exp()
        return logits + self.bias if self.loss_type == "sigmoid" else logits


def sigmoid_loss(logits: Tensor, offset: int) -> Tensor:
    """SigLIP's loss (): -sum over texts j of log sigmoid(+-logit_ij), the mean over images i.

    The sign is + for an image's own text.

    Args:
        logits: (images, texts).
        offset: Index of the first image's own text; those of the others follow.
    """
    targets = torch.arange(logits.shape[0], device=logits.device)[:, None] + offset
    is_pair = targets == torch.arange(logits.shape[1], device=logits.device)
    return F.softplus(torch.where(is_pair, -logits, logits)).sum(dim=1).mean()


def softmax_loss(of_images: Tensor, of_texts: Tensor, offset: int) -> Tensor:
    """CLIP's loss (): cross entropy of an image's text among all and of a text's image among all, the mean of both.

    Args:
        of_images: (images, all texts) logits of this rank's images.
        of_texts: (texts, all images) logits of this rank's texts.
        offset: Index of the first pair of this rank among all.
    """
    targets = torch.arange(of_images.shape[0], device=of_images.device) + offset
    return (F.cross_entropy(of_images, targets) + F.cross_entropy(of_texts, targets)) / 2


def contrastive_loss(images: Tensor, texts: Tensor, scale: CosineScale) -> Tensor:
    """Contrastive loss () of this rank's pairs against all ranks'; the mean of all ranks is that of the joined batch.

    Args:
        images: (pairs, dim), L2-normalised.
        texts: (pairs, dim), L2-normalised; text i belongs to image i.
        scale: Turns cosines into logits.
    """
    offset = rank() * images.shape[0]
    of_images = scale(images, gather_with_gradient(texts))  # (pairs, world x pairs)
    if scale.loss_type == "sigmoid":
        return sigmoid_loss(of_images, offset)
    return softmax_loss(of_images, scale(texts, gather_with_gradient(images)), offset)


@auto_docstring
class ImageTextForPreTraining(SSLPreTrainedModel):
    """An encoder of images and one of texts, each with a projection into the space in which they are compared.

    It classifies images by names of classes that it never saw, and finds images by words:
    `AutoModelForZeroShotImageClassification` loads it for transformers' pipeline.
    """

    config_class = ImageTextConfig
    input_modalities = ("image", "text")
    loss_may_vanish = True
    # Words such as "left of" do not survive a mirror, nor names of colours a change of colour; crops as OpenCLIP's.
    default_views = {"num_views": 1, "crop_scale": [0.9, 1.0], "flip_probability": 0.0}

    def __init__(self, config: ImageTextConfig):
        super().__init__(config)
        encoder = config.backbone_config
        self.backbone = VLMViTModel(encoder)
        self.extra_blocks = nn.ModuleList(VLMViTLayer(encoder) for _ in range(config.num_extra_blocks))
        self.extra_norm = build_norm(encoder, encoder.hidden_size) if config.num_extra_blocks else nn.Identity()
        self.text_model = AutoModel.from_config(config.text_config)
        if config.text_pooling == "mean" and hasattr(self.text_model, "pooler"):
            self.text_model.pooler = None  # it would not learn, and DDP expects every parameter to
        self.image_projection = nn.Linear(config.image_size, config.projection_size, bias=False)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_size, bias=False)
        self.cosine_scale = CosineScale(config.loss_type, config.initial_bias)
        self.post_init()

    def train(self, mode: bool = True) -> Self:
        """Locks the encoder again: `from_pretrained` lets all parameters learn, and then calls `eval`, so this."""
        super().train(mode)
        if self.config.lock_encoder:
            self.backbone.requires_grad_(False).eval()
        return self

    def auto_map(self) -> dict[str, str]:
        name = super().auto_map()["AutoModel"]
        return {"AutoModel": name, "AutoModelForZeroShotImageClassification": name}

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Keeps the factor of the cosines within CLIP's bound, for the softmax loss."""
        if self.config.loss_type == "softmax":
            self.cosine_scale.log_scale.clamp_(max=MAX_LOG_SCALE)

    def image_tokens(self, pixel_values: Tensor) -> Tensor:
        """Tokens (images, prefix + patches, hidden_size) that images (images, channels, h, w) are read from."""
        tokens = self.backbone(pixel_values).last_hidden_state
        for block in self.extra_blocks:
            tokens = block(tokens)
        return self.extra_norm(tokens)  # type: ignore[no-any-return]

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Images (images, channels, height, width) in the common space: (images, projection_size), L2-normalised."""
        tokens, encoder = self.image_tokens(pixel_values), self.config.backbone_config
        parts = [tokens[:, 0]] if encoder.use_class_token else []
        if self.config.use_patch_mean or not parts:
            parts.append(tokens[:, encoder.num_prefix_tokens :].mean(dim=1))
        return F.normalize(self.image_projection(torch.cat(parts, dim=1)).float(), dim=-1)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Texts in the common space: (texts, projection_size), L2-normalised.

        Args:
            input_ids: (texts, tokens) int64.
            attention_mask: (texts, tokens), 0 for padding.
        """
        output = self.text_model(input_ids=input_ids, attention_mask=attention_mask)
        if self.config.text_pooling == "mean":
            is_text = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            weights = (is_text / is_text.sum(dim=1, keepdim=True)).to(output.last_hidden_state.dtype)
            pooled = (output.last_hidden_state * weights[:, :, None]).sum(dim=1)  # (texts, hidden_size)
        elif (pooled := output.get("pooler_output")) is None:
            name = type(self.text_model).__name__
            raise ValueError(f"{name} gives no vector per text (pooler_output): set text_pooling to mean.")
        return F.normalize(self.text_projection(pooled).float(), dim=-1)

    @returns_loss
    @auto_docstring
    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> ImageTextOutput:
        r"""
        pixel_values (`torch.FloatTensor` of shape `(images, 1, channels, height, width)` or without the view):
            Images. Where there are as many as texts, each is the pair of the text with its index.
        input_ids (`torch.LongTensor` of shape `(texts, tokens)`):
            Tokens of the texts.
        attention_mask (`torch.LongTensor` of shape `(texts, tokens)`, *optional*):
            0 for padding.
        token_type_ids (`torch.LongTensor` of shape `(texts, tokens)`, *optional*):
            Not read: a text has one part. Tokenisers give it all the same.
        """
        if pixel_values.ndim == 5:
            pixel_values = check_views(pixel_values, num_views=1)[:, 0]
        num_images, num_texts = pixel_values.shape[0], input_ids.shape[0]
        if self.training and num_images != num_texts:
            raise ValueError(f"In training each image needs its text, but there are {num_images} and {num_texts}.")
        images = self.get_image_features(pixel_values)
        texts = self.get_text_features(input_ids, attention_mask)
        with torch.autocast(images.device.type, enabled=False):  # bfloat16 would resolve logits near 10 to 0.06
            logits = self.cosine_scale(images, texts)  # (images, texts)
            of_pairs = {} if num_images != num_texts else self._compare_pairs(images, texts, logits)
        return ImageTextOutput(
            logits_per_image=logits, logits_per_text=logits.T, image_embeds=images, text_embeds=texts, **of_pairs
        )

    def _compare_pairs(self, images: Tensor, texts: Tensor, logits: Tensor) -> dict[str, Tensor]:
        own = torch.arange(images.shape[0], device=logits.device)
        return {
            "loss": contrastive_loss(images, texts, self.cosine_scale),
            "accuracy": (logits.argmax(dim=1) == own).float().mean(),
            "feature_std": feature_std(images),
            "text_std": feature_std(texts),
        }


__all__ = [
    "CosineScale",
    "ImageTextConfig",
    "ImageTextForPreTraining",
    "ImageTextOutput",
    "contrastive_loss",
    "sigmoid_loss",
    "softmax_loss",
]
