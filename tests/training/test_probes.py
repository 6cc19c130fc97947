"""Probes give the metrics of the features, and training does not notice them."""

import contextlib
import json
import math
import random
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard

from hf_vlm import metrics
from hf_vlm.data.scenes.stream import scenes_source
from hf_vlm.data.sources import open_source
from hf_vlm.data.stream import ExampleStream
from hf_vlm.data.transforms.views import EvalTransform, ViewTransform
from hf_vlm.features.extraction import frozen
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_mae import MAEForPreTraining
from hf_vlm.models.modeling_simclr import SimCLRConfig, SimCLRForPreTraining
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.training import probes
from hf_vlm.training.callbacks import read_log
from hf_vlm.training.probes import (
    Probe,
    accuracy,
    feature_statistics,
    open_probe_source,
    preserved_randomness,
    probe_interval,
)
from hf_vlm.training.recipe import parse_arguments
from hf_vlm.training.run import pretrain
from hf_vlm.training.trainer import VisionTrainer
from hf_vlm.viz.curves import plot_probes

PROGRAM = Path(__file__).with_name("traced_run.py")


def probed(folder):
    return {
        entry["step"]: {name: value for name, value in entry.items() if name not in ("probe_seconds", "epoch")}
        for entry in read_log(folder / "log.jsonl")
        if "probe_effective_rank" in entry
    }


def losses(folder):
    return {entry["step"]: entry["loss"] for entry in read_log(folder / "log.jsonl") if "loss" in entry}


@pytest.mark.parametrize("method", ["simclr", "mae"])
def test_figures_are_those_of_the_encoder_on_fixed_views(make_recipe, tmp_path, method):
    summary = pretrain(make_recipe(method, probe_steps=3, num_probe_examples=40, num_eval_examples=30))
    folder = tmp_path / method
    found = probed(folder)
    assert sorted(found) == [0, 3, 6, 8]
    assert sorted(losses(folder)) == list(range(1, 9))  # a probe takes no entry away
    assert {name: value for name, value in summary["probe"].items() if name != "probe_seconds"} == found[8]

    normalize = {"image_mean": VLMViTImageProcessor().image_mean, "image_std": VLMViTImageProcessor().image_std}
    views = {"mae": MAEForPreTraining, "simclr": SimCLRForPreTraining}[method].default_views
    transforms = {
        "views": ViewTransform.from_dict({**views, "num_views": 2, "size": 32}, **normalize),
        "plain": EvalTransform(32, **normalize),
    }
    encoder = VLMViTModel.from_pretrained(folder).eval()
    features = {}
    for name, transform in transforms.items():
        source = open_source("scenes:easy", "validation", num_samples=30)
        examples = list(ExampleStream(source.dataset, transform, seed=0, repeat=False, block_size=40))
        pixels = torch.stack([example["pixel_values"] for example in examples])
        with torch.no_grad():
            tokens = encoder(pixels.reshape(-1, *pixels.shape[-3:])).last_hidden_state
        features[name] = tokens[:, 1:].mean(1)
    first, second = features["views"][::2], features["views"][1::2]
    labels, plain = torch.tensor([example["label"] for example in examples]), features["plain"]
    there = plain[::2], labels[::2], plain[1::2], labels[1::2]
    back = there[2:] + there[:2]
    expected = {
        "probe_effective_rank": metrics.effective_rank(first),
        "probe_feature_std": metrics.feature_std(first),
        "probe_mean_cosine": metrics.mean_cosine(first),
        "probe_alignment": metrics.alignment(first, second),
        "probe_uniformity": metrics.uniformity(first),
        "probe_knn": np.mean([metrics.knn_accuracy(*half, num_neighbors=15) for half in (there, back)]),
        "probe_linear": np.mean([metrics.linear_accuracy(*half) for half in (there, back)]),
        "step": 8,
    }
    assert found[8] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert found[0]["probe_effective_rank"] != found[8]["probe_effective_rank"]


@pytest.mark.parametrize(
    ("method", "bf16"),
    [*(pytest.param(name, False, marks=pytest.mark.slow) for name in ("simclr", "mae")), ("mae", True)],
)
def test_probes_change_no_bit_of_a_run(make_recipe, tmp_path, method, bf16):
    recipe = make_recipe(method, bf16=bf16)
    recipe["encoder_config"]["drop_path_rate"] = 0.3  # draws random numbers where a model trains
    pretrain(recipe | {"output_dir": str(tmp_path / "probed"), "probe_steps": 2}, plot=plot_probes)
    pretrain(recipe | {"output_dir": str(tmp_path / "unprobed"), "probe_steps": 0}, plot=plot_probes)
    assert sorted(probed(tmp_path / "probed")) == [0, 2, 4, 6, 8]
    assert probed(tmp_path / "unprobed") == {}
    assert losses(tmp_path / "probed") == losses(tmp_path / "unprobed")
    weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("probed", "unprobed"))
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert (tmp_path / "probed" / "probes.png").is_file()
    assert not (tmp_path / "unprobed" / "probes.png").is_file()


def test_a_run_that_goes_on_repeats_no_probe(make_recipe, tmp_path, monkeypatch):
    recipe = make_recipe("simclr", probe_steps=2, save_strategy="steps", save_steps=4)
    pretrain(recipe | {"output_dir": str(tmp_path / "whole")})
    stock, steps = VisionTrainer.training_step, []

    def training_step(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 7:
            raise KeyboardInterrupt
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(VisionTrainer, "training_step", training_step)
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe)
    before = len(read_log(tmp_path / "simclr" / "log.jsonl"))
    summary = pretrain(recipe | {"resume_from_checkpoint": "last"})
    assert steps[6:8] == [6, 4]
    assert before > 6
    assert probed(tmp_path / "simclr") == probed(tmp_path / "whole")
    entries = [e["step"] for e in read_log(tmp_path / "simclr" / "log.jsonl") if "probe_feature_std" in e]
    assert entries == [0, 2, 4, 6, 8]
    assert summary["probe"]["step"] == 8


@pytest.mark.slow
def test_two_ranks_probe_as_one_does(make_recipe, tmp_path):
    recipe = make_recipe("simclr", max_steps=2)
    pretrain(recipe | {"output_dir": str(tmp_path / "one")})
    (tmp_path / "recipe.json").write_text(json.dumps(recipe | {"output_dir": str(tmp_path / "two")}))
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(PROGRAM)]
    done = subprocess.run(
        [sys.executable, *words, str(tmp_path / "recipe.json"), str(tmp_path)], capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = probed(tmp_path / "one"), probed(tmp_path / "two")
    assert sorted(one) == sorted(two) == [0, 2]
    assert one[0] == pytest.approx(two[0], rel=1e-5)  # later the ranks have seen twice as many images


class Trainer:
    """As much of one as a probe needs."""

    def __init__(self):
        self.entries = []
        self.log = self.entries.append
        self.excluded_from_timing = contextlib.nullcontext


class CountedImages(list):
    num_read = 0

    def __iter__(self):
        self.num_read += 1
        return super().__iter__()


def probe_in_two_ranks(rank, store):
    """What each rank logs of a model of its own and then of a sharded one, that it trains in between."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        encoder = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2}
        config = SimCLRConfig(backbone_config=encoder | {"num_attention_heads": 2}, projection_hidden_size=16)
        model, trainer = SimCLRForPreTraining(config), Trainer()
        images = CountedImages({"views": torch.randn(2, 3, 16, 16)} for _ in range(10))
        args = SimpleNamespace(world_size=2, device=torch.device("cpu"), train_batch_size=4, disable_tqdm=True)
        state = SimpleNamespace(global_step=0, is_world_process_zero=rank == 0)
        probe = Probe(trainer, images, num_examples=8, every=1)
        probe.on_train_begin(args, state, SimpleNamespace(should_log=True), model=model)
        for layer in model.backbone.layers:
            fully_shard(layer)
        fully_shard(model)
        for _ in range(2):
            probe.on_train_begin(args, state, SimpleNamespace(should_log=True), model=model)
            model(torch.randn(3, 2, 3, 16, 16)).loss.backward()
        return trainer.entries, images.num_read
    finally:
        dist.destroy_process_group()


def keep(rank, store, path):
    torch.save(probe_in_two_ranks(rank, store), path)


def test_one_rank_probes_for_all_and_a_sharded_model_is_run_by_all(tmp_path, fork_server):
    store, path = str(tmp_path / "store"), tmp_path / "other.pt"
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['keep'](1, *sys.argv[2:])"
    other = fork_server.popen([sys.executable, "-c", code, __file__, store, str(path)], cwd=tmp_path)
    entries, num_read = probe_in_two_ranks(0, store)
    assert other.wait(timeout=120) == 0
    entries_of_other, num_read_of_other = torch.load(path)
    assert entries == entries_of_other
    assert (num_read, num_read_of_other) == (3, 2)
    for entry in entries:
        entry.pop("probe_seconds")
    assert len(entries[0]) == 5
    assert entries[1] == entries[2] == pytest.approx(entries[0], rel=1e-5)


def write_folder(folder, num_images, *, classes):
    for index, scene in enumerate(islice(scenes_source("easy", "train", masks=False), num_images)):
        path = folder / classes[index % len(classes)] / f"{index:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(scene["image"]["bytes"])


def test_without_an_evaluation_split_the_images_of_training_are_looked_at(make_recipe, tmp_path, caplog):
    write_folder(tmp_path / "images", 24, classes=[""])
    with caplog.at_level("INFO"):
        pretrain(make_recipe("mae", data=str(tmp_path / "images"), max_steps=2))
    assert "Probes use images of the split 'train'" in caplog.text
    assert "has no split 'validation'" in caplog.text
    found = probed(tmp_path / "mae")[2]
    assert 1 < found["probe_effective_rank"] <= 16
    assert "probe_knn" not in found


def test_images_of_training_are_not_listed_again(make_recipe, tmp_path, monkeypatch):
    write_folder(tmp_path / "images", 24, classes=[""])
    folder, opened = str(tmp_path / "images"), []

    def counted(*args, **kwargs):
        opened.append(args)
        return open_source(*args, **kwargs)

    monkeypatch.setattr(probes, "open_source", counted)
    source, expected = open_source(folder), list(open_source(folder))
    images = open_probe_source(parse_arguments(make_recipe("mae", data=folder)), source)
    assert opened == [(folder, "validation")]  # which is not there
    training = iter(source)
    found = [next(training) for _ in range(10)]
    state = source.dataset.state_dict()
    assert list(images) == expected
    assert source.dataset.state_dict() == state  # the position is the training's own
    assert found + list(training) == expected


def test_other_data_may_be_looked_at(make_recipe, tmp_path):
    write_folder(tmp_path / "images", 24, classes=[""])
    write_folder(tmp_path / "labelled" / "val", 20, classes=["a", "b"])
    recipe = make_recipe("mae", data=str(tmp_path / "images"), max_steps=2)
    pretrain(recipe | {"probe_data": str(tmp_path / "labelled")})
    assert 0 <= probed(tmp_path / "mae")[2]["probe_knn"] <= 1
    with pytest.raises(ValueError, match="no/such/folder"):
        pretrain(recipe | {"probe_data": "no/such/folder", "overwrite_output_dir": True})


def test_what_cannot_be_probed_does_not_end_training(make_recipe, tmp_path, monkeypatch, caplog):
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    broken = (tmp_path / "image.png").read_bytes()[:40]
    Dataset.from_list([{"image": broken}] * 20).to_parquet(tmp_path / "broken.parquet")
    summary = pretrain(make_recipe("mae", probe_data=str(tmp_path / "broken.parquet"), max_steps=2))
    assert "Step 0 is not probed: none of its images can be read" in caplog.text
    assert summary["num_steps"] == 2
    assert summary["probe"] == {}
    monkeypatch.setattr(probes, "feature_statistics", lambda *args: 1 / 0)
    assert pretrain(make_recipe("mae", max_steps=2, overwrite_output_dir=True))["num_steps"] == 2
    assert "Step 2 is not probed: division by zero" in caplog.text


def test_features_that_are_not_finite_have_no_figures():
    features = torch.randn(6, 4)
    metrics = feature_statistics(features, features * math.nan)
    assert set(metrics) == set(feature_statistics(features, features))
    assert all(math.isnan(value) for value in metrics.values())
    assert accuracy(features * math.inf, torch.tensor([0, 0, 1, 1, 0, 1])) == {}


def test_accuracy_is_of_each_half_by_the_other():
    labels = torch.arange(45) // 2 % 3
    features = nn.functional.one_hot(labels, 5).float()
    assert accuracy(features, labels) == {"knn": 1.0, "linear": 1.0}
    features[0] = features[2]  # one in the wrong place
    assert accuracy(features, labels) == pytest.approx({"knn": 44 / 45, "linear": 44 / 45})
    assert accuracy(features, labels * 0) == {}
    assert accuracy(features[:2], labels[:2]) == {}
    assert accuracy(features[:0], labels[:0]) == {}


def test_randomness_and_modes_are_as_before():
    module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.Dropout()))
    module[1][0].eval()
    modes = [part.training for part in module.modules()]

    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    expected = draw()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    with contextlib.suppress(KeyError), preserved_randomness(torch.device("cpu")), frozen(module):
        assert draw() == expected
        assert not any(part.training for part in module.modules())
        raise KeyError
    assert draw() == expected
    assert [part.training for part in module.modules()] == modes


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"max_steps": 5000}, 500),
        ({"max_steps": 600}, 240),  # 240 steps of 32 images are 30 times 256 probed ones
        ({"max_steps": 600, "gradient_accumulation_steps": 4}, 60),
        ({"max_steps": 5005, "num_probe_examples": 2}, 501),
        ({"max_steps": 600, "probe_steps": 7}, 7),
    ],
)
def test_probes_are_as_frequent_as_they_are_cheap(changes, steps):
    args = parse_arguments({"use_cpu": True, "per_device_train_batch_size": 32, **changes})
    assert probe_interval(args) == steps


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"on_collapse": "halt"}, "on_collapse must be warn, stop or ignore, but is 'halt'"),
        ({"probe_steps": -1}, "probe_steps must be 0 or more .* but are -1"),
        ({"num_probe_examples": 1}, "num_probe_examples 2 or more, but are None and 1"),
    ],
)
def test_wrong_arguments_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        parse_arguments({"max_steps": 1, "use_cpu": True, **changes})
