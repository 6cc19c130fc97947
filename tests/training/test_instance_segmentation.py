"""Instance segmentation from a detector's folder to its card, its metrics, its predictions and their pictures."""

import json
import re

import cv2
import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as coco_mask
from PIL import Image
from tiny import build

from hf_vlm.cli.main import main
from hf_vlm.data.sources import open_source
from hf_vlm.deploy.model_card import write_model_card
from hf_vlm.deploy.predict import Predictor
from hf_vlm.models.image_processing_detection import VLMViTDetectionImageProcessor
from hf_vlm.models.modeling_detection import VLMViTForObjectDetection
from hf_vlm.models.modeling_instance_segmentation import VLMViTForInstanceSegmentation
from hf_vlm.registry import find_model
from hf_vlm.training.build import build_model
from hf_vlm.training.recipe import load_recipe, parse_arguments
from hf_vlm.training.run import finetune
from hf_vlm.viz.masks import render_objects
from hf_vlm.viz.sheets import class_color


@pytest.fixture(scope="module")
def runs(make_recipe_in, tmp_path_factory):
    """Folders of a detector of other classes and of an instance segmenter that began with it, and its record."""
    folder = tmp_path_factory.mktemp("runs")
    build("detection").save_pretrained(folder / "detection")
    VLMViTDetectionImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "detection")
    changes = {"encoder": str(folder / "detection"), "model_config": {"mask_feature_size": 16}, "max_steps": 8}
    summary = finetune(make_recipe_in(folder, "instance_segmentation", **changes), write_card=write_model_card)
    return folder / "detection", folder / "instance_segmentation", summary


def test_all_of_a_detector_but_its_class_layers_is_the_start(runs, make_recipe, caplog):
    detector, _, _ = runs
    recipe = make_recipe("instance_segmentation", encoder=str(detector), max_steps=1, learning_rate=0.0)
    recipe["model_config"] = {"mask_feature_size": 8}
    with caplog.at_level("INFO", logger="hf_vlm"):
        finetune(recipe)
    assert re.search(r"missing \(random\) +mask_head\n", caplog.text.partition("Head from")[2])
    model = VLMViTForInstanceSegmentation.from_pretrained(recipe["output_dir"])
    theirs = VLMViTForObjectDetection.from_pretrained(detector).state_dict()
    for name, value in model.state_dict().items():
        if name not in model.class_layers() and not name.startswith("mask_head."):
            assert torch.equal(value, theirs[name]), name
    shipped = load_recipe("instance_segmentation/vit_nano_cpu.yaml", ["--encoder", str(detector)])
    kept = {"num_queries", "mask_feature_size", "mask_point_ratio"}  # all else is of the detector
    assert shipped["model_config"].keys() == kept


def test_an_instance_segmenter_is_the_start_of_a_detector_too(runs):
    _, segmenter, _ = runs
    recipe = load_recipe("detection/vit_nano_cpu.yaml", ["--encoder", str(segmenter)])
    assert recipe["model_config"].keys() == {"num_queries"}
    args = parse_arguments(recipe | {"use_cpu": True})
    model = build_model(args, find_model("detection"), class_names=list("01234"))
    theirs = VLMViTForInstanceSegmentation.from_pretrained(segmenter).state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in model.state_dict().items() if k not in model.class_layers())


def test_finetuning_logs_the_masks_losses_and_leaves_a_card(runs):
    _, folder, summary = runs
    metrics = summary["metrics"]
    assert {"mask_ap", "mask_ap50", "boundary_ap", "box_ap"} <= metrics.keys()
    assert all(0 <= metrics[name] <= 1 for name in ("mask_ap", "boundary_ap", "box_ap"))
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert np.mean(losses[-3:]) < losses[0]
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: image-segmentation" in card
    assert "returns a mask, a box, a class and a score for each" in card
    assert f"| mask AP50 | {metrics['mask_ap50']:.3f} |" in card


def test_commands_evaluate_and_predict(runs, tmp_path, capsys):
    _, folder, summary = runs
    words = ["--data", "scenes:easy", "--split", "validation", "--num_examples", "8"]
    assert main(["evaluate", str(folder), *words, "--save", str(tmp_path / "metrics.json")]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["mask_ap"] == pytest.approx(summary["metrics"]["mask_ap"], rel=1e-5)
    assert "mask_ap/0" in metrics

    (example,) = open_source("scenes:easy", "validation", num_samples=1)
    (tmp_path / "scene.jpg").write_bytes(example["image"]["bytes"])
    (prediction,) = Predictor.from_pretrained(folder, device="cpu").predict(tmp_path / "scene.jpg", 0.0)
    capsys.readouterr()
    picture = str(tmp_path / "out.png")
    assert main(["predict", str(folder), str(tmp_path / "scene.jpg"), "--threshold", "0.0", "--save", picture]) == 0
    found = json.loads(capsys.readouterr().out)["detections"]
    assert len(found) == len(prediction) > 0
    for entry, mask in zip(found, prediction.masks):
        np.testing.assert_array_equal(coco_mask.decode(entry["mask"]), mask)
    assert cv2.imread(picture) is not None


def test_objects_are_tinted_and_outlined_in_the_colours_of_their_classes():
    masks = np.zeros((2, 20, 30), dtype=bool)
    masks[0, 4:12, 5:15], masks[1, 8:18, 10:28] = True, True
    picture = Image.fromarray(np.full((20, 30, 3), 200, dtype=np.uint8))
    found = np.asarray(render_objects(picture, masks, [3, 5])).astype(int)
    first, second = (np.array(class_color(label)) for label in (3, 5))
    assert (found[0, 0] == 200).all()
    assert (found[4, 5:15] == first).all()  # the outline
    assert (found[17, 10:28] == second).all()
    assert (found[8:12, 14] == first).all()  # over the other one
    np.testing.assert_allclose(found[6, 8], 0.55 * 200 + 0.45 * first, atol=0.51)
    both = 0.55 * (0.55 * 200 + 0.45 * second) + 0.45 * first
    np.testing.assert_allclose(found[10, 12], both, atol=0.51)
