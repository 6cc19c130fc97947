"""Each row of the registry: saved with its code, loaded by a process that cannot import the package."""

import inspect
import json

import pytest
import torch

from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.models.ssl_masks import context_and_targets
from hf_vlm.registry import MODELS, find_model

BACKBONE = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "layerscale_value": 1e-5,
    "num_register_tokens": 1,
}
FIELDS = {
    "encoder": BACKBONE,
    "backbone": BACKBONE,
    "simclr": {"backbone_config": BACKBONE, "projection_hidden_size": 32},
    "moco_v3": {"backbone_config": BACKBONE, "projection_hidden_size": 32, "projection_size": 8},
    "mae": {
        "backbone_config": BACKBONE,
        "decoder_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        "perceptual_weight": 1.0,  # by its own encoder
        "adversarial_weight": 0.1,
        "adversarial_start": 0.0,
    },
    "simmim": {"backbone_config": BACKBONE, "mask_unit_size": 16},
    "lejepa": {"backbone_config": BACKBONE, "projection_hidden_size": 32, "num_slices": 16},
    "dinov2": {"backbone_config": BACKBONE, "num_prototypes": 16, "head_hidden_size": 32, "bottleneck_size": 16},
    "distill": {"backbone_config": BACKBONE},
    "ijepa": {
        "backbone_config": BACKBONE,
        "predictor_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    },
    "detection": {
        "backbone_config": BACKBONE,
        "hidden_size": 32,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
        "id2label": {0: "cat", 1: "dog"},
    },
}
PRINT_OUTPUT = """
import json, torch, transformers
report, models = {}, json.loads(MODELS)
for name, (auto_class, folder) in models.items():
    loader = getattr(transformers, auto_class)
    if auto_class == "AutoBackbone":  # its from_pretrained asks the Hub even for a folder
        from transformers.dynamic_module_utils import get_class_from_dynamic_module
        loader = get_class_from_dynamic_module("modeling_vlm_vit.VLMViTBackbone", folder)
        model = loader.from_pretrained(folder).eval()
    else:
        model = loader.from_pretrained(folder, trust_remote_code=True).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    batch = torch.load(f"{folder}/batch.pt")
    report[name] = [type(model).__name__, type(processor).__name__, processor.size["height"], checksum(model(**batch))]
print(json.dumps(report))
"""


def checksum(output):
    values = output.to_tuple()
    first = values[0] if not isinstance(values[0], tuple) else values[0][0]
    return first.double().abs().sum().item()


def fields_of(name, folder):
    """The fields of a row; one that is taught by an encoder gets one of its own, saved beside it."""
    if name != "distill":
        return FIELDS[name]
    VLMViTModel(VLMViTConfig(**BACKBONE)).save_pretrained(folder / "teacher")
    VLMViTImageProcessor().save_pretrained(folder / "teacher")
    return FIELDS[name] | {"teacher": str(folder / "teacher")}


def batch_of(name):
    if name in ("simclr", "moco_v3", "dinov2", "lejepa"):
        fixed = {"dinov2": {"masked": torch.rand(6, 16) < 0.3}, "lejepa": {"slices": torch.randn(64, 16)}}
        return {"pixel_values": torch.randn(3, 2, 3, 32, 32), **fixed.get(name, {})}
    images = {"pixel_values": torch.randn(2, 3, 32, 32)}
    if name == "ijepa":
        context, targets = context_and_targets(2, (4, 4))
        return images | {"context_indices": context, "target_indices": targets}
    num_units = {"mae": 16, "simmim": 4}.get(name)
    return images | ({"noise": torch.rand(2, num_units)} if num_units else {})


def test_every_row_loads_where_the_package_is_not_installed(tmp_path, run_process):
    torch.manual_seed(0)
    models, expected = {}, {}
    for entry in MODELS:
        model = entry.model_class(entry.config_class(**fields_of(entry.name, tmp_path))).eval()
        folder, batch = tmp_path / entry.name, batch_of(entry.name)
        model.save_pretrained(folder)
        VLMViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
        torch.save(batch, folder / "batch.pt")
        with torch.no_grad():
            value = checksum(model(**batch))
        models[entry.name] = (entry.auto_class.__name__, str(folder))
        expected[entry.name] = [entry.model_class.__name__, "VLMViTImageProcessor", 32, pytest.approx(value)]
    code = f"MODELS = {json.dumps(json.dumps(models))}\n{inspect.getsource(checksum)}\n{PRINT_OUTPUT}"
    printed = run_process(code, tmp_path, forbid_hf_vlm=True, HF_HUB_OFFLINE="1")
    assert json.loads(printed.splitlines()[-1]) == expected


def test_an_encoder_is_read_out_of_every_pretraining_model(tmp_path):
    encoder_class = find_model("encoder").model_class
    for entry in MODELS:
        if entry.task == "pretraining":
            model = entry.model_class(entry.config_class(**fields_of(entry.name, tmp_path)))
            model.save_pretrained(tmp_path / entry.name)
            encoder = encoder_class.from_pretrained(tmp_path / entry.name)
            for name, weight in encoder.state_dict().items():
                assert torch.equal(weight, model.backbone.state_dict()[name]), (entry.name, name)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'simclr'"):
        find_model("simcrl")
    with pytest.raises(ValueError, match="no pretraining method 'encoder'"):
        find_model("encoder", ["pretraining"])
