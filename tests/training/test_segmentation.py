"""A segmenter from its recipe to its card, its metrics, its predictions and their pictures."""

import json

import cv2
import numpy as np
import pytest

from hf_vlm.cli.main import main
from hf_vlm.data.sources import open_source
from hf_vlm.deploy.model_card import write_model_card
from hf_vlm.deploy.predict import Predictor
from hf_vlm.training.run import finetune
from hf_vlm.viz.sheets import class_color

NAMES = ["background", *"01234"]


@pytest.fixture(scope="module")
def run(make_recipe_in, tmp_path_factory):
    """The folder of a segmenter that has learned what is background, and the content of its `run.json`."""
    folder = tmp_path_factory.mktemp("runs")
    changes = {"max_steps": 32, "learning_rate": 1e-2, "image_size": 32, "augmentation": {"crop_scale": [0.5, 1.0]}}
    changes["processor_config"] = {"inference": "slide"}
    summary = finetune(make_recipe_in(folder, "semantic_segmentation", **changes), write_card=write_model_card)
    return folder / "semantic_segmentation", summary


def read_rgb(path):
    return cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)


def test_finetuning_learns_and_leaves_a_card(run):
    folder, summary = run
    metrics = summary["metrics"]
    assert metrics["pixel_accuracy"] > 0.6
    assert 0 < metrics["miou"] <= metrics["mean_accuracy"] < 1
    assert json.loads((folder / "preprocessor_config.json").read_text())["inference"] == "slide"
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert np.mean(losses[-3:]) < 0.8 * losses[0]
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: image-segmentation" in card
    assert "gives each pixel of an image one of 6 classes" in card
    assert f"| mIoU (mean intersection over union of the classes) | {metrics['miou']:.3f} |" in card


@pytest.mark.parametrize(
    ("method", "fields", "words"),
    [
        ("semantic_segmentation", {"inference": "tile"}, "inference is 'tile'"),
        (
            "semantic_segmentation",
            {"size": 64},
            "'size' is no field .* do_pad, image_mean, image_std, inference; its size",
        ),
        ("classification", {"do_pad": True}, "'do_pad' is no field of VLMViTClassificationImageProcessor"),
        ("classification", {"inference": "slide"}, "'inference' is no field of VLMViTClassificationImageProcessor"),
    ],
)
def test_image_processors_are_given_what_training_follows(make_recipe, method, fields, words):
    with pytest.raises(ValueError, match=words):
        finetune(make_recipe(method, processor_config=fields))


def test_commands_evaluate_and_plot_and_draw(run, tmp_path, capsys):
    folder, summary = run
    plot, saved = tmp_path / "confusion.png", tmp_path / "metrics.json"
    words = ["--data", "scenes:easy", "--split", "validation", "--num_examples", "8", "--save", str(saved)]
    assert main(["evaluate", str(folder), *words, "--plot", str(plot)]) == 0
    metrics = json.loads(saved.read_text())
    assert {name: metrics[name] for name in summary["metrics"] if "/" not in name} == pytest.approx(
        {name: value for name, value in summary["metrics"].items() if "/" not in name and "_per_" not in name},
        rel=1e-5,  # saved with six digits
    )
    assert "iou/background" in metrics
    assert cv2.imread(str(plot)).shape[1] > 400

    (example,) = open_source("scenes:easy", "validation", num_samples=1)
    (tmp_path / "scene.jpg").write_bytes(example["image"]["bytes"])
    capsys.readouterr()
    assert main(["predict", str(folder), str(tmp_path / "scene.jpg"), "--save", str(tmp_path / "out.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(entry["fraction"] for entry in found["classes"]) == pytest.approx(1)
    assert found["classes"][0]["label"] == "background"
    (prediction,) = Predictor.from_pretrained(folder, device="cpu").predict(tmp_path / "scene.jpg")
    assert prediction.segmentation.shape == prediction.image_size == (found["height"], found["width"])
    shares = np.bincount(prediction.segmentation.ravel(), minlength=6) / prediction.segmentation.size
    assert {e["label"]: e["fraction"] for e in found["classes"]} == pytest.approx(
        {name: share for name, share in zip(NAMES, shares) if share},
        abs=5e-7,  # printed with six decimals
    )
    picture, plain = (read_rgb(tmp_path / name) for name in ("out.png", "scene.jpg"))
    image = np.asarray(prediction.draw(scale=1))[: found["height"]]
    colors = np.array([class_color(label) for label in range(6)])[prediction.segmentation]
    np.testing.assert_allclose(image, 0.55 * plain + 0.45 * colors, atol=0.51)
    assert (picture == class_color(0)).all(axis=2).sum() > 50  # in the legend
