"""A loss or a weight that is not finite ends a run before it is saved, in pretraining and in fine-tuning."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_vlm.models.modeling_detection import VLMViTForObjectDetection
from hf_vlm.models.modeling_mae import MAEForPreTraining
from hf_vlm.models.modeling_simclr import SimCLRForPreTraining
from hf_vlm.training.callbacks import read_log
from hf_vlm.training.finite import check_metrics, not_finite_weights
from hf_vlm.training.run import finetune, pretrain

SAVING = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "probe_steps": 0}


def break_at(monkeypatch, model_class, call, value):
    """The loss of one call of `forward`, counted from 1 after the one that counts FLOPs, becomes `value`."""
    stock, calls = model_class.forward, []

    def forward(self, *args, **kwargs):
        output = stock(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == call + 1:
            output.loss = output.loss * value
        return output

    monkeypatch.setattr(model_class, "forward", forward)


def saved(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("checkpoint") or path.suffix)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("method", "train", "model_class"),
    [("mae", pretrain, MAEForPreTraining), ("detection", finetune, VLMViTForObjectDetection)],
)
def test_a_loss_stops_the_run_at_its_log_entry(make_recipe, tmp_path, monkeypatch, method, train, model_class, value):
    break_at(monkeypatch, model_class, 4, value)
    with pytest.raises(ValueError, match=r"Step 4: the loss is not finite \(loss (nan|inf)\).*/checkpoint-2\."):
        train(make_recipe(method, **SAVING))
    assert saved(tmp_path / method) == ["checkpoint-2", "log.jsonl"]
    assert not not_finite_weights_of(tmp_path / method / "checkpoint-2")
    losses = [entry["loss"] for entry in read_log(tmp_path / method / "log.jsonl") if "loss" in entry]
    assert [math.isfinite(loss) for loss in losses] == [True, True, True, False]


def not_finite_weights_of(folder):
    return [name for name, weight in load_file(folder / "model.safetensors").items() if not weight.isfinite().all()]


def test_it_stops_at_a_save_where_none_is_logged(make_recipe, tmp_path, monkeypatch):
    break_at(monkeypatch, MAEForPreTraining, 3, math.nan)
    with pytest.raises(ValueError, match=r"Step 4: weights are not finite \(.*and \d+ more\)"):
        pretrain(make_recipe("mae", **SAVING, logging_steps=8))
    assert saved(tmp_path / "mae") == ["checkpoint-2", "log.jsonl"]


def test_it_stops_at_a_save_where_the_step_was_not_taken(make_recipe, tmp_path, monkeypatch):
    """As the scaler of fp16 does not take it: weights stay finite, and the loss was not."""
    break_at(monkeypatch, MAEForPreTraining, 3, math.inf)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args, **kwargs: None)
    with pytest.raises(ValueError, match=r"Step 4: the loss is not finite\. Nothing of it is saved; the last good"):
        pretrain(make_recipe("mae", **SAVING, logging_steps=8))
    assert saved(tmp_path / "mae") == ["checkpoint-2", "log.jsonl"]


def test_the_model_of_a_run_without_checkpoints_is_not_saved(make_recipe, tmp_path, monkeypatch):
    break_at(monkeypatch, MAEForPreTraining, 8, math.nan)
    with pytest.raises(ValueError, match=r"Step 8: weights are not finite.*there is no checkpoint\."):
        pretrain(make_recipe("mae", probe_steps=0, logging_steps=50))
    assert saved(tmp_path / "mae") == ["log.jsonl"]


@pytest.mark.parametrize("on_collapse", ["warn", "stop", "ignore"])
def test_features_stop_the_run_at_their_probe(make_recipe, tmp_path, monkeypatch, on_collapse):
    stock = SimCLRForPreTraining.__init__

    def broken(self, config):
        stock(self, config)
        nn.init.constant_(self.backbone.embeddings.patch_projection.bias, math.nan)

    monkeypatch.setattr(SimCLRForPreTraining, "__init__", broken)
    with pytest.raises(ValueError, match=r"Step 0: the features are not finite \(probe_feature_std nan\)"):
        pretrain(make_recipe("simclr", on_collapse=on_collapse))
    assert saved(tmp_path / "simclr") == ["log.jsonl"]


def test_an_encoder_with_a_weight_that_is_not_finite_is_refused(make_recipe, tmp_path):
    pretrain(make_recipe("mae", max_steps=1, probe_steps=0))
    path = tmp_path / "mae" / "model.safetensors"
    weights = load_file(path)
    weights["layers.1.mlp.up_projection.weight"][0, 0] = -math.inf
    save_file(weights, path, metadata={"format": "pt"})
    for method, train in ("mae", pretrain), ("detection", finetune):
        recipe = make_recipe(method, encoder=str(tmp_path / "mae"), output_dir=str(tmp_path / "next"))
        with pytest.raises(ValueError, match=r"/mae has weights .* not finite: layers.1.mlp.up_projection.weight"):
            train(recipe)


def test_only_what_is_saved_must_be_finite():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.register_buffer("mask", torch.tensor(-math.inf), persistent=False)
    assert not_finite_weights(model) == []
    model[0].weight.data[0, 1] = math.inf
    model[1].running_var[0] = math.nan
    assert not_finite_weights(model) == ["0.weight", "1.running_var"]
    logs = {"eval_ap/cat": math.nan, "loss": 1.0, "grad_norm": math.inf}  # without objects; the scaler's, in fp16
    check_metrics(logs, step=1, folder="run")
