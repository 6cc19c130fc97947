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


@pytest.mark.parametrize("command", ["pretrain", "finetune", "evaluate"])
def test_an_encoder_of_transformers_is_taken_as_it_is(command, dinov2, tmp_path, capsys, caplog):
    """Converted on the way, with its architecture and the statistics of its image processor."""
    run = str(tmp_path / "run")
    short = ["--encoder", dinov2, "--use_cpu", "true", "--image_size", "35", "--max_steps", "1", "--output_dir", run]
    short += ["--per_device_train_batch_size", "2", "--shuffle_block", "8", "--learning_rate", "0.0"]
    head = "{hidden_size: 32, num_decoder_layers: 1, num_self_attention_heads: 4, num_cross_attention_heads: 4}"
    decoder = "{hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2}"
    words = {
        "pretrain": ["mae/vit_nano_cpu.yaml", *short, "--probe_steps", "0", "--model_config.decoder_config", decoder],
        "finetune": ["detection/vit_nano_cpu.yaml", *short, "--num_eval_examples", "4", "--model_config", head],
        "evaluate": [dinov2, "--num_examples", "16"],
    }[command]
    with caplog.at_level("INFO", logger="hf_vlm"):
        assert main([command, *words, "--data", "scenes:easy"]) == 0
    assert "is an encoder of transformers, converted on the way: loaded 42 of 42 weights" in caplog.text
    if command == "evaluate":
        assert "knn" in capsys.readouterr().out
        return
    assert "image_size: 35 x 35 is not of whole patches of 8 x 8 pixels; 32 x 32 is used" in caplog.text
    weights = VLMViTModel.from_pretrained(run).layers[1].mlp.down_projection.weight
    assert torch.equal(weights, AutoModel.from_pretrained(dinov2).encoder.layer[1].mlp.fc2.weight)
    processor = AutoImageProcessor.from_pretrained(run)
    assert [*processor.image_mean, *processor.image_std, processor.size["height"]] == [0.3] * 3 + [0.2] * 3 + [32]


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
