"""Heads on trained encoders by one call, and one sentence for the calls that would build something else."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import DETECTION, build, perturb
from transformers import (
    AutoModelForImageClassification,
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    ViTConfig,
)

from hf_vlm import (
    DINOv2ForPreTraining,
    VLMViTForImageClassification,
    VLMViTForInstanceSegmentation,
    VLMViTForMaskQuerySegmentation,
    VLMViTForObjectDetection,
    VLMViTForSemanticSegmentation,
)
from hf_vlm.models.modeling_vlm_vit import VLMViTModel

HEADS = {
    VLMViTForImageClassification: AutoModelForImageClassification,
    VLMViTForObjectDetection: AutoModelForObjectDetection,
    VLMViTForInstanceSegmentation: AutoModelForInstanceSegmentation,
    VLMViTForSemanticSegmentation: AutoModelForSemanticSegmentation,
    VLMViTForMaskQuerySegmentation: AutoModelForSemanticSegmentation,
}
FIELDS = {
    VLMViTForImageClassification: {},
    VLMViTForObjectDetection: {**DETECTION, "hidden_size": 64},
    VLMViTForInstanceSegmentation: {**DETECTION, "mask_feature_size": 8},
    VLMViTForSemanticSegmentation: {"num_feature_layers": 2, "freeze_encoder": True},
    VLMViTForMaskQuerySegmentation: {"num_query_layers": 1, "num_queries": 5},
}
for fields in FIELDS.values():
    fields.pop("id2label", None)
NAMES = {0: "cat", 1: "dog", 2: "bird"}


@pytest.fixture(params=["encoder", "ijepa", "classification", "detection"])
def saved(request, tmp_path):
    """A folder of a model, and the encoder for use in it."""
    model = build(request.param)
    perturb(model)
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved", getattr(model, "trained_encoder", getattr(model, "backbone", model))


@pytest.mark.parametrize("head", HEADS)
def test_a_head_is_built_on_the_encoder_of_any_model(head, saved, tmp_path):
    folder, encoder = saved
    torch.manual_seed(0)
    model = head.from_encoder(folder, id2label=NAMES, **FIELDS[head])
    assert not model.training
    assert (model.config.num_labels, model.config.id2label) == (3, NAMES)
    assert model.config.label2id == {"cat": 0, "dog": 1, "bird": 2}
    assert {name: getattr(model.config, name) for name in FIELDS[head]} == FIELDS[head]  # none of the encoder's
    for name, value in encoder.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], value), name
    torch.manual_seed(0)
    fresh = head(model.config)
    for name, value in fresh.state_dict().items():  # the rest is as a new model has it
        assert name.startswith("backbone.") or torch.equal(model.state_dict()[name], value), name
    model.save_pretrained(tmp_path / "head")
    loaded = HEADS[head].from_pretrained(tmp_path / "head")
    assert type(loaded) is head
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "prefix"), [("encoder", ""), ("detection", "backbone."), ("ijepa", "teacher.backbone.")]
)
def test_only_weights_that_no_part_of_a_model_explains_are_reported(name, prefix, tmp_path):
    build(name).save_pretrained(tmp_path)
    _, report = VLMViTModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"]  # of heads, predictors and students
    weights = load_file(tmp_path / "model.safetensors") | {f"{prefix}layers.9.gain": torch.ones(2)}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    _, report = VLMViTModel.from_pretrained(tmp_path, output_loading_info=True)
    assert [key.removeprefix("backbone.") for key in report["unexpected_keys"]] == ["layers.9.gain"]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["encoder", "ijepa", "mae"])
def test_wrong_calls_say_what_to_call(head, name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    first = next(other for other, auto_class in HEADS.items() if auto_class is HEADS[head])  # of two for one task
    for named, load, build_new in (
        (head, head.from_pretrained, head),
        (first, HEADS[head].from_pretrained, HEADS[head].from_config),
    ):
        wanted = rf"is of type '{model.config.model_type}', not of a {named.__name__}. For a new one on its encoder "
        for fields in ({}, {"num_labels": 3}):
            with pytest.raises(ValueError, match=wanted + rf"call {named.__name__}.from_encoder\('{tmp_path}', ...\)"):
                load(tmp_path, **fields)
        with pytest.raises(ValueError, match=wanted):
            build_new(model.config)


def test_a_configuration_does_not_make_a_students_encoder_one_for_use(tmp_path):
    config = VLMViTForImageClassification.from_encoder(_save(build("mae"), tmp_path / "mae")).config
    VLMViTForImageClassification.from_pretrained(tmp_path / "mae", config=config)  # its only encoder
    with pytest.raises(ValueError, match=r"is of type 'vlm_ijepa', not of a .*from_encoder\('"):
        VLMViTForImageClassification.from_pretrained(_save(build("ijepa"), tmp_path / "ijepa"), config=config)


def _save(model, folder):
    model.save_pretrained(folder)
    return folder


def test_heads_and_methods_are_not_taken_for_each_other(tmp_path):
    build("classification").save_pretrained(tmp_path)
    for call in (VLMViTForObjectDetection.from_pretrained, AutoModelForObjectDetection.from_pretrained):
        with pytest.raises(ValueError, match="is of type 'vlm_vit_classification', not of a VLMViTForObjectDetection"):
            call(tmp_path)
    with pytest.raises(ValueError, match=r"not of a DINOv2ForPreTraining.*DINOv2ForPreTraining.from_encoder"):
        DINOv2ForPreTraining.from_pretrained(tmp_path)


def test_a_method_on_an_encoder_has_its_teacher_from_it(saved):
    folder, encoder = saved
    method = DINOv2ForPreTraining.from_encoder(folder, num_prototypes=16, head_hidden_size=32, bottleneck_size=16)
    for part in (method.backbone, method.teacher["backbone"]):
        assert all(torch.equal(part.state_dict()[name], value) for name, value in encoder.state_dict().items())


def test_what_is_no_encoder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"VLMViTDetectionConfig has no field 'nun_labels'"):
        VLMViTForObjectDetection.from_encoder(tmp_path, nun_labels=3)
    with pytest.raises(ValueError, match=r"holds no encoder of hf_vlm: there is no config.json"):
        VLMViTForObjectDetection.from_encoder(tmp_path)
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"its type is 'vit'. Encoders of transformers are converted by"):
        VLMViTForObjectDetection.from_encoder(tmp_path)
    encoder = build("encoder")
    weights = {name: value for name, value in encoder.state_dict().items() if name != "norm.weight"}
    encoder.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"lacks 1 of an encoder's weights, such as norm.weight"):
        VLMViTForObjectDetection.from_encoder(tmp_path)
