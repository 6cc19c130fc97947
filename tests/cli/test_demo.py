"""The demo in a minute's miniature: what it leaves and what it says."""

import json
from types import SimpleNamespace

from PIL import Image

from hf_vlm.cli.demo import closing_message, results_table, run_demo, write_report

NUM_IMAGES = 40
TINY = {"max_steps": 4, "eval_steps": 2, "logging_steps": 1, "num_train_examples": 8, "num_eval_examples": 6}
SMALL_BATCHES = {"per_device_train_batch_size": 4, "disable_tqdm": True, "use_cpu": True, "num_probe_examples": 16}


def test_the_demo_leaves_a_folder_to_look_at(tmp_path, capsys, monkeypatch, fork_server):
    monkeypatch.setattr("hf_vlm.cli.demo.subprocess", SimpleNamespace(Popen=fork_server.popen))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_vlm.cli.demo.NUM_UNLABELLED", NUM_IMAGES)
    results = run_demo(tmp_path, overrides=TINY | SMALL_BATCHES) | {"seconds": 12.3}
    write_report(tmp_path, results)
    assert "[1/3]" in capsys.readouterr().out
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["seconds"] == 12.3
    assert all(0 <= saved[arm][name] <= 1 for arm in ("pretrained", "random") for name in ("ap", "ap50"))
    for name in ("learning_curves.png", "predictions.png"):
        with Image.open(tmp_path / name) as picture:
            colors = picture.convert("RGB").resize((64, 64)).getcolors(4096)
        assert len(colors) > 20, name
    for run in ("encoder", "detector_pretrained", "detector_random"):
        assert (tmp_path / run / "README.md").is_file()
        assert json.loads((tmp_path / run / "run.json").read_text())["num_steps"] == 4
    assert json.loads((tmp_path / "detector_pretrained" / "run.json").read_text())["encoder"]
    assert json.loads((tmp_path / "detector_random" / "run.json").read_text())["encoder"] is None


def test_the_words_follow_the_figures(tmp_path):
    metrics = {"ap": 0.4, "ap50": 0.6, "ap75": 0.3, "ar_100": 0.5}
    ahead = {"pretrained": metrics, "random": metrics | {"ap": 0.3}, "seconds": 100}
    assert "gained +0.100 AP" in closing_message(tmp_path, ahead)
    assert "did not help" in closing_message(tmp_path, ahead | {"random": metrics | {"ap": 0.45}})
    assert "| random | 0.300 | 0.600 |" in results_table(ahead)
