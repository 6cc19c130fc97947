"""Zero-shot classification and retrieval: images and texts compared in the space that they share."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hf_vlm.data.source import Source
from hf_vlm.data.stream import ExampleStream, Transform
from hf_vlm.features.extraction import eval_transform_for, frozen
from hf_vlm.features.texts import embed_classes, embed_texts, load_tokenizer
from hf_vlm.metrics.retrieval import retrieval_recall
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_image_text import ImageTextForPreTraining
from hf_vlm.tasks.task import Collate, Evaluation, Task

__all__ = ["ZERO_SHOT"]


class WithTexts:
    """The transform of an image, with the captions of the example."""

    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return {**self.transform(example, rng), "text": example.get("text") or []}


def class_names(source: Source) -> list[str]:
    """The classes of the labels, which may be none where there are captions; ValueError for data without either."""
    if source.label_names is None and not source.has_captions:
        raise ValueError(
            f"{source.name} has neither class labels nor captions in split {source.split!r}: zero-shot accuracy needs "
            "the first and retrieval the second."
        )
    return source.label_names or []


def transform(processor: VLMViTImageProcessor, **_: Any) -> Transform:
    """The transform that prepares images as the processor does."""
    return WithTexts(eval_transform_for(processor))


def collate(**_: Any) -> Collate:
    """A function that stacks images, and lists their captions and labels."""
    return lambda examples: {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "text": [example["text"] for example in examples],
        "label": [example.get("label") for example in examples],
    }


def evaluate(
    model: ImageTextForPreTraining,
    stream: ExampleStream,
    processor: VLMViTImageProcessor,
    *,
    class_names: Sequence[str],
    batch_size: int = 64,
    per_class: bool = False,
    fit_stream: ExampleStream | None = None,
) -> Evaluation:
    """Zero-shot accuracy over the names of the classes, and recall of captions by images and of images by captions."""
    parts, labels, captions = [], list[int | None](), list[list[str]]()
    with frozen(model):
        for batch in DataLoader(stream, batch_size=batch_size, collate_fn=collate()):
            parts.append(model.get_image_features(batch["pixel_values"].to(model.device)).cpu())
            captions += batch["text"]
            labels += batch["label"]
    images, tokenizer = torch.cat(parts), load_tokenizer(model)
    is_labelled = torch.tensor([label is not None and label >= 0 for label in labels])
    metrics: dict[str, float] = {}
    if class_names and is_labelled.any():
        known = torch.tensor([label for label in labels if label is not None and label >= 0])
        metrics |= top_accuracy(images[is_labelled], embed_classes(model, tokenizer, class_names), known)
    if any(captions):
        metrics |= caption_recall(images, captions, lambda texts: embed_texts(model, tokenizer, texts))
    return Evaluation(metrics=metrics, class_names=class_names)


def top_accuracy(images: Tensor, classes: Tensor, labels: Tensor) -> dict[str, float]:
    """Fraction of images (n, dim) with labels (n,) whose class is among the 1 or 5 most similar of (classes, dim)."""
    nearest = (images @ classes.T).topk(min(5, len(classes)), dim=1).indices  # (n, 5)
    hits = nearest == labels[:, None]
    return {f"top{k}": hits[:, :k].any(dim=1).double().mean().item() for k in (1, 5)}


def caption_recall(
    images: Tensor, captions: Sequence[Sequence[str]], embed: Callable[[list[str]], Tensor]
) -> dict[str, float]:
    """Recall of the captions of images (n, dim), both ways; images without one are left out.

    A text that several images have is right for all of them, and counts once.
    """
    texts: dict[str, int] = {}
    kept = [row for row, own in enumerate(captions) if own]
    pairs = [
        (image, texts.setdefault(text, len(texts)))
        for image, row in enumerate(kept)
        for text in dict.fromkeys(captions[row])
    ]
    return retrieval_recall(images[kept], embed(list(texts)), torch.tensor(pairs))


NAMES = {"image_to_text_r": "captions found by an image", "text_to_image_r": "images found by a caption"}
ZERO_SHOT = Task(
    name="zero-shot-image-classification",
    class_names=class_names,
    transform=transform,
    collate=collate,
    evaluate=evaluate,
    headline={
        "top1": "zero-shot accuracy",
        "image_to_text_r1": "captions found by an image (R@1)",
        "text_to_image_r1": "images found by a caption (R@1)",
    },
    metric_names={
        "top1": "zero-shot accuracy",
        "top5": "zero-shot accuracy within five classes",
        **{f"{key}{k}": f"{name} (R@{k})" for key, name in NAMES.items() for k in (1, 5, 10)},
    },
    card="image_text.md",
    has_open_classes=True,
)
