"""`hf-vlm evaluate` writes its report and calibrates the model that it evaluates."""

import json

import pytest
import torch
from PIL import Image

from hf_vlm.cli.main import main
from hf_vlm.data.sources import open_source
from hf_vlm.models.image_processing_classification import VLMViTClassificationImageProcessor
from hf_vlm.models.modeling_classification import VLMViTClassificationConfig, VLMViTForImageClassification

ENCODER = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def classifier(tmp_path):
    """The folder of a random classifier, too sure of what it predicts, and images of its two classes."""
    torch.manual_seed(0)
    model = VLMViTForImageClassification(
        VLMViTClassificationConfig(backbone_config=ENCODER, id2label={0: "a", 1: "b"})
    )
    model.classifier.weight.data *= 100
    model.save_pretrained(tmp_path / "run")
    VLMViTClassificationImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "run")
    for index in range(14):
        folder = tmp_path / "images" / "test" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (index * 18, 0, 255 * (index % 3 == 0))).save(folder / f"{index}.png")
    return tmp_path / "run"


def test_a_report_and_a_temperature(classifier, tmp_path, capsys):
    words = ["evaluate", str(classifier), "--data", str(tmp_path / "images")]
    assert main([*words, "--report", str(tmp_path / "new" / "report"), "--calibrate"]) == 0
    printed = capsys.readouterr().out
    temperature = json.loads((classifier / "config.json").read_text())["temperature"]
    assert temperature > 2
    assert f"temperature {temperature}" in printed
    assert str(temperature) in (classifier / "README.md").read_text()
    page = (tmp_path / "new" / "report" / "report.html").read_text()
    assert "Likely label errors" in page
    assert ".png" in page
    before = json.loads((tmp_path / "new" / "report" / "report.json").read_text())["metrics"]
    capsys.readouterr()
    assert main([*words, "--save", str(tmp_path / "metrics.json")]) == 0
    after = json.loads((tmp_path / "metrics.json").read_text())
    assert after["ece"] == pytest.approx(before["ece_calibrated"], abs=1e-3)
    assert after["top1"] == before["top1"]


def test_images_that_were_held_out(classifier, tmp_path, capsys, caplog):
    (tmp_path / "images" / "test").rename(tmp_path / "images" / "train")
    words = ["evaluate", str(classifier), "--data", str(tmp_path / "images")]
    assert main(words) == 2
    assert "has no split 'test'; it has train. Name one with --split, or evaluate" in capsys.readouterr().err
    assert main([*words, "--holdout", "0.4", "--report", str(tmp_path / "report")]) == 0
    num_images = open_source(tmp_path / "images").holdout(0.4)[1].num_examples
    title = capsys.readouterr().out.splitlines()[0]
    assert title == f"{tmp_path / 'images'}, split train, the held-out 0.4 of it: {num_images} images"
    facts = json.loads((tmp_path / "report" / "report.json").read_text())
    assert (facts["split"], facts["images"]) == ("train, the held-out 0.4 of it", str(num_images))
    assert "The run has held out" not in caplog.text
    (classifier / "recipe.yaml").write_text("holdout: 0.1\n")
    assert main(words) == 2
    assert "held out with --holdout 0.1." in capsys.readouterr().err
    assert main([*words, "--holdout", "0.4"]) == 0
    assert "The run has held out 0.1 of its images, not 0.4" in caplog.text
    assert main([*words, "--holdout", "4"]) == 2
    assert "holdout=4.0 must be between 0 and 1" in capsys.readouterr().err


def test_what_cannot_be_done_is_said_first(classifier, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hf_vlm.tasks.evaluation.evaluate_split", lambda *a, **k: pytest.fail("it was evaluated"))
    words = ["--data", str(tmp_path / "images")]
    assert main(["evaluate", "me/classifier", *words, "--calibrate"]) == 2
    assert "me/classifier is no folder" in capsys.readouterr().err
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "export.json").write_text("{}")
    assert main(["evaluate", str(tmp_path / "export"), *words, "--calibrate"]) == 2
    assert "Calibrate its run" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["evaluate", str(classifier), *words, "--report", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_nothing_is_left_of_an_evaluation_that_failed(classifier, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    words = ["--report", str(tmp_path / "new" / "report"), "--save", str(tmp_path / "empty" / "metrics.json")]
    assert main(["evaluate", str(classifier), "--data", str(tmp_path / "nothing"), *words]) == 2
    assert "nothing does not exist" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "empty").is_dir()  # it was there before
