"""What a pretraining method learns from: the views of images, or with each a text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from hf_vlm.data.captions import with_texts
from hf_vlm.data.source import Source
from hf_vlm.data.stream import Transform
from hf_vlm.data.transforms.captions import CaptionCollate, CaptionTransform
from hf_vlm.registry import ModelEntry
from hf_vlm.training.arguments import VisionTrainingArguments
from hf_vlm.training.build import build_config, build_model
from hf_vlm.training.texts import prepare_texts

__all__ = ["ImagesAlone", "ImagesWithTexts", "inputs_for"]

Collate = Callable[[Any], dict[str, Any]]


class ImagesAlone:
    """Views of images, without labels.

    Attributes:
        source: The images.
        external_weights: Folders and Hub ids of other models that the weights come from.
    """

    external_weights: tuple[str, ...] = ()

    def __init__(self, source: Source) -> None:
        self.source = source.unlabelled()

    def build_model(self, args: VisionTrainingArguments, entry: ModelEntry) -> PreTrainedModel:
        return build_model(args, entry)

    def transform(self, views: Transform) -> Transform:
        """The transform of examples, from that of their images."""
        return views

    def collate(self, views: Collate) -> Collate:
        """The function that puts a batch together, from that for images."""
        return views

    def save(self, folder: Path) -> None:
        """Writes what belongs to a saved model beside its image processor."""


class ImagesWithTexts(ImagesAlone):
    """Views of images, each with the tokens of one of its texts."""

    def __init__(self, args: VisionTrainingArguments, entry: ModelEntry, source: Source) -> None:
        self.source = with_texts(source, build_config(args, entry).templates)
        self.texts = prepare_texts(args, self.source)
        self.external_weights = (args.text_encoder,) if args.text_encoder else ()

    def build_model(self, args: VisionTrainingArguments, entry: ModelEntry) -> PreTrainedModel:
        model = build_model(args, entry, head_fields={"text_config": self.texts.config})
        if model.config.lock_encoder and not args.encoder:
            raise ValueError(
                "model_config.lock_encoder keeps the encoder as it is, which would be random: name a trained one with "
                "--encoder, or set --model_config.lock_encoder false."
            )
        if self.texts.model is not None:
            weights = self.texts.model.state_dict()
            model.text_model.load_state_dict({name: weights[name] for name in model.text_model.state_dict()})
        return model

    def transform(self, views: Transform) -> Transform:
        return CaptionTransform(views)

    def collate(self, views: Collate) -> Collate:
        return CaptionCollate(views, self.texts.tokenizer)

    def save(self, folder: Path) -> None:
        self.texts.tokenizer.save_pretrained(folder)


def inputs_for(args: VisionTrainingArguments, entry: ModelEntry, source: Source) -> ImagesAlone:
    """What the method of a row learns from; ValueError where the source has no texts for one that takes them."""
    takes_texts = "text" in entry.model_class.input_modalities
    return ImagesWithTexts(args, entry, source) if takes_texts else ImagesAlone(source)
