"""One visible table of all models. A new method or head is one file in `models/` and one row here.

Importing this module registers every row with transformers' Auto classes and marks its code for upload, so that plain
`save_pretrained` and `push_to_hub` write a folder that loads elsewhere with `trust_remote_code=True`.
"""

import difflib
from dataclasses import dataclass
from typing import Any

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForObjectDetection,
    AutoModelForPreTraining,
)
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_detection import VLMViTDetectionConfig, VLMViTForObjectDetection
from hf_vlm.models.modeling_dinov2 import DINOv2Config, DINOv2ForPreTraining
from hf_vlm.models.modeling_distill import DistillConfig, DistillForPreTraining
from hf_vlm.models.modeling_ijepa import IJEPAConfig, IJEPAForPreTraining
from hf_vlm.models.modeling_lejepa import LeJEPAConfig, LeJEPAForPreTraining
from hf_vlm.models.modeling_mae import MAEConfig, MAEForPreTraining
from hf_vlm.models.modeling_mae_image_losses import MAEImageLossesConfig, MAEImageLossesForPreTraining
from hf_vlm.models.modeling_moco_v3 import MoCoV3Config, MoCoV3ForPreTraining
from hf_vlm.models.modeling_simclr import SimCLRConfig, SimCLRForPreTraining
from hf_vlm.models.modeling_simmim import SimMIMConfig, SimMIMForPreTraining
from hf_vlm.models.modeling_vlm_vit import VLMViTBackbone, VLMViTModel


@dataclass(frozen=True)
class ModelEntry:
    """A row: its name in recipes, what it does, its configuration, its class, and the Auto class that loads it."""

    name: str
    task: str  # "features", "pretraining" or a task name of transformers' pipelines
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    auto_class: Any


MODELS = (
    ModelEntry("encoder", "features", VLMViTConfig, VLMViTModel, AutoModel),
    ModelEntry("backbone", "features", VLMViTConfig, VLMViTBackbone, AutoBackbone),
    ModelEntry("simclr", "pretraining", SimCLRConfig, SimCLRForPreTraining, AutoModelForPreTraining),
    ModelEntry("moco_v3", "pretraining", MoCoV3Config, MoCoV3ForPreTraining, AutoModelForPreTraining),
    ModelEntry("mae", "pretraining", MAEConfig, MAEForPreTraining, AutoModelForPreTraining),
    ModelEntry(
        "mae_image_losses",
        "pretraining",
        MAEImageLossesConfig,
        MAEImageLossesForPreTraining,
        AutoModelForPreTraining,
    ),
    ModelEntry("simmim", "pretraining", SimMIMConfig, SimMIMForPreTraining, AutoModelForPreTraining),
    ModelEntry("lejepa", "pretraining", LeJEPAConfig, LeJEPAForPreTraining, AutoModelForPreTraining),
    ModelEntry("dinov2", "pretraining", DINOv2Config, DINOv2ForPreTraining, AutoModelForPreTraining),
    ModelEntry("ijepa", "pretraining", IJEPAConfig, IJEPAForPreTraining, AutoModelForPreTraining),
    ModelEntry("distill", "pretraining", DistillConfig, DistillForPreTraining, AutoModelForPreTraining),
    ModelEntry(
        "detection", "object-detection", VLMViTDetectionConfig, VLMViTForObjectDetection, AutoModelForObjectDetection
    ),
)


def find_model(name: str, task: str | None = None) -> ModelEntry:
    """The row of a name; ValueError with the nearest name when there is none (of the task, where one is given)."""
    names = [entry.name for entry in MODELS if task in (None, entry.task)]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"There is no {task or 'model'} method {name!r}.{hint} There are: {', '.join(names)}.")
    return next(entry for entry in MODELS if entry.name == name)


def _register() -> None:
    for entry in MODELS:
        AutoConfig.register(entry.config_class.model_type, entry.config_class, exist_ok=True)
        AutoImageProcessor.register(
            entry.config_class, image_processor_classes={"pil": VLMViTImageProcessor}, exist_ok=True
        )
        entry.auto_class.register(entry.config_class, entry.model_class, exist_ok=True)
        if entry.task == "pretraining":  # user code that says AutoModel means the same
            AutoModel.register(entry.config_class, entry.model_class, exist_ok=True)
        entry.config_class.register_for_auto_class()
        entry.model_class.register_for_auto_class(entry.auto_class.__name__)
        if entry.task == "object-detection":  # the pipeline looks a class up here before it says "supported"
            MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES[entry.config_class.model_type] = entry.model_class.__name__
    VLMViTImageProcessor.register_for_auto_class()


_register()

__all__ = ["MODELS", "ModelEntry", "find_model"]
