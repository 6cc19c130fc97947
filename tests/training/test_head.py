"""A head that was trained for other classes is the start of a new model's."""

import re

import pytest
import torch
from tiny import build, perturb

from hf_vlm.features.loading import find_head
from hf_vlm.models.modeling_classification import VLMViTForImageClassification
from hf_vlm.models.modeling_detection import VLMViTForObjectDetection
from hf_vlm.models.modeling_mask_query_segmentation import VLMViTForMaskQuerySegmentation
from hf_vlm.models.modeling_simmim import SimMIMForPreTraining
from hf_vlm.training.recipe import load_recipe
from hf_vlm.training.run import finetune

SHAPE = ("hidden_size", "intermediate_size", "num_decoder_layers", "neck_num_blocks", "num_cross_attention_heads")


@pytest.fixture(scope="module")
def digits(make_recipe_in, tmp_path_factory):
    """Folder of a detector of ten digits, with a checkpoint."""
    folder = tmp_path_factory.mktemp("digits")
    finetune(make_recipe_in(folder, "detection", max_steps=2, save_strategy="steps", save_steps=2))
    return folder / "detection"


def train_without_a_step(make_recipe, **changes):
    """A new detector of eight symbols as it is before it learns."""
    recipe = make_recipe("detection", data="scenes:symbols", max_steps=1, learning_rate=0.0, **changes)
    if "model_config" not in changes:
        del recipe["model_config"]  # the head brings its shape
    finetune(recipe)
    return VLMViTForObjectDetection.from_pretrained(recipe["output_dir"])


def new_weights(detector, source):
    """Names of a detector's weights that are not those of the one that it started from."""
    theirs = VLMViTForObjectDetection.from_pretrained(source).state_dict()
    return {
        name
        for name, value in detector.state_dict().items()
        if value.shape != theirs[name].shape or not torch.equal(value, theirs[name])
    }


@pytest.mark.parametrize("place", ["", "checkpoint-2"])
def test_a_detector_takes_all_of_another_but_its_class_layers(make_recipe, digits, caplog, place):
    with caplog.at_level("INFO", logger="hf_vlm"):
        detector = train_without_a_step(make_recipe, encoder=str(digits / place))
    assert detector.config.num_labels == 8
    of_classes = {"class_head.weight", "proposal_head.class_head.weight", "dense_head.class_head.weight"}
    assert of_classes <= new_weights(detector, digits) <= detector.class_layers()
    num_weights = sum(not name.startswith("backbone.") for name in detector.state_dict())
    table = [line.split(maxsplit=1) for line in caplog.text.partition("Head from")[2].splitlines()[1:3]]
    assert table[0] == ["loaded", f"{num_weights - len(detector.class_layers())} of {num_weights} weights"]
    assert "class_head, dense_head.class_head, proposal_head.class_head: not taken over" in table[1][1]
    source = VLMViTForObjectDetection.from_pretrained(digits).config
    assert all(getattr(detector.config, name) == getattr(source, name) for name in SHAPE)


def test_the_encoder_alone_on_request(make_recipe, digits):
    wanted = {"hidden_size": 32, "intermediate_size": 32, "neck_num_blocks": 1, "num_decoder_layers": 1}
    wanted |= {"num_self_attention_heads": 4, "num_cross_attention_heads": 4}
    detector = train_without_a_step(make_recipe, encoder=str(digits), load_head=False, model_config=wanted)
    new = new_weights(detector, digits)
    assert {"neck.coarse.merge.0.weight", "box_head.0.weight", "decoder.position.0.weight"} <= new
    assert not any(name.startswith("backbone.") for name in new)


def test_what_a_resized_encoder_reshapes_of_the_head_is_new(make_recipe, digits, caplog):
    encoder = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
    with caplog.at_level("INFO", logger="hf_vlm"):
        detector = train_without_a_step(make_recipe, encoder=str(digits), encoder_config=encoder, resize_encoder=True)
    new = {name for name in new_weights(detector, digits) if not name.startswith("backbone.")}
    assert new - detector.class_layers() == {"neck.coarse.split.0.weight"}  # it reads the encoder's maps
    report = caplog.text.partition("Head from")[2]
    num_loaded, num_weights = map(int, re.search(r"loaded +(\d+) of (\d+) weights", report).groups())
    assert num_loaded == num_weights - 1 - len(detector.class_layers())
    assert re.search(r"other shape \(random\) +neck\.coarse\.split\.0\.weight\n", report)


def test_a_recipe_that_contradicts_the_head_is_refused_where_the_user_typed_it(make_recipe, digits):
    wanted = {"hidden_size": 64, "num_self_attention_heads": 4}
    recipe = make_recipe("detection", encoder=str(digits), model_config=wanted, max_steps=1)
    with pytest.raises(ValueError, match=r"(?s)hidden_size is 32, but model_config asks for 64.*--load_head false"):
        finetune(recipe)
    encoder = ["--encoder", str(digits)]
    shipped = load_recipe("detection/vit_nano_cpu.yaml", encoder)
    assert shipped["model_config"].keys() == {"num_queries"}  # all else is of the head
    alone = load_recipe("detection/vit_nano_cpu.yaml", [*encoder, "--load_head", "false"])
    assert alone["model_config"]["hidden_size"] == 128
    typed = load_recipe("detection/vit_nano_cpu.yaml", [*encoder, "--model_config.hidden_size", "64"])
    assert typed["model_config"]["hidden_size"] == 64


def test_a_head_whose_weights_are_missing_or_not_finite_is_refused(make_recipe, digits, tmp_path):
    model = VLMViTForObjectDetection.from_pretrained(digits)
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("decoder.")}
    model.save_pretrained(tmp_path / "cut", state_dict=weights)
    with pytest.raises(ValueError, match=r"cut lacks \d+ of the head's weights"):
        train_without_a_step(make_recipe, encoder=str(tmp_path / "cut"))
    with torch.no_grad():
        model.neck.coarse.merge[0].weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match=r"broken has weights that are not finite: .*neck"):
        train_without_a_step(make_recipe, encoder=str(tmp_path / "broken"))


def test_heads_that_do_not_fit_are_not_found(digits, tmp_path):
    assert find_head(str(digits), VLMViTForObjectDetection).name == "detection"
    assert find_head(str(digits), VLMViTForImageClassification) is None
    assert find_head(str(digits), SimMIMForPreTraining) is None
    with pytest.raises(ValueError, match=r"holds no model: there is no config\.json"):
        find_head(str(tmp_path), VLMViTForObjectDetection)


@pytest.mark.slow
def test_a_segmenter_takes_the_queries_of_another(make_recipe, tmp_path):
    source = build("mask_query_segmentation")
    perturb(source)
    source.save_pretrained(tmp_path / "source")
    changes = {"encoder": str(tmp_path / "source"), "encoder_config": {}, "model_config": {}, "num_eval_examples": 2}
    recipe = make_recipe("mask_query_segmentation", **changes, max_steps=1, learning_rate=0.0)
    finetune(recipe)
    model = VLMViTForMaskQuerySegmentation.from_pretrained(recipe["output_dir"])
    assert (model.config.num_labels, model.config.num_queries, model.config.num_query_layers) == (6, 5, 1)
    theirs = source.state_dict()
    new = {name for name, value in model.state_dict().items() if not torch.equal(value, theirs[name])}
    assert new <= {*model.class_layers(), "annealing.fractions"}
    assert model.class_layers() <= new
