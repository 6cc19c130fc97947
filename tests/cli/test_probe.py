"""One command gives the accuracies of an encoder by several protocols, which are those of the commands for each."""

import json

import cv2
import pytest
import torch
from sample_data import write_images
from tiny import BACKBONE

from hf_vlm.cli.main import main
from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.viz.accuracies import plot_accuracies

RECIPE = "classification/vit_nano_cpu.yaml"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """What the commands have in common: folders of two classes of bright and dark images, and an encoder."""
    folder = tmp_path_factory.mktemp("probe")
    for split in ("train", "val"):
        for row in range(8):
            path = folder / "data" / split / ("bright" if row % 2 else "dark") / f"{row}.png"
            write_images(path.parent, [path.name], start=200 * (row % 2) + row)
    torch.manual_seed(0)
    VLMViTModel(VLMViTConfig(**BACKBONE)).save_pretrained(folder / "encoder")
    VLMViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "encoder")
    return [RECIPE, "--data", str(folder / "data"), "--encoder", str(folder / "encoder"), "--image_size", "32"]


def table(printed):
    lines = printed.splitlines()
    found = json.loads(lines[-1])
    names = [line.split()[0] for line in lines if line.split()[0] in found]
    assert names == list(found)
    return found


def test_frozen_features_are_evaluated_as_by_evaluate(words, tmp_path, capsys):
    picture = tmp_path / "accuracies.png"
    assert main(["probe", *words, "--max_steps", "2", "--protocols", "linear", "knn", "--plot", str(picture)]) == 0
    found = table(capsys.readouterr().out)
    assert cv2.imread(str(picture)).shape[1] == 720
    saved = tmp_path / "metrics.json"
    assert main(["evaluate", words[4], *words[1:3], "--split", "validation", "--save", str(saved)]) == 0
    metrics = json.loads(saved.read_text())
    assert found == {name: [metrics[name]] for name in found}
    assert {"knn", "knn_class", "linear_both"} <= found.keys()


@pytest.mark.slow
def test_what_is_trained_is_trained_as_by_finetune(words, tmp_path, capsys):
    short = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--save_strategy", "no", "--use_cpu", "true"]
    short += ["--learning_rate", "1e-2", "--num_train_examples", "8"]
    probe = ["probe", *words, *short, "--output_dir", str(tmp_path / "probe"), "--num_seeds", "2", "--seed", "3"]
    assert main(probe) == 0
    found = table(capsys.readouterr().out)
    assert {name for name, values in found.items() if len(values) == 2} == {"attentive", "lora", "full"}
    assert sorted(path.name for path in (tmp_path / "probe").iterdir() if path.is_dir()) == [
        f"{name}-{seed}" for name in ("attentive", "full", "lora") for seed in (3, 4)
    ]
    changes = ["--lora_rank", "8", "--layer_decay", "1.0", "--seed", "4", "--output_dir", str(tmp_path / "lora")]
    assert main(["finetune", *words, *short, *changes]) == 0
    run = json.loads((tmp_path / "lora" / "run.json").read_text())
    assert run["metrics"]["top1"] == found["lora"][1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--protocols", "knn", "svm"], "no protocol svm: choose of knn, linear, attentive, lora, full"),
        (["--num_seeds", "0"], "at least one is needed"),
        (["--encoder", "null"], "name one with --encoder"),
        (["--method", "semantic_segmentation"], "semantic_segmentation is no classifier"),
        (["--plot", "accuracies.xyz"], "--plot accuracies.xyz: name a picture file"),
    ],
)
def test_what_cannot_be_compared_is_refused(words, changes, message, capsys):
    assert main(["probe", *words, "--max_steps", "2", *changes]) == 2
    assert message in capsys.readouterr().err


def test_bars_are_as_long_as_their_means(tmp_path):
    plot_accuracies(tmp_path / "bars.png", {"knn": [0.2], "full": [0.3, 0.5]})
    blue = (
        cv2.imread(str(tmp_path / "bars.png"))[:, :, 0].astype(int) - 60
        > cv2.imread(str(tmp_path / "bars.png"))[:, :, 2]
    )
    lengths = blue.sum(axis=1)
    rows = lengths[lengths > 50]
    assert rows.max() / rows.min() == pytest.approx(2, rel=0.05)
