"""Commands without a recipe choose one by labels, encoder and machine."""

import pytest
from sample_data import write_coco, write_images

from hf_vlm.cli.main import main
from hf_vlm.cli.recipes import read_recipe
from hf_vlm.models.configuration_vlm_vit import VLMViTConfig


@pytest.fixture
def data(tmp_path):
    write_images(tmp_path / "classes", [f"{'xy'[row % 2]}/{row}.png" for row in range(4)])
    write_coco(tmp_path / "boxes" / "annotations.json", tmp_path / "boxes", num_images=4)
    write_images(tmp_path / "plain", ["0.png", "1.png"])
    return tmp_path


@pytest.mark.parametrize(
    ("command", "source", "accelerator", "method", "preset", "reason"),
    [
        ("pretrain", "plain", None, "mae", "nano", "there is no accelerator"),
        ("pretrain", "plain", "cuda", "mae", "small", "there is cuda"),
        ("finetune", "boxes", None, "detection", "nano", "the labels serve object-detection and there is no acc"),
        (
            "finetune",
            "classes",
            "cuda",
            "classification",
            "small",
            "the labels serve image-classification and there is",
        ),
    ],
)
def test_the_recipe_follows_labels_and_machine(
    command, source, accelerator, method, preset, reason, data, monkeypatch, capsys
):
    device = None if accelerator is None else type("Device", (), {"type": accelerator})
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: device)
    recipe = read_recipe(["--data", str(data / source), "--max_steps", "7"], command=command)
    assert (recipe["method"], recipe["encoder_preset"], recipe["max_steps"]) == (method, preset, 7)
    assert reason in capsys.readouterr().out


def test_the_recipe_follows_the_encoder(data, capsys):
    VLMViTConfig.from_preset("base").save_pretrained(data / "encoder")
    recipe = read_recipe(["--data", str(data / "boxes"), "--encoder", str(data / "encoder")], command="finetune")
    assert "encoder_preset" not in recipe  # the encoder brings its size
    assert "Recipe: detection/vit_small.yaml, as the labels serve object-detection and the encoder is 768 wide" in (
        capsys.readouterr().out
    )


def test_the_data_are_opened_as_the_run_will(data):
    file = data / "boxes" / "annotations.json"
    write_images(data, ["0.png"])
    file.write_text(file.read_text().replace('"0.png"', '"../0.png"'))
    words = ["--data", str(file), "--format", "coco"]
    with pytest.raises(ValueError, match=r"outside of .*--allow_outside"):
        read_recipe(words, command="finetune")
    assert read_recipe([*words, "--allow_outside", "true"], command="finetune")["method"] == "detection"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrain", "--max_steps", "7"], "Name images, or a recipe too: hf-vlm pretrain --data"),
        (["finetune", "--data", "plain"], "has neither boxes nor labels in split 'train'"),
    ],
)
def test_what_leaves_nothing_to_choose_is_said(words, message, data, monkeypatch, capsys):
    monkeypatch.chdir(data)
    assert main(words) == 2
    assert message in capsys.readouterr().err
