import pytest
import torch

from hf_vlm.models.image_processing_detection import VLMViTDetectionImageProcessor
from hf_vlm.models.modeling_detection import VLMViTDetectionConfig, VLMViTForObjectDetection

ENCODER = {"image_size": 48, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def detector():
    torch.manual_seed(0)
    config = VLMViTDetectionConfig(
        backbone_config=ENCODER,
        num_labels=5,
        hidden_size=32,
        num_self_attention_heads=4,
        num_cross_attention_heads=4,
        num_queries=9,
    )
    return VLMViTForObjectDetection(config).train()


@pytest.fixture
def processor():
    return VLMViTDetectionImageProcessor(size={"height": 48, "width": 48})
