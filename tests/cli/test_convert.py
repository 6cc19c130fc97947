"""`hf-vlm convert`, and what the commands say of checkpoints that it is for."""

import shlex

import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    ViTImageProcessorPil,
)

from hf_vlm.cli.main import main
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_vlm_vit import VLMViTModel

FIELDS = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
PICTURE = Image.effect_noise((50, 40), 60).convert("RGB")


@pytest.fixture
def dinov2(tmp_path):
    """The folder of a random classifier, with an image processor that is unlike the defaults."""
    torch.manual_seed(0)
    model = Dinov2ForImageClassification(Dinov2Config(**FIELDS))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "dinov2")
    processor = ViTImageProcessorPil(size={"height": 32, "width": 48}, image_mean=[0.3] * 3, image_std=[0.2] * 3)
    processor.save_pretrained(tmp_path / "dinov2")
    return str(tmp_path / "dinov2")


def features_of(folder):
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        return model(**processor(PICTURE, return_tensors="pt")).last_hidden_state


def test_there_and_back_as_a_user_types_it(dinov2, tmp_path, capsys):
    ours, back = str(tmp_path / "ours"), str(tmp_path / "back")
    assert main(["convert", dinov2, ours]) == 0
    printed = capsys.readouterr().out
    for row in (
        "loaded   42 of 42 weights",
        "folded   embeddings.position_embeddings[0] into embeddings.cls_token",
        "dropped  classifier, mask_token",
        "images   32 x 48: the checkpoint's",
        f"The licence of {dinov2} goes with its weights",
        f"hf-vlm pretrain simclr/vit_small.yaml --data YOUR_IMAGES --encoder {ours} --frozen_encoder_steps 0.1",
        "--encoder_config '{",
    ):
        assert row in printed
    assert isinstance(AutoModel.from_pretrained(ours), VLMViTModel)
    assert isinstance(AutoImageProcessor.from_pretrained(ours), VLMViTImageProcessor)
    assert (tmp_path / "ours" / "modeling_vlm_vit.py").is_file()
    assert not (tmp_path / "ours" / "convert_vlm_vit.py").exists()
    torch.testing.assert_close(features_of(ours), features_of(dinov2), atol=2e-5, rtol=1e-4)

    assert main(["convert", dinov2, ours]) == 2
    assert f"{ours} holds a model already" in capsys.readouterr().err

    assert main(["convert", ours, back, "--to", "dinov2"]) == 0
    assert "filled   embeddings.mask_token = 0" in capsys.readouterr().out
    assert torch.equal(features_of(back), features_of(dinov2))


def test_the_next_command_is_one_that_runs(dinov2, tmp_path, capsys):
    """What the command prints, word for word, with a small budget; then what pretraining leaves goes back."""
    ours, run = str(tmp_path / "ours"), str(tmp_path / "run")
    assert main(["convert", dinov2, ours]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Next: hf-vlm "))
    words = shlex.split(line.removeprefix("Next: hf-vlm ").replace("YOUR_IMAGES", "scenes:easy"))
    short = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--use_cpu", "true", "--image_size", "32"]
    short += ["--num_probe_examples", "16", "--shuffle_block", "16"]
    short += ["--dataloader_num_workers", "0", "--save_strategy", "no", "--output_dir", run, "--learning_rate", "0.0"]
    assert main([*words, *short]) == 0
    assert main(["convert", run, str(tmp_path / "back"), "--to", "dinov2"]) == 0
    assert torch.equal(
        *(AutoModel.from_pretrained(f).encoder.layer[1].mlp.fc2.weight for f in (dinov2, tmp_path / "back"))
    )


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_an_encoder_of_transformers_is_refused_with_the_command_that_converts_it(command, dinov2, tmp_path, capsys):
    recipe = {"pretrain": "simclr/vit_small.yaml", "finetune": "detection/vit_small.yaml"}[command]
    words = [command, recipe, "--data", "scenes:easy", "--encoder", dinov2, "--use_cpu", "true"]
    assert main([*words, "--output_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "is a checkpoint of transformers (dinov2)" in error
    assert f"hf-vlm convert {dinov2} runs/dinov2\n  --encoder runs/dinov2" in error


@pytest.mark.parametrize(
    ("source", "target", "to", "message"),
    [
        ("nowhere/at-all", "out", [], "neither a folder with a model nor one on the Hub"),
        ("dinov2", "dinov2", [], "name another folder for the converted"),
        ("dinov2", "dinov2/config.json", [], "name another folder for the converted"),
        ("dinov2", "out", ["--to", "vit"], "is no encoder of hf_vlm, but of type 'dinov2'"),
        ("ours", "out", [], "is an encoder of hf_vlm already"),
        ("ours", "out", ["--to", "vit"], "does not fit the layout of vit: layerscale_value 1.0"),
        ("ours", "out", ["--to", "resnet"], "'resnet' cannot be converted"),
    ],
)
def test_what_cannot_be_converted_is_said_in_a_line(
    source, target, to, message, dinov2, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["convert", "dinov2", "ours"]) == 0
    assert main(["convert", source, target, *to]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
