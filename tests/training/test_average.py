"""The average of the weights is what is evaluated and saved, exactly so in a resumed run, and training stops early."""

import json
from pathlib import Path

import pytest
import torch
from killed_run import KillAt, KilledError
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_vlm.tasks.task import Evaluation
from hf_vlm.training.average import LAST_WEIGHTS_FILE, decay_at
from hf_vlm.training.callbacks import read_log
from hf_vlm.training.recipe import parse_arguments
from hf_vlm.training.run import finetune
from hf_vlm.training.trainer import VisionTrainer

SAVING = {"save_strategy": "steps", "save_steps": 2}
BEST = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "ap", "load_best_model_at_end": True}


def change_trainers(monkeypatch, change):
    original = VisionTrainer.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        change(self)

    monkeypatch.setattr(VisionTrainer, "__init__", init)


def with_scores(monkeypatch, scores, seen=None):
    """Evaluations give these AP in turn; the weights that they see are put into a list."""
    remaining = iter(scores)

    def evaluator(model, dataset):
        if seen is not None:
            seen.append(weights_of(model))
        return Evaluation(metrics={"ap": next(remaining)})

    change_trainers(monkeypatch, lambda trainer: setattr(trainer, "evaluator", evaluator))


def weights_of(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


class Recorder(TrainerCallback):
    """The weights before the first step and after each one."""

    def __init__(self):
        self.weights = []

    def on_train_begin(self, *args, model, **kwargs):
        self.weights.append(weights_of(model))

    def on_step_end(self, *args, model, **kwargs):
        self.weights.append(weights_of(model))


def average_of(recorded, decay):
    """The average in float64, weight by weight."""
    average = {name: weight.double() for name, weight in recorded[0].items()}
    for step, weights in enumerate(recorded[1:], start=1):
        for name, weight in weights.items():
            kept = min(decay, (1 + step) / (10 + step))
            average[name] = kept * average[name] + (1 - kept) * weight
    return average


def test_the_average_is_evaluated_and_saved_and_training_continues_from_the_last_weights(make_recipe, monkeypatch):
    recorder, seen, plain = Recorder(), [], Recorder()
    recipe = make_recipe("detection", max_steps=6, eval_strategy="steps", eval_steps=3, **SAVING)
    with monkeypatch.context() as patch:
        change_trainers(patch, lambda trainer: trainer.add_callback(plain))
        finetune({**recipe, "output_dir": recipe["output_dir"] + "-plain", "eval_strategy": "no"})
    change_trainers(monkeypatch, lambda trainer: trainer.add_callback(recorder))
    with_scores(monkeypatch, [0.1, 0.2], seen)
    finetune({**recipe, "ema_decay": 0.4})
    assert recorder.weights[6].keys() == plain.weights[6].keys()
    for mine, theirs in zip(recorder.weights, plain.weights, strict=True):
        assert_equal(mine, theirs)
    saved = load_file(f"{recipe['output_dir']}/model.safetensors")
    checkpoint = load_file(f"{recipe['output_dir']}/checkpoint-4/model.safetensors")
    for found, step in ((seen[0], 3), (checkpoint, 4), (seen[1], 6), (saved, 6)):
        expected = average_of(recorder.weights[: step + 1], 0.4)
        for name, weight in expected.items():
            torch.testing.assert_close(found[name].double(), weight, rtol=1e-5, atol=1e-7)
    assert not torch.equal(saved["class_head.weight"], recorder.weights[6]["class_head.weight"])


def test_the_decay_rises():
    assert [decay_at(step, 0.99) for step in (1, 8, 80)] == [2 / 11, 9 / 18, 81 / 90]
    assert decay_at(10**6, 0.99) == 0.99


def test_a_resumed_run_has_the_same_average_and_the_same_last_weights(make_recipe, monkeypatch):
    recipe = make_recipe("detection", max_steps=6, ema_decay=0.9, **SAVING)
    whole, resumed = ({**recipe, "output_dir": f"{recipe['output_dir']}-{name}"} for name in ("whole", "resumed"))
    finetune(whole)
    with monkeypatch.context() as patch:
        change_trainers(patch, lambda trainer: trainer.add_callback(KillAt(5)))
        with pytest.raises(KilledError):
            finetune(resumed)
    finetune({**resumed, "resume_from_checkpoint": "last"})
    for file in ("model.safetensors", "checkpoint-6/model.safetensors", f"checkpoint-6/{LAST_WEIGHTS_FILE}"):
        assert_equal(*(load_file(f"{run['output_dir']}/{file}") for run in (whole, resumed)))


def test_the_best_average_is_kept(make_recipe, monkeypatch):
    recipe = make_recipe("detection", max_steps=6, ema_decay=0.9, **SAVING, **BEST)
    with_scores(monkeypatch, [0.1, 0.3, 0.2, 0.3])
    finetune(recipe)
    files = (f"{recipe['output_dir']}/{name}model.safetensors" for name in ("", "checkpoint-4/"))
    assert_equal(*map(load_file, files))


def test_training_stops_after_evaluations_that_are_not_better(make_recipe, monkeypatch):
    recipe = make_recipe("detection", max_steps=20, early_stopping_patience=2, **SAVING, **BEST)
    with monkeypatch.context() as patch:
        with_scores(patch, [0.3, 0.2, 0.25])
        change_trainers(patch, lambda trainer: trainer.add_callback(KillAt(5)))
        with pytest.raises(KilledError):
            finetune(recipe)
    with_scores(monkeypatch, [0.28, 0.3])  # the first one after step 4 is the second that is not better
    finetune({**recipe, "resume_from_checkpoint": "last"})
    assert max(entry["step"] for entry in read_log(_folder(recipe) / "log.jsonl")) == 6
    best = json.loads((_folder(recipe) / "checkpoint-6/trainer_state.json").read_text())["best_global_step"]
    assert best == 2
    assert finetune({**recipe, "resume_from_checkpoint": "last"})["finished"]  # without a further step


def _folder(recipe):
    return Path(recipe["output_dir"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ema_decay": 1.0}, "ema_decay must be above 0 and below 1"),
        ({"early_stopping_patience": 0, **BEST, **SAVING}, "early_stopping_patience must be 1 or more"),
        ({"early_stopping_patience": 2}, "set load_best_model_at_end to true"),
    ],
)
def test_settings_that_cannot_work_are_refused(make_recipe, change, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(make_recipe("detection", **change))
