"""The one loader of models: from a run, a checkpoint or the Hub, with a check that no weight is missing."""

import contextlib
import logging
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.convert_families import ALIASES, FAMILIES
from hf_vlm.models.convert_vlm_vit import is_ours, read_config
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.registry import ModelEntry, find_model_type

__all__ = [
    "LoadedModel",
    "load_frozen_encoder",
    "load_model",
    "quiet_transformers",
    "read_own_config",
    "refuse_missing",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A trained model in evaluation mode, its image processor and its row of the registry."""

    entry: ModelEntry
    model: PreTrainedModel
    processor: VLMViTImageProcessor

    @property
    def class_names(self) -> list[str]:
        """Names of the classes 0, 1, ... of a model with a head for classes."""
        return [self.model.config.id2label[index] for index in range(self.model.config.num_labels)]

    @property
    def encoder_config(self) -> VLMViTConfig:
        return getattr(self.model.config, "backbone_config", self.model.config)  # type: ignore[no-any-return]


def load_model(source: str | Path) -> LoadedModel:
    """The model in the folder of a run or under a name on the Hub; for a pretraining model, its encoder.

    Raises:
        ValueError: There is none, it is not of this package, or weights are missing.
    """
    config = read_own_config(source)
    entry = find_model_type(config["model_type"])
    if entry is None or entry.task == "pretraining":
        entry = find_model_type(VLMViTConfig.model_type)
    assert entry is not None  # the encoder has a row
    model, processor = _load(source, entry.model_class, entry.processor_class, what="model")
    return LoadedModel(entry, model, processor)


def load_frozen_encoder(source: str | Path) -> tuple[VLMViTModel, VLMViTImageProcessor]:
    """The encoder in a folder or on the Hub, also from a detector or a pretraining model, and its image processor.

    Raises:
        ValueError: There is none, it has to be converted first, or weights are missing.
    """
    read_own_config(source)
    return _load(source, VLMViTModel, VLMViTImageProcessor, what="encoder")


def _load(source: str | Path, model_class: Any, processor_class: Any, *, what: str) -> tuple[Any, Any]:
    try:
        with quiet_transformers():
            model, report = model_class.from_pretrained(source, output_loading_info=True)
        processor = processor_class.from_pretrained(source)
    except OSError as error:
        raise ValueError(f"{source} holds no {what}: {str(error).splitlines()[0]}") from error
    refuse_missing(source, report, what)
    return model.eval(), processor


def refuse_missing(source: str | Path, report: dict[str, Any], what: str) -> None:
    """ValueError where transformers' report of a loaded model names weights that the checkpoint lacks."""
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{source} lacks {len(missing)} of the {what}'s weights, such as {missing[0]}.")


def read_own_config(source: str | Path) -> dict[str, Any]:
    """A checkpoint's configuration.

    Raises:
        ValueError: There is none, it has to be converted first, is of another package, or names code to run.
    """
    name = str(source)
    config = read_config(name)
    model_type = config.get("model_type")
    if model_type in {**FAMILIES, **ALIASES}:
        folder = f"runs/{Path(name).name}"
        raise ValueError(
            f"{name} is a checkpoint of transformers ({model_type}). Convert it, and give the result:\n"
            f"  {shlex.join(['hf-vlm', 'convert', name, folder])}\n  --encoder {shlex.quote(folder)}"
        )
    if not is_ours(config):
        raise ValueError(f"{name} holds no model of hf_vlm, but one of type {model_type!r}.")
    if kernels := sorted(_named_kernels(config)):
        raise ValueError(
            f"{name} names code on the Hub in its configuration, {', '.join(kernels)}, which would be run: remove it."
        )
    return config


def _named_kernels(config: dict[str, Any]) -> Iterator[str]:
    """Repositories of kernels that a configuration names, whose code transformers would download and run."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _named_kernels(value)
        elif key.endswith("_implementation") and isinstance(value, str) and "/" in value:
            yield value


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences transformers' loading report, in which every head weight looks like a fault; ours replaces it."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
