"""The table of all models. A new method or head is one file in `models/` and one row here.

Importing this module registers every row with transformers' Auto classes and marks its code for upload, so that plain
`save_pretrained` and `push_to_hub` write a folder that loads elsewhere with `trust_remote_code=True`.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageSegmentation,
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
    AutoModelForPreTraining,
    AutoModelForSemanticSegmentation,
    AutoModelForZeroShotImageClassification,
)
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.image_processing_classification import VLMViTClassificationImageProcessor
from hf_vlm.models.image_processing_detection import VLMViTDetectionImageProcessor
from hf_vlm.models.image_processing_instance_segmentation import VLMViTInstanceSegmentationImageProcessor
from hf_vlm.models.image_processing_semantic_segmentation import VLMViTSemanticSegmentationImageProcessor
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_classification import VLMViTClassificationConfig, VLMViTForImageClassification
from hf_vlm.models.modeling_detection import VLMViTDetectionConfig, VLMViTForObjectDetection
from hf_vlm.models.modeling_dinov2 import DINOv2Config, DINOv2ForPreTraining
from hf_vlm.models.modeling_distill import DistillConfig, DistillForPreTraining
from hf_vlm.models.modeling_ijepa import IJEPAConfig, IJEPAForPreTraining
from hf_vlm.models.modeling_image_text import ImageTextConfig, ImageTextForPreTraining
from hf_vlm.models.modeling_instance_segmentation import (
    VLMViTForInstanceSegmentation,
    VLMViTInstanceSegmentationConfig,
)
from hf_vlm.models.modeling_lejepa import LeJEPAConfig, LeJEPAForPreTraining
from hf_vlm.models.modeling_mae import MAEConfig, MAEForPreTraining
from hf_vlm.models.modeling_mae_image_losses import MAEImageLossesConfig, MAEImageLossesForPreTraining
from hf_vlm.models.modeling_mask_query_segmentation import (
    VLMViTForMaskQuerySegmentation,
    VLMViTMaskQuerySegmentationConfig,
)
from hf_vlm.models.modeling_moco_v3 import MoCoV3Config, MoCoV3ForPreTraining
from hf_vlm.models.modeling_semantic_segmentation import (
    VLMViTForSemanticSegmentation,
    VLMViTSemanticSegmentationConfig,
)
from hf_vlm.models.modeling_simclr import SimCLRConfig, SimCLRForPreTraining
from hf_vlm.models.modeling_simmim import SimMIMConfig, SimMIMForPreTraining
from hf_vlm.models.modeling_vlm_vit import VLMViTBackbone, VLMViTModel
from hf_vlm.models.nearest_name import did_you_mean


@dataclass(frozen=True)
class ModelEntry:
    """A row: name in recipes, task, configuration and model class, Auto class and image processor."""

    name: str
    task: str  # "pretraining", or a task of `hf_vlm.tasks`
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    auto_class: Any
    processor_class: type[VLMViTImageProcessor] = VLMViTImageProcessor
    pipeline_class: Any = None  # Auto class by which transformers' pipeline loads it, where that is another
    use: str = ""  # task of a pretraining model that is of use itself, not only for its encoder

    @property
    def task_in_use(self) -> str:
        """The task that the commands know a saved model by."""
        return self.use or self.task


MODELS = (
    ModelEntry("encoder", "image-feature-extraction", VLMViTConfig, VLMViTModel, AutoModel),
    ModelEntry("backbone", "image-feature-extraction", VLMViTConfig, VLMViTBackbone, AutoBackbone),
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
        "image_text",
        "pretraining",
        ImageTextConfig,
        ImageTextForPreTraining,
        AutoModelForPreTraining,
        pipeline_class=AutoModelForZeroShotImageClassification,
        use="zero-shot-image-classification",
    ),
    ModelEntry(
        "detection",
        "object-detection",
        VLMViTDetectionConfig,
        VLMViTForObjectDetection,
        AutoModelForObjectDetection,
        VLMViTDetectionImageProcessor,
    ),
    ModelEntry(
        "instance_segmentation",
        "instance-segmentation",
        VLMViTInstanceSegmentationConfig,
        VLMViTForInstanceSegmentation,
        AutoModelForInstanceSegmentation,
        VLMViTInstanceSegmentationImageProcessor,
        AutoModelForImageSegmentation,
    ),
    ModelEntry(
        "classification",
        "image-classification",
        VLMViTClassificationConfig,
        VLMViTForImageClassification,
        AutoModelForImageClassification,
        VLMViTClassificationImageProcessor,
    ),
    ModelEntry(
        "semantic_segmentation",
        "semantic-segmentation",
        VLMViTSemanticSegmentationConfig,
        VLMViTForSemanticSegmentation,
        AutoModelForSemanticSegmentation,
        VLMViTSemanticSegmentationImageProcessor,
    ),
    ModelEntry(
        "mask_query_segmentation",
        "semantic-segmentation",
        VLMViTMaskQuerySegmentationConfig,
        VLMViTForMaskQuerySegmentation,
        AutoModelForSemanticSegmentation,
        VLMViTSemanticSegmentationImageProcessor,
    ),
)
HEADS = (
    AutoModelForObjectDetection,
    AutoModelForInstanceSegmentation,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
)


def find_model(name: str, tasks: Collection[str] | None = None) -> ModelEntry:
    """The row of a name, among those of `tasks` if given; ValueError with the nearest name when there is none."""
    names = [entry.name for entry in MODELS if tasks is None or entry.task in tasks]
    if name not in names:
        what = " or ".join(tasks) if tasks else "model"
        near = did_you_mean(name, names) or "."
        raise ValueError(f"There is no {what} method {name!r}{near} There are: {', '.join(names)}.")
    return next(entry for entry in MODELS if entry.name == name)


def find_model_type(model_type: str | None) -> ModelEntry | None:
    """The row of a checkpoint's `model_type`; None for models of other packages."""
    return next((entry for entry in MODELS if entry.config_class.model_type == model_type), None)


def _register() -> None:
    for entry in MODELS:
        model_type = entry.config_class.model_type
        AutoConfig.register(model_type, entry.config_class, exist_ok=True)
        AutoImageProcessor.register(
            entry.config_class, image_processor_classes={"pil": entry.processor_class}, exist_ok=True
        )
        entry.auto_class.register(entry.config_class, entry.model_class, exist_ok=True)
        if entry.pipeline_class is not None:
            entry.pipeline_class.register(entry.config_class, entry.model_class, exist_ok=True)
        if entry.config_class is not VLMViTConfig:  # user code may call AutoModel as well
            AutoModel.register(entry.config_class, entry.model_class, exist_ok=True)
        entry.config_class.register_for_auto_class()
        entry.model_class.register_for_auto_class(entry.auto_class.__name__)
        entry.processor_class.register_for_auto_class()
        # Pipelines look a class up here before they accept it as supported.
        entry.auto_class._model_mapping._model_mapping[model_type] = entry.model_class.__name__
    _register_wrong_calls()


def _register_wrong_calls() -> None:
    """Lets a head's Auto class hand other models of ours to the head's class, which says what to call instead."""
    for entry in MODELS:
        if entry.auto_class in HEADS:
            for other in MODELS:
                if other.config_class not in entry.auto_class._model_mapping:
                    entry.auto_class._model_mapping.register(other.config_class, entry.model_class)


_register()
# Folders of detectors of version 0.1 name the encoder's image processor, which turned boxes to pixels then.
VLMViTImageProcessor.post_process_object_detection = (  # type: ignore[attr-defined]
    VLMViTDetectionImageProcessor.post_process_object_detection
)

__all__ = ["MODELS", "ModelEntry", "find_model", "find_model_type"]
