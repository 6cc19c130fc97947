"""Runs whose logs are read elsewhere, by the key `report_to`."""

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hf_vlm.training.callbacks import read_log
from hf_vlm.training.run import pretrain


def test_tensorboard_has_the_entries_of_the_log(make_recipe, tmp_path):
    pretrain(make_recipe("mae", report_to="tensorboard"))
    (file,) = tmp_path.glob("mae/**/events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    entries = [entry for entry in read_log(tmp_path / "mae" / "log.jsonl") if "loss" in entry]
    assert [(event.step, round(event.value, 4)) for event in events.Scalars("train/loss")] == [
        (entry["step"], round(entry["loss"], 4)) for entry in entries
    ]
    assert {"train/images_per_second", "train/probe_knn"} <= set(events.Tags()["scalars"])
