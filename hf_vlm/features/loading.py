"""The one loader of models: from a run, a checkpoint or the Hub, with a check that no weight is missing."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import CONFIG_NAME
from transformers.utils import logging as transformers_logging

from hf_vlm.data.io.durable import PARTIAL_FOLDER
from hf_vlm.features.exported import is_exported, load_exported
from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.convert_families import ALIASES, FAMILIES
from hf_vlm.models.convert_image_processor import load_processor
from hf_vlm.models.convert_vlm_vit import is_ours, load_transformers, read_config
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.model_on_encoder import ModelOnEncoder
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.models.upcycling import upcycle
from hf_vlm.registry import ModelEntry, find_model_type

__all__ = [
    "EncoderSource",
    "LoadedModel",
    "find_encoder",
    "find_head",
    "image_statistics",
    "is_used_whole",
    "load_frozen_encoder",
    "load_model",
    "quiet_transformers",
    "read_own_config",
    "refuse_missing",
    "shared_head_shape",
]

logger = logging.getLogger(__name__)

TRACES_OF_A_RUN = ("checkpoint-*", "log.jsonl", PARTIAL_FOLDER)


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
    """The model in the folder of a run or an export, or under a name on the Hub; of a pretraining model its encoder.

    Raises:
        ValueError: There is none, it is not of this package, or weights are missing.
    """
    if is_exported(source):
        return _load_exported(source)
    if _is_of_transformers(source):
        encoder, processor = load_frozen_encoder(source)
        return LoadedModel(_encoder_entry(), encoder, processor)
    entry = find_model_type(read_own_config(source)["model_type"])
    if entry is None or entry.task_in_use == "pretraining":
        entry = _encoder_entry()
    model, processor = _load(source, entry.model_class, entry.processor_class, what="model")
    return LoadedModel(entry, model, processor)


def _load_exported(source: str | Path) -> LoadedModel:
    entry = find_model_type(read_config(str(source)).get("model_type"))
    if entry is None:
        raise ValueError(f"{source} holds no exported model of hf_vlm.")
    try:
        processor = entry.processor_class.from_pretrained(source)
    except OSError as error:
        raise ValueError(f"{source} holds no image processor: {str(error).splitlines()[0]}") from error
    with quiet_transformers():
        model = cast(PreTrainedModel, load_exported(source).eval())  # it is one to whoever runs or evaluates it
    return LoadedModel(entry, model, processor)


def load_frozen_encoder(source: str | Path) -> tuple[VLMViTModel, VLMViTImageProcessor]:
    """The encoder in a folder or on the Hub, also from a detector or a pretraining model, and its image processor.

    Encoders of transformers, of a family in `FAMILIES`, are converted.

    Raises:
        ValueError: There is none, or weights are missing.
    """
    if _is_of_transformers(source):
        encoder = _convert(str(source))
        return encoder.eval(), load_processor(str(source), encoder.config)[0]
    read_own_config(source)
    return _load(source, VLMViTModel, VLMViTImageProcessor, what="encoder")


def is_used_whole(source: str | Path) -> bool:
    """Whether what is saved is a pretraining model that is of use itself; ValueError where there is none."""
    _refuse_unfinished(Path(source))
    entry = find_model_type(read_config(str(source)).get("model_type"))
    return entry is not None and bool(entry.use)


@dataclass(frozen=True)
class EncoderSource:
    """An encoder to start from, whose configuration is known and whose weights can be loaded."""

    name: str
    config: VLMViTConfig
    converted: VLMViTModel | None = None  # where it is one of transformers

    def load(self, config: VLMViTConfig, *, resize: bool) -> tuple[VLMViTModel, dict[str, Any]]:
        """The encoder of a configuration with these weights, and transformers' report of them.

        Args:
            resize: Whether weights of other shapes are left out.

        A dense encoder of which a sparse one is asked gives its MLPs to the experts.
        """
        if config.num_experts and not self.config.num_experts:
            dense = {**config.to_dict(), "num_experts": 0, "sparse_layers": None}
            encoder, report = self.load(VLMViTConfig(**dense), resize=resize)
            return upcycle(encoder, num_experts=config.num_experts, sparse_layers=config.sparse_layers), report
        options: dict[str, Any] = {"config": config, "ignore_mismatched_sizes": resize, "output_loading_info": True}
        if self.converted is not None:
            options["state_dict"] = self.converted.state_dict()
        with quiet_transformers():
            return VLMViTModel.from_pretrained(self.name if self.converted is None else None, **options)


def find_encoder(source: str) -> EncoderSource:
    """An encoder to start from: in a folder or on the Hub, of ours or of a family of transformers.

    Raises:
        ValueError: There is none.
    """
    if _is_of_transformers(source):
        converted = _convert(source)
        return EncoderSource(source, converted.config, converted)
    read_own_config(source)
    return EncoderSource(source, VLMViTConfig.from_pretrained(source))


def find_head(source: str, model_class: type[PreTrainedModel]) -> ModelEntry | None:
    """The row of the model that an encoder is part of, if `model_class` can take over its head; else None.

    Args:
        source: Folder or Hub id of an encoder, or of a model that has one.
        model_class: The model that is to take the head, which can come from models of this class, of one that derives
            from it, or of one with a head that it derives from.

    Raises:
        ValueError: There is no model.
    """
    if not (issubclass(model_class, ModelOnEncoder) and model_class.head_shape):
        return None
    _refuse_unfinished(Path(source))
    entry = find_model_type(read_config(source).get("model_type"))
    return entry if entry is not None and shared_head_shape(entry.model_class, model_class) else None


def shared_head_shape(first: type[PreTrainedModel], second: type[PreTrainedModel]) -> tuple[str, ...]:
    """Fields of the configuration that the weights depend on which the heads of two models share; empty if none."""
    if not (issubclass(first, second) or issubclass(second, first)):
        return ()
    shapes = [set(getattr(model_class, "head_shape", ())) for model_class in (first, second)]
    return tuple(sorted(set.intersection(*shapes)))


def image_statistics(source: str, num_channels: int) -> dict[str, Any] | None:
    """`image_mean` and `image_std` of an encoder's image processor; None where it has none."""
    try:
        if _is_of_transformers(source):
            processor, _ = load_processor(source, VLMViTConfig(num_channels=num_channels))
        else:
            processor = VLMViTImageProcessor.from_pretrained(source)
    except OSError:  # weights without an image processor
        return None
    return {"image_mean": processor.image_mean, "image_std": processor.image_std}


def _is_of_transformers(source: str | Path) -> bool:
    _refuse_unfinished(Path(source))
    config = read_config(str(source))
    _refuse_kernels(source, config)
    return config.get("model_type") in {**FAMILIES, **ALIASES}


def _convert(source: str) -> VLMViTModel:
    conversion = load_transformers(source)
    rows = ", ".join(f"{name} {text}" for name, text in conversion.rows().items())
    logger.info("%s is an encoder of transformers, converted on the way: %s", source, rows)
    return cast(VLMViTModel, conversion.model)


def _encoder_entry() -> ModelEntry:
    return cast(ModelEntry, find_model_type(VLMViTConfig.model_type))


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
        ValueError: There is none, it is of another package or names code to run, or a folder's weights are missing
            or damaged.
    """
    name = str(source)
    _refuse_unfinished(Path(name))
    config = read_config(name)
    if not is_ours(config):
        raise ValueError(f"{name} holds no model of hf_vlm, but one of type {config.get('model_type')!r}.")
    _refuse_kernels(name, config)
    if Path(name).is_dir():
        _check_weights(Path(name))
    return config


def _refuse_kernels(source: str | Path, config: dict[str, Any]) -> None:
    if kernels := sorted(_named_kernels(config)):
        raise ValueError(
            f"{source} names code on the Hub in its configuration, {', '.join(kernels)}, which would be run: remove it"
        )


def _named_kernels(config: dict[str, Any]) -> Iterator[str]:
    """Repositories of kernels that a configuration names, whose code transformers would download and run."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _named_kernels(value)
        elif key.endswith("_implementation") and isinstance(value, str) and "/" in value:
            yield value


def _refuse_unfinished(folder: Path) -> None:
    """ValueError for the folder of a run that has not ended: its model comes last, and `config.json` last of that."""
    if (folder / CONFIG_NAME).exists() or not any(any(folder.glob(name)) for name in TRACES_OF_A_RUN):
        return
    advice = "finish it with --resume_from_checkpoint last" if any(folder.glob("checkpoint-*")) else "start it again"
    raise ValueError(f"{folder} holds no finished model: its run was stopped before. Name a checkpoint, or {advice}.")


def _check_weights(folder: Path) -> None:
    """ValueError where a folder's weights are not there, or not whole; only their headers are read."""
    paths = sorted(folder.glob("model*.safetensors"))
    if not paths:
        raise ValueError(f"{folder} holds no weights (model.safetensors), only their configuration.")
    for path in paths:
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged: {error}. Copy it again, or train again.") from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences transformers' loading report, in which every head weight looks like a fault; ours replaces it."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
