import pytest

from hf_vlm.models.modeling_detection import VLMViTDetectionConfig, VLMViTForObjectDetection
from hf_vlm.training.optim import layer_index, parameter_groups

ENCODER = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_register_tokens": 1,
    "layerscale_value": 1e-5,
}


@pytest.fixture
def model():
    head = {"hidden_size": 32, "num_self_attention_heads": 4, "num_cross_attention_heads": 4}
    return VLMViTForObjectDetection(VLMViTDetectionConfig(backbone_config=ENCODER, num_labels=2, **head))


def test_each_parameter_has_the_rate_of_its_layer(model):
    groups = parameter_groups(
        model, num_layers=3, learning_rate=1.0, weight_decay=0.1, layer_decay=0.5, encoder_lr_multiplier=0.8
    )
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(found) == sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    expected = {
        "backbone.embeddings.patch_projection.weight": (0.8 * 0.5**3, 0.1),
        "backbone.embeddings.class_token": (0.8 * 0.5**3, 0.0),
        "backbone.embeddings.register_tokens": (0.8 * 0.5**3, 0.0),
        "backbone.embeddings.position_embedding": (0.8 * 0.5**3, 0.0),
        "backbone.layers.0.attention.query.weight": (0.8 * 0.5**2, 0.1),
        "backbone.layers.2.mlp.up_projection.bias": (0.8, 0.0),
        "backbone.layers.2.layer_scale1.gain": (0.8, 0.0),
        "backbone.norm.weight": (0.8, 0.0),
        "class_head.weight": (1.0, 0.1),
    }
    parameters = dict(model.named_parameters())
    for name, values in expected.items():
        assert found[id(parameters[name])] == pytest.approx(values), name


def test_layer_index():
    assert layer_index("backbone.layers.11.norm1.weight", 12) == 12
    assert layer_index("backbone.embeddings.class_token", 12) == 0
    assert layer_index("decoder.layers.1.norm1.weight", 12) == 13


def test_frozen_parameters_are_left_out(model):
    model.backbone.requires_grad_(False)
    groups = parameter_groups(model, num_layers=3, learning_rate=1.0, weight_decay=0.0)
    assert {g["lr"] for g in groups} == {1.0}
