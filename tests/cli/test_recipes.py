"""Commands without a recipe choose one by labels, encoder and machine."""

import shutil

import pytest
from sample_data import write_coco, write_images

from hf_vlm.cli.main import main
from hf_vlm.cli.recipes import OPENED_BY, read_recipe
from hf_vlm.data import sources
from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.tasks import TASKS
from hf_vlm.training import run
from hf_vlm.training.recipe import load_recipe


@pytest.fixture
def data(tmp_path):
    write_images(tmp_path / "classes", [f"{'xy'[row % 2]}/{row}.png" for row in range(4)])
    write_coco(tmp_path / "boxes" / "annotations.json", tmp_path / "boxes", num_images=4)
    write_images(tmp_path / "plain", ["0.png", "1.png"])
    return tmp_path


@pytest.mark.parametrize(
    ("command", "source", "accelerator", "method", "preset", "reason"),
    [
        ("pretrain", "plain", None, "detection", "nano", "needs an encoder and a head and there is no accelerator"),
        ("pretrain", "boxes", "cuda", "detection", "small", "needs an encoder and a head and there is cuda"),
        (
            "pretrain",
            "classes",
            None,
            "mae",
            "nano",
            "classes of images or pixels need an encoder and there is no acc",
        ),
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
    recipe, _ = read_recipe(["--data", str(data / source), "--max_steps", "7"], command=command)
    assert (recipe["method"], recipe["encoder_preset"], recipe["max_steps"]) == (method, preset, 7)
    assert reason in capsys.readouterr().out


def test_the_recipe_follows_the_encoder(data, capsys):
    VLMViTConfig.from_preset("base").save_pretrained(data / "encoder")
    recipe, _ = read_recipe(["--data", str(data / "boxes"), "--encoder", str(data / "encoder")], command="finetune")
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
    recipe, source = read_recipe([*words, "--allow_outside", "true"], command="finetune")
    assert (recipe["method"], source.num_examples) == ("detection", 4)
    _, source = read_recipe([*words, "--allow_outside", "true", "--num_train_examples", "3"], command="finetune")
    assert len(list(source)) == 3
    for wrong in (["--num_train_examples", "few"], ["--train_split", "3"]):
        with pytest.raises(ValueError, match=rf"^{wrong[0][2:]} in the command line must be "):
            read_recipe([*words, *wrong], command="finetune")


@pytest.mark.parametrize("labels", ["boxes", "classes"])
def test_each_split_is_opened_once(labels, data, monkeypatch, capsys):
    (data / "boxes" / "annotations.json").rename(data / "boxes" / "_annotations.coco.json")
    for split in ("train", "val"):
        shutil.copytree(data / labels, data / "set" / split)
    opened = []

    def open_counted(source, split, original=sources._open, **options):
        opened.append((split, options["num_samples"]))
        return original(source, split, **options)

    def stop(_):
        raise ValueError("both splits are open")

    monkeypatch.setattr(sources, "_open", open_counted)
    monkeypatch.setattr(run, "_run_folder", stop)
    words = ["--data", str(data / "set"), "--num_train_examples", "2", "--output_dir", str(data / "run")]
    assert main(["finetune", *words]) == 2
    assert "both splits are open" in capsys.readouterr().err
    assert opened == [("train", 2), ("validation", None)]


def test_recipes_that_are_chosen_leave_the_data_open():
    """Or the images that they are chosen by would not be those of the run."""
    for task in TASKS.values():
        for name in task.recipes.values():
            assert OPENED_BY.keys() & load_recipe(name).keys() <= {"data"}  # which the command gives


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
