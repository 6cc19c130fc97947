"""A budget of time becomes a number of steps, by a trial whose speed is given here."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_vlm.training import budget
from hf_vlm.training.budget import parse_budget, with_steps_for_budget
from hf_vlm.training.recipe import load_recipe, parse_arguments
from hf_vlm.training.run import finetune, pretrain


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5 h", 5400), ("2d", 172800)])
def test_times(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "0m", "-5m", "10 minutes", "m"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match="budget must be a time such as"):
        parse_budget(text)


def timed(trials, rates=(2.0, 8.0, 10.0), labelling=0.0):
    """A stand-in for training, which leaves the log of a trial in which a step of 4 images took 0.4 s."""

    def run(recipe):
        trials.append(recipe)
        folder = Path(recipe["output_dir"])
        folder.mkdir()
        log = "".join(json.dumps({"step": 3, "images_per_second": rate}) + "\n" for rate in rates)
        (folder / "log.jsonl").write_text(log)
        (folder / "run.json").write_text(json.dumps({"batch_size": 4, "labelling_seconds": labelling}))

    return run


@pytest.fixture(autouse=True)
def trials_take_no_time(monkeypatch):
    monkeypatch.setattr(budget, "time", SimpleNamespace(perf_counter=lambda: 0.0))


def steps_for(recipe, **options):
    trials = []
    found = with_steps_for_budget(recipe, parse_arguments(recipe), timed(trials, **options))
    return found, trials


@pytest.fixture
def timed_recipe(make_recipe):
    def make(method="detection", **changes):
        recipe = make_recipe(method, **changes)
        return {key: value for key, value in recipe.items() if key != "max_steps"}

    return make


@pytest.mark.parametrize(
    ("changes", "labelling", "steps"),
    [
        ({"budget": "40s"}, 0.0, 95),  # 38 s of 0.4 s
        ({"budget": "80s", "rounds": 2}, 0.0, 95),  # each
        ({"budget": "40s", "num_train_examples": 512}, 2.0, 85),  # 4 s to find labels in twice as many images
    ],
)
def test_steps_fill_the_time_but_a_reserve(timed_recipe, changes, labelling, steps):
    recipe = timed_recipe(**changes)
    found, (trial,) = steps_for(recipe, labelling=labelling)
    assert found == recipe | {"budget": None, "max_steps": steps}
    assert trial["max_steps"] == budget.TRIAL_STEPS
    assert trial["output_dir"] != recipe["output_dir"]
    assert trial["num_train_examples"] == min(changes.get("num_train_examples", 24), 256)
    parse_arguments(trial)  # can be run


def test_too_short_a_budget_is_refused(timed_recipe):
    with pytest.raises(ValueError, match=r"budget: 0\.3s is too short"):
        steps_for(timed_recipe(budget="0.3s"))


def test_a_resumed_run_keeps_its_number_of_steps(timed_recipe, tmp_path):
    recipe = timed_recipe(budget="40s", resume_from_checkpoint="auto", output_dir=str(tmp_path / "run"))
    assert steps_for(recipe)[0]["max_steps"] == 95  # it has no checkpoint
    (tmp_path / "run" / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").write_text('{"max_steps": 7}')
    found, trials = steps_for(recipe)
    assert found["max_steps"] == 7
    assert not trials


def test_a_run_that_was_stopped_in_an_earlier_round_keeps_its_number_of_steps(timed_recipe, tmp_path):
    recipe = timed_recipe(budget="40s", rounds=2, resume_from_checkpoint="auto", output_dir=str(tmp_path / "run"))
    (tmp_path / "run" / "round-1").mkdir(parents=True)
    (tmp_path / "run" / "round-1" / "run.json").write_text('{"num_steps": 9, "finished": true}')
    assert steps_for(recipe)[0]["max_steps"] == 9
    (tmp_path / "run" / "round-1" / "checkpoint-4").mkdir()
    (tmp_path / "run" / "round-1" / "checkpoint-4" / "trainer_state.json").write_text('{"max_steps": 7}')
    assert steps_for(recipe)[0]["max_steps"] == 7


def test_the_time_of_the_trial_counts_and_few_images_are_labelled(timed_recipe, monkeypatch, tmp_path):
    clock = iter([0.0, 18.0])
    monkeypatch.setattr(budget, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    (tmp_path / "teacher").mkdir()
    teacher = str(tmp_path / "teacher")
    recipe = timed_recipe(budget="40s", unlabelled_data="scenes:easy", labels_from=teacher)
    recipe["num_unlabelled_examples"] = 1024
    found, (trial,) = steps_for(recipe, labelling=2.0)
    assert trial["num_unlabelled_examples"] == 256
    assert found["max_steps"] == 30  # 38 s less 18 of the trial, and 8 to label four times as many


def test_a_budget_replaces_the_length_of_a_recipe():
    recipe = load_recipe("mae/vit_small.yaml", ["--budget", "2h"])
    assert recipe["budget"] == "2h"
    assert not {"max_steps", "images_to_see"} & recipe.keys()
    with pytest.raises(ValueError, match="no two of them"):
        parse_arguments({"output_dir": "runs/x", "max_steps": 4, "budget": "2h"})


@pytest.mark.slow
def test_runs_by_a_budget_train_and_record_their_steps(timed_recipe, tmp_path, capsys, monkeypatch):
    trial, found = budget._try, []
    monkeypatch.setattr(budget, "_try", lambda *args: found.append(trial(*args)) or (1.0, 0.0))
    trained = pretrain(timed_recipe(budget="3s", output_dir=str(tmp_path / "objects")))
    assert trained["finished"]
    assert trained["num_steps"] == 2
    assert "max_steps: 2\n" in (tmp_path / "objects" / "recipe.yaml").read_text()
    assert f"/{budget.TRIAL_STEPS}  loss" not in capsys.readouterr().out
    tuned = finetune(timed_recipe(budget="3s", encoder=str(tmp_path / "objects")))
    assert tuned["num_steps"] == 2
    assert all(0 < of_step < 10 for of_step, _ in found)
    assert [before > 0 for _, before in found] == [True, False]


@pytest.mark.parametrize(
    ("has_head", "images", "warns"),
    [(True, 7_999, True), (True, 8_000, False), (False, 8_000, True), (False, 26_400, False)],
)
def test_a_short_pretraining_is_warned_of(make_recipe, caplog, has_head, images, warns):
    args = parse_arguments(make_recipe("mae", max_steps=images, per_device_train_batch_size=1))
    with caplog.at_level(logging.WARNING, logger="hf_vlm"):
        budget.warn_of_short_pretraining(args, has_head=has_head)
    assert bool(caplog.records) == warns
    if warns:
        assert f"sees {images:,} images" in caplog.text
