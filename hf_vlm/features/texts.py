"""Texts in the space that they share with images, by the text model and the tokeniser of a saved model."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

from hf_vlm.data.captions import class_prompts
from hf_vlm.data.transforms.captions import tokenize
from hf_vlm.features.extraction import frozen

__all__ = ["embed_classes", "embed_texts", "load_tokenizer"]


def load_tokenizer(model: Any) -> Any:
    """The tokeniser beside a model that was loaded; ValueError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(model.name_or_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{model.name_or_path} holds no tokeniser: {str(error).splitlines()[0]}") from error


def embed_texts(model: Any, tokenizer: Any, texts: Sequence[str], *, batch_size: int = 256) -> Tensor:
    """Features (texts, projection_size) float32, L2-normalised, of an [`ImageTextForPreTraining`]."""
    parts = []
    with frozen(model):
        for first in range(0, len(texts), batch_size):
            tokens = tokenize(tokenizer, texts[first : first + batch_size])
            parts.append(model.get_text_features(**{name: ids.to(model.device) for name, ids in tokens.items()}).cpu())
    return torch.cat(parts)


def embed_classes(model: Any, tokenizer: Any, names: Sequence[str]) -> Tensor:
    """Features (classes, projection_size) of classes by their names: the mean over the model's templates (CLIP)."""
    prompts = class_prompts(names, model.config.templates)
    features = embed_texts(model, tokenizer, [text for texts in prompts for text in texts])
    return F.normalize(features.unflatten(0, (len(names), -1)).mean(dim=1), dim=1)
