"""A head that was pretrained, or fine-tuned for other classes, is the start of a new model."""

import pytest
import torch

from hf_vlm.features.loading import find_head
from hf_vlm.models.modeling_classification import VLMViTForImageClassification
from hf_vlm.models.modeling_detection import VLMViTForObjectDetection
from hf_vlm.models.modeling_region_detection import RegionDetectionForPreTraining
from hf_vlm.models.modeling_simmim import SimMIMForPreTraining
from hf_vlm.training.recipe import load_recipe
from hf_vlm.training.run import finetune, pretrain

SHAPE = ("hidden_size", "intermediate_size", "num_decoder_layers", "neck_num_blocks", "num_cross_attention_heads")


@pytest.fixture(scope="module")
def pretrained(make_recipe_in, tmp_path_factory):
    """Folder of a run of pretraining that trained a head too, with a checkpoint."""
    folder = tmp_path_factory.mktemp("pretrained")
    pretrain(make_recipe_in(folder, "region_detection", max_steps=2, save_strategy="steps", save_steps=1))
    return folder / "region_detection"


def same_and_new(detector, source):
    """Names of a detector's weights that equal a source's, and of those that do not."""
    weights, theirs = detector.state_dict(), source.state_dict()
    same = {name for name, value in weights.items() if name in theirs and torch.equal(value, theirs[name])}
    return same, weights.keys() - same


@pytest.mark.parametrize("place", ["", "pretraining_model", "checkpoint-2"])
def test_a_detector_starts_from_all_that_was_pretrained_but_its_class_layers(make_recipe, pretrained, caplog, place):
    recipe = make_recipe("detection", encoder=str(pretrained / place), max_steps=1, learning_rate=0.0)
    del recipe["model_config"]  # the head brings its shape
    with caplog.at_level("INFO", logger="hf_vlm"):
        finetune(recipe)
    detector = VLMViTForObjectDetection.from_pretrained(recipe["output_dir"])
    source = RegionDetectionForPreTraining.from_pretrained(pretrained / "pretraining_model")
    same, new = same_and_new(detector, source)
    assert new == detector.class_layers()
    assert {name.split(".")[0] for name in same} >= {"backbone", "neck", "proposal_head", "decoder", "box_head"}
    assert "its class layers are new" in caplog.text
    assert all(getattr(detector.config, name) == getattr(source.config, name) for name in SHAPE)


def test_the_encoder_alone_on_request(make_recipe, pretrained):
    recipe = make_recipe("detection", encoder=str(pretrained), load_head=False, max_steps=1, learning_rate=0.0)
    finetune(recipe)
    detector = VLMViTForObjectDetection.from_pretrained(recipe["output_dir"])
    same, new = same_and_new(detector, RegionDetectionForPreTraining.from_pretrained(pretrained / "pretraining_model"))
    assert any(name.startswith("backbone.") for name in same)
    assert {"neck.coarse.split.0.weight", "box_head.0.weight", "decoder.position.0.weight"} <= new


def test_a_detector_of_other_classes_gives_its_head(make_recipe, tmp_path):
    finetune(make_recipe("detection", output_dir=str(tmp_path / "digits"), max_steps=2))
    recipe = make_recipe(
        "detection", encoder=str(tmp_path / "digits"), data="scenes:symbols", max_steps=1, learning_rate=0.0
    )
    finetune(recipe)
    detector = VLMViTForObjectDetection.from_pretrained(recipe["output_dir"])
    _, new = same_and_new(detector, VLMViTForObjectDetection.from_pretrained(tmp_path / "digits"))
    assert detector.config.num_labels == 8
    assert new <= detector.class_layers()


def test_a_recipe_that_contradicts_the_head_is_refused_where_the_user_typed_it(make_recipe, pretrained):
    wanted = {"hidden_size": 64, "num_self_attention_heads": 4}
    recipe = make_recipe("detection", encoder=str(pretrained), model_config=wanted, max_steps=1)
    with pytest.raises(ValueError, match=r"(?s)hidden_size is 32, but model_config asks for 64.*--load_head false"):
        finetune(recipe)
    shipped = load_recipe("detection/vit_nano_cpu.yaml", ["--encoder", str(pretrained)])
    assert shipped["model_config"].keys() == {"num_queries"}  # all else is of the head
    alone = load_recipe("detection/vit_nano_cpu.yaml", ["--encoder", str(pretrained), "--load_head", "false"])
    assert alone["model_config"]["hidden_size"] == 128
    typed = load_recipe(
        "detection/vit_nano_cpu.yaml", ["--encoder", str(pretrained), "--model_config.hidden_size", "64"]
    )
    assert typed["model_config"]["hidden_size"] == 64


def test_a_head_whose_weights_are_missing_or_not_finite_is_refused(make_recipe, pretrained, tmp_path):
    model = RegionDetectionForPreTraining.from_pretrained(pretrained / "pretraining_model")
    with torch.no_grad():
        model.neck.coarse.merge[0].weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match=r"broken has weights that are not finite: .*neck"):
        finetune(make_recipe("detection", encoder=str(tmp_path / "broken"), max_steps=1))
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("decoder.")}
    model.save_pretrained(tmp_path / "cut", state_dict=weights)
    with pytest.raises(ValueError, match=r"cut lacks \d+ of the head's weights"):
        finetune(make_recipe("detection", encoder=str(tmp_path / "cut"), max_steps=1))


def test_heads_that_do_not_fit_are_not_found(pretrained, tmp_path):
    assert find_head(str(pretrained), VLMViTForImageClassification) is None
    assert find_head(str(pretrained), SimMIMForPreTraining) is None
    assert find_head(str(tmp_path), VLMViTForObjectDetection) is None
