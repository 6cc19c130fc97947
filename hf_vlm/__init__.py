"""Self-supervised Vision Transformers for your own images. Importing the package registers its Auto classes."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any


def _is_command() -> bool:
    """Whether this process is the command `hf-vlm`, whose parts import what they need: torch takes seconds."""
    program = sys.argv[0] if sys.argv else ""
    return Path(program).stem == "hf-vlm" or (program == "-m" and "hf_vlm.cli" in sys.orig_argv)


if TYPE_CHECKING or not _is_command():
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
    from hf_vlm.registry import MODELS

if TYPE_CHECKING:
    from hf_vlm.training.callbacks import AfterStep

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`AfterStep` when it is asked for: the Trainer takes seconds to import, and not everyone trains."""
    if name != "AfterStep":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hf_vlm.training.callbacks import AfterStep

    return AfterStep


__all__ = [
    "MODELS",
    "AfterStep",
    "DINOv2Config",
    "DINOv2ForPreTraining",
    "DistillConfig",
    "DistillForPreTraining",
    "IJEPAConfig",
    "IJEPAForPreTraining",
    "LeJEPAConfig",
    "LeJEPAForPreTraining",
    "MAEConfig",
    "MAEForPreTraining",
    "MAEImageLossesConfig",
    "MAEImageLossesForPreTraining",
    "MoCoV3Config",
    "MoCoV3ForPreTraining",
    "SimCLRConfig",
    "SimCLRForPreTraining",
    "SimMIMConfig",
    "SimMIMForPreTraining",
    "VLMViTBackbone",
    "VLMViTClassificationConfig",
    "VLMViTClassificationImageProcessor",
    "VLMViTConfig",
    "VLMViTDetectionConfig",
    "VLMViTDetectionImageProcessor",
    "VLMViTForImageClassification",
    "VLMViTForInstanceSegmentation",
    "VLMViTForMaskQuerySegmentation",
    "VLMViTForObjectDetection",
    "VLMViTForSemanticSegmentation",
    "VLMViTImageProcessor",
    "VLMViTInstanceSegmentationConfig",
    "VLMViTInstanceSegmentationImageProcessor",
    "VLMViTMaskQuerySegmentationConfig",
    "VLMViTModel",
    "VLMViTSemanticSegmentationConfig",
    "VLMViTSemanticSegmentationImageProcessor",
]
