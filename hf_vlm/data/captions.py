"""Texts of images: their captions, or else the names of their classes in sentences."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets

from hf_vlm.data.schema import captions_feature
from hf_vlm.data.source import Source

__all__ = ["class_prompts", "with_texts"]


def with_texts(source: Source, templates: Sequence[str]) -> Source:
    """The source with nothing but `image`, `image_id` and `text`.

    Without captions, the texts of an image are the name of its class in each of the templates.

    Raises:
        ValueError: The source has neither captions nor classes of whole images.
    """
    if not source.has_captions and source.label_names is None:
        raise ValueError(
            f"{source.name} has no texts in split {source.split!r}: neither captions (a column 'text' or 'caption', "
            "files .txt in tars, 'text' in metadata.jsonl) nor classes of its images (a label, folders of classes)."
        )
    columns = ["image", "image_id"]
    if source.has_captions:
        return replace(source, dataset=source.dataset.select_columns([*columns, "text"]))
    prompts = _Prompts(class_prompts(source.label_names or [], templates))
    features = datasets.Features({name: source.features[name] for name in columns} | {"text": captions_feature()})
    dataset = source.dataset.select_columns([*columns, "label"]).map(
        prompts, input_columns=["label"], remove_columns=["label"], features=features
    )
    return replace(source, dataset=dataset)


def class_prompts(names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """The sentences of each class: its name, with words in place of underscores and hyphens, in each template."""
    words = [" ".join(name.replace("_", " ").replace("-", " ").split()) for name in names]
    return [[template.format(word) for template in templates] for word in words]


@dataclass(frozen=True)
class _Prompts:
    of_class: list[list[str]]

    def __call__(self, label: int | None) -> dict[str, Any]:
        return {"text": [] if label is None or label < 0 else self.of_class[label]}
