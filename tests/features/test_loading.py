"""Every way to an encoder gives the one that a method has trained for use: for some methods, the teacher's."""

import json

import pytest
import torch
from tiny import build, perturb

from hf_vlm.features.loading import load_frozen_encoder, load_model
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_vlm_vit import VLMViTBackbone, VLMViTModel
from hf_vlm.models.ssl_frozen import load_encoder as load_teacher
from hf_vlm.models.ssl_frozen import read_encoder
from hf_vlm.training.arguments import VisionTrainingArguments
from hf_vlm.training.build import load_encoder

LOADERS = {
    "embed": lambda folder: load_frozen_encoder(folder)[0],
    "evaluate": lambda folder: load_model(folder).model,
    "distillation": lambda folder: load_teacher(str(folder), read_encoder(str(folder))[0], None, torch.float32),
    "the class": VLMViTModel.from_pretrained,
    "the backbone's class": VLMViTBackbone.from_pretrained,
}


def from_encoder_option(folder):
    args = VisionTrainingArguments(
        output_dir=str(folder / "run"),
        use_cpu=True,
        max_steps=1,
        image_size=32,
        encoder=str(folder),
    )
    return load_encoder(args)


@pytest.mark.parametrize("name", ["ijepa", "dinov2", "moco_v3"])
def test_every_loader_takes_the_trained_encoder_of_a_checkpoint(name, tmp_path):
    model = build(name)
    perturb(model)
    model.save_pretrained(tmp_path)
    VLMViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    expected = model.trained_encoder.state_dict()
    assert not torch.equal(model.teacher["backbone"].norm.weight, model.backbone.norm.weight)
    found = {loader: load(tmp_path) for loader, load in LOADERS.items()}
    found["--encoder"] = from_encoder_option(tmp_path)
    for loader, encoder in found.items():
        assert encoder.state_dict().keys() == expected.keys(), loader
        assert all(torch.equal(value, expected[key]) for key, value in encoder.state_dict().items()), loader


def test_a_checkpoint_of_version_0_1_does_not_name_its_trained_encoder(tmp_path):
    model = build("ijepa")
    perturb(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("trained_encoder") == "teacher.backbone"
    (tmp_path / "config.json").write_text(json.dumps(config))
    encoder = VLMViTModel.from_pretrained(tmp_path)
    assert torch.equal(encoder.norm.weight, model.teacher["backbone"].norm.weight)
