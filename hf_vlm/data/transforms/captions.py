"""Texts beside the views of images: one caption sampled for each, and the tokens of a batch."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from hf_vlm.data.io.decode import BadImageError
from hf_vlm.data.stream import Transform

__all__ = ["CaptionCollate", "CaptionTransform", "tokenize"]


class CaptionTransform:
    """Adds one caption of the image, sampled by the generator of the example, to what another transform gives."""

    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        captions = example["text"]
        if not captions:
            raise BadImageError("it has no caption")
        transformed = self.transform(example, rng)
        return {**transformed, "text": captions[rng.integers(len(captions))]}


class CaptionCollate:
    """Adds the tokens of the texts, all of one length so that every batch has one shape, to a batch of images.

    Args:
        collate: Puts the images together.
        tokenizer: Tokeniser of transformers, whose `model_max_length` is that length.
    """

    def __init__(self, collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]], tokenizer: Any) -> None:
        self.collate = collate
        self.tokenizer = tokenizer

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        texts = [example["text"] for example in examples]
        return {**self.collate(examples), **tokenize(self.tokenizer, texts, padding="max_length")}


def tokenize(tokenizer: Any, texts: Sequence[str], *, padding: str = "longest") -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` (texts, tokens) int64 of texts; what is longer than the model reads is cut."""
    tokens = tokenizer(list(texts), padding=padding, truncation=True, return_tensors="pt", return_token_type_ids=False)
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}
