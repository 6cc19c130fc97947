"""The demo in a minute's miniature: what it leaves and what it says."""

import json
from types import SimpleNamespace

import pytest
from PIL import Image

from hf_vlm.cli.demo import closing_message, gains, results_table, run_demo, write_report

NUM_IMAGES = 40
TINY = {"max_steps": 4, "eval_steps": 2, "logging_steps": 1, "num_train_examples": 8, "num_eval_examples": 6}
SMALL_BATCHES = {"per_device_train_batch_size": 4, "disable_tqdm": True, "use_cpu": True, "dataloader_num_workers": 0}


@pytest.mark.slow
def test_the_demo_leaves_a_folder_to_look_at(tmp_path, capsys, monkeypatch, fork_server):
    monkeypatch.setattr("hf_vlm.cli.demo.subprocess", SimpleNamespace(Popen=fork_server.popen))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_vlm.cli.demo.NUM_UNLABELLED", NUM_IMAGES)
    results = run_demo(tmp_path, seed=3, num_runs=2, overrides=TINY | SMALL_BATCHES) | {"seconds": 12.3}
    write_report(tmp_path, results)
    assert "[1/3]" in capsys.readouterr().out
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["seconds"] == 12.3
    assert all(0 <= m[name] <= 1 for arm in ("pretrained", "random") for m in saved[arm] for name in ("ap", "ap50"))
    for name in ("learning_curves.png", "predictions.png", "pretrained/pseudo_labels.png"):
        with Image.open(tmp_path / name) as picture:
            colors = picture.convert("RGB").resize((64, 64)).getcolors(4096)
        assert len(colors) > 20, name
    runs = {path: json.loads((path / "run.json").read_text()) for path in tmp_path.glob("detector_*/*")}
    assert {path.relative_to(tmp_path).as_posix() for path in runs} == {
        f"detector_{variant}/{index}" for variant in ("pretrained", "random") for index in (0, 1)
    }
    for path, run in runs.items():
        assert run["num_steps"] == 4
        assert bool(run["encoder"]) == (path.parent.name == "detector_pretrained")
        assert f"seed: {3 + int(path.name)}\n" in (path / "recipe.yaml").read_text()
    pretrained = json.loads((tmp_path / "pretrained" / "run.json").read_text())
    assert pretrained["data"]["class_names"] == ["object"]


def results_of(pretrained, random):
    metrics = {"ap50": 0.6, "ap75": 0.3, "ar_100": 0.5}
    arms = {"pretrained": pretrained, "random": random}
    return {arm: [metrics | {"ap": ap} for ap in values] for arm, values in arms.items()} | {"seconds": 100}


def test_the_words_follow_the_figures(tmp_path):
    ahead = results_of([0.4, 0.3], [0.2, 0.3])
    assert gains(ahead) == pytest.approx([0.2, 0.0])
    message = closing_message(tmp_path, ahead)
    assert "gained +0.100 AP (+40%)" in message
    assert "by run +0.200, +0.000" in message
    assert "did not help (-0.050 AP; by run -0.050)" in closing_message(tmp_path, results_of([0.2], [0.25]))
    assert "| from random initialisation | 0.250 ± 0.071 | 0.600 ± 0.000 |" in results_table(ahead)
