"""The benchmark of label efficiency: what it runs, keeps and reports, and its arms that are no commands of hf_vlm."""

import importlib
import json
import sys
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from hf_vlm.data.sources import open_source
from hf_vlm.training.recipe import load_recipe

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """A function that imports a script, which finds its neighbours as if it were run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def script(module):
    return module("label_efficiency")


@pytest.fixture
def report(module):
    return module("label_efficiency_report")


@pytest.fixture
def lab(module, tmp_path):
    data = module("label_efficiency_data")
    return module("label_efficiency_runs").Lab(tmp_path, {"scenes": data.quick(data.SETS["scenes"])})


@pytest.fixture
def results(script, report, tmp_path):
    """A file of results: two seeds of two arms at 10 labels, one seed of one arm at all of them."""
    path = tmp_path / "results.jsonl"
    rows = [("10", "random", 0, 0.1), ("10", "random", 1, 0.2), ("10", "pretrained", 0, 0.25)]
    for labels, arm, seed, ap in [*rows, ("10", "pretrained", 1, 0.27), ("all", "random", 0, 0.5)]:
        number = {"10": 10, "all": 205}[labels]
        row = {"set": "bccd", "labels": labels, "arm": arm, "seed": seed, "num_labelled": number}
        script.add_result(path, row | {"metrics": {"ap": ap, "ap50": 2 * ap}})
    return path


def test_the_report_has_means_and_deviations_over_the_seeds(script, report, results, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", "--report", "--results", str(results)])
    with pytest.raises(SystemExit, match="0"):
        script.main()
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines == [
        "| set/labels | metric | random | pretrained |",
        "| --- | --- | ---: | ---: |",
        "| bccd/10 | ap | 0.150 ± 0.071 (2) | 0.260 ± 0.014 (2) |",
        "| bccd/all | ap | 0.500 ± 0.000 (1) |  |",
    ]
    found = json.loads(last)
    assert found.pop("random") == {"bccd/10": 0.15, "bccd/all": 0.5}
    assert found.pop("pretrained") == {"bccd/10": 0.26}
    assert found == {"transformers": {}, "distilled": {}, "task_distilled": {}, "prototypes": {}}


def test_the_picture_has_a_line_with_a_band_for_each_arm(report, results, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, dpi: figures.append(self))
    report.plot(tmp_path / "plot.png", report.read_results(results))
    (axis,) = figures[0].axes
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert lines["random"].get_xydata() == pytest.approx(np.array([[10, 0.15], [205, 0.5]]))
    assert lines["pretrained"].get_xydata() == pytest.approx(np.array([[10, 0.26]]))
    band = axis.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((0.15 - 0.0707, 0.5), abs=1e-4)


@pytest.mark.parametrize(
    ("name", "ap", "text"),
    [
        ("bccd/10/random/1", 0.25, "the results have 0.2000; within two standard deviations of 2 seeds"),
        ("bccd/10/random/2", 0.31, "the results have nothing; OUTSIDE of two standard deviations"),
        ("bccd/all/random/0", 0.5, "1 seeds of this point: no spread"),
    ],
)
def test_a_run_that_is_run_again_is_compared_with_its_seeds(script, report, results, name, ap, text):
    run = script.Run.parse(name, script.SETS)
    assert str(run) == name
    assert text in report.verdict(report.read_results(results), run, ap)


@pytest.mark.parametrize("name", ["bccd/10/random", "bccd/10/random/x", "bccd/11/random/0", "bccd/10/best/0"])
def test_a_name_of_no_run_is_an_error(script, name):
    with pytest.raises(ValueError, match=name):
        script.Run.parse(name, script.SETS)


def test_a_damaged_line_is_named(report, results):
    with results.open("a") as file:
        file.write('{"set": "bccd"')
    with pytest.raises(ValueError, match="line 6"):
        report.read_results(results)


def test_finished_runs_are_not_run_again_and_a_failed_one_stops_no_other(script, report, results, lab, monkeypatch):
    before = results.read_text()
    runs = script.pending(report.read_results(results), ["bccd"], ["10"], ["random", "pretrained"], 3)
    assert list(map(str, runs)) == ["bccd/10/random/2", "bccd/10/pretrained/2"]

    def result_of(lab, run):
        if run.arm == "random":
            raise ValueError("no memory")
        parts = dict(zip(("set", "labels", "arm", "seed"), run))
        return {**parts, "num_labelled": 10, "metrics": {"ap": 0.3}, "seconds": 1.0}

    monkeypatch.setattr(script, "result_of", result_of)
    assert script.run_all(lab, runs, results, num_jobs=2) == 1
    found = report.read_results(results)
    assert results.read_text().startswith(before)
    assert script.pending(found, ["bccd"], ["10"], ["random", "pretrained"], 3) == runs[:1]


def test_only_runs_a_point_again_but_adds_new_points_alone(script, report, results, lab, monkeypatch, capsys):
    monkeypatch.setattr(script, "result_of", lambda lab, run: {**json.loads(before[1]), "seed": run.seed})
    before = results.read_text().splitlines()
    old, new = (script.Run("bccd", "10", "random", seed) for seed in (1, 2))
    lab.run_folder(old).mkdir(parents=True)
    script.run_again(lab, old, results)
    assert not lab.run_folder(old).exists()  # else the finished run would be read
    assert results.read_text().splitlines() == before
    script.run_again(lab, new, results)
    assert results.read_text().splitlines()[:-1] == before
    assert report.read_results(results)[new]["metrics"]["ap"] == 0.2
    assert "the results have 0.2000; within" in capsys.readouterr().out


def test_a_command_that_fails_names_its_log(lab, tmp_path):
    with pytest.raises(RuntimeError, match=r"status 3: see .*run\.log"):
        lab.execute(tmp_path / "run", ["-c", "print('no memory'); raise SystemExit(3)"])
    assert (tmp_path / "run.log").read_text() == "no memory\n"


def test_seed_0_of_all_sets_comes_first(script):
    runs = script.pending([], ["bccd", "scenes"], ["10", "50"], ["random", "pretrained"], 2)
    assert [str(run) for run in runs[:3]] == ["bccd/10/random/0", "scenes/10/random/0", "bccd/10/pretrained/0"]
    assert [run.seed for run in runs] == [0] * 8 + [1] * 8


def test_a_command_is_run_until_it_has_finished_and_then_no_more(lab, tmp_path):
    folder, ran = tmp_path / "set" / "run", tmp_path / "ran"
    code = (
        "import json, os, pathlib, sys\n"
        f"path = pathlib.Path({str(ran)!r}); path.write_text((path.read_text() if path.exists() else '') + 'x')\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--output_dir') + 1]); folder.mkdir(exist_ok=True)\n"
        "finished = len(path.read_text()) == 2\n"
        "(folder / 'run.json').write_text(json.dumps({'finished': finished, 'cores': os.environ['OMP_NUM_THREADS']}))"
    )
    assert [lab.execute(folder, ["-c", code])["finished"] for _ in range(4)] == [False, True, True, True]
    assert lab.execute(folder, ["-c", code])["cores"] == "1"
    assert ran.read_text() == "xx"


def test_the_labelled_images_of_a_seed_are_part_of_those_of_more_labels(module):
    rows = module("label_efficiency_data").labelled_rows
    few, more, most = (rows(1000, labels, 0, 200) for labels in ("10", "50", "all"))
    assert (len(few), len(more), len(most)) == (10, 50, 200)
    assert set(few) < set(more) < set(most) < set(range(1000))
    assert rows(1000, "10", 1) != few
    assert rows(30, "all", 0) == list(range(30))


def test_the_labelled_images_of_a_classifier_are_as_many_of_each_class(module):
    rows = module("label_efficiency_data").labelled_rows
    classes = [index % 3 for index in range(300)]
    few, more = (rows(300, labels, 0, 200, classes) for labels in ("10", "50"))
    assert set(few) < set(more)
    assert [[classes[row] for row in found].count(1) for found in (few, more)] == [10, 50]
    assert len(rows(300, "all", 0, 200, classes)) == 200


def test_masks_of_values_without_a_name_have_no_class(module):
    values = np.arange(13, dtype=np.uint8).reshape(1, 13)
    file = BytesIO()
    Image.fromarray(values).save(file, "png")
    changed = module("label_efficiency_data")._without_others({"bytes": file.getvalue(), "path": None}, 11)
    assert np.asarray(Image.open(BytesIO(changed["bytes"]))).tolist() == [[*range(11), 255, 255]]


def test_arms_of_detectors_are_not_run_for_other_tasks(script):
    runs = script.pending([], ["cifar10", "scenes"], ["10"], list(script.ARMS), 1)
    assert [run.arm for run in runs if run.data == "cifar10"] == ["random", "pretrained", "distilled"]
    assert len([run for run in runs if run.data == "scenes"]) == len(script.ARMS)


@pytest.mark.parametrize("data", ["nuclei_masks", "camvid_pixels", "cifar10"])
def test_the_recipes_of_other_tasks_take_their_keys(module, data):
    words, settings = module("label_efficiency_data").as_words, module("label_efficiency_data").SETS[data]
    head = settings.head if settings.task.pretrains_head else {}
    load_recipe(settings.task.pretraining, words(settings.encoder | head | settings.pretraining))
    load_recipe(settings.task.recipe, words(settings.encoder | settings.head | settings.training))


def test_folders_hold_the_labelled_images_of_the_pool_and_unlabelled_ones_without_boxes(lab, script):
    run = script.Run("scenes", "10", "random", 0)
    labelled, unlabelled = lab.data(run)
    pool = {example["image_id"]: example for example in open_source(labelled.parent / "pool")}
    assert len(pool) == 40
    found = list(open_source(labelled))
    assert len(found) == lab.num_labelled(run) == 10
    assert all(example == pool[example["image_id"]] for example in found)
    assert open_source(labelled, "test").num_examples == 8
    assert list(open_source(unlabelled)) == [{name: e[name] for name in ("image", "image_id")} for e in pool.values()]


def test_the_commands_of_the_arms(lab, script, monkeypatch):
    commands = []

    def execute(self, folder, words):
        commands.append((folder.relative_to(self.folder).as_posix(), list(words)))
        return {"seconds": 1.0}

    monkeypatch.setattr(type(lab), "execute", execute)
    monkeypatch.setattr(type(lab), "data", lambda self, run: (Path("labelled"), Path("unlabelled")))
    found = {}
    for arm, commands_of in script.ARMS.items():
        commands.clear()
        commands_of(lab, script.Run("scenes", "10", arm, 2))
        found[arm] = list(commands)
    (random,) = found["random"]
    assert random[0] == "scenes/10/random-2"
    recipe = load_recipe(random[1][3], random[1][4:])  # refuses keys that there are none of
    assert (recipe["data"], recipe["seed"], recipe["image_size"]) == ("labelled", 2, 96)
    assert recipe["augmentation"]["jitter"] == load_recipe(random[1][3], [])["augmentation"]["jitter"]
    pretraining, tuning = found["pretrained"]
    assert pretraining[0] == "scenes/own-2"
    assert pretraining[1][pretraining[1].index("--data") + 1] == "unlabelled"
    encoder = ["--encoder", str(lab.folder / "scenes" / "own-2")]
    assert tuning[1] == random[1] + encoder
    folders, words = zip(*found["task_distilled"])
    assert folders[:2] == ("scenes/own-2", "scenes/10/pretrained-2")
    objects = ["--unlabelled_data", "unlabelled", "--labels_from", str(lab.folder / "scenes/10/pretrained-2")]
    assert words[-1] == [*random[1], *encoder, *objects]
    assert found["transformers"][0][1][1:] == random[1][3:]
    assert found["prototypes"][1][1][1:] == random[1][3:] + encoder


def test_box_features_are_means_inside_of_the_box(module):
    prototypes = module("prototypes")
    maps = torch.zeros(1, 2, 8, 8)
    maps[0, 0, 2:6, 4:8] = 1.0
    boxes = torch.tensor([[[0.75, 0.5, 0.25, 0.25], [0.2, 0.5, 0.2, 0.2], [0.5, 0.5, 0.5, 0.25]]])
    assert prototypes.box_features(maps, boxes)[0, :, 0].tolist() == pytest.approx([1.0, 0.0, 0.5], abs=0.02)
    outside = prototypes.is_outside(torch.tensor([[0.75, 0.5, 0.5, 0.5]]), 8, 8)
    assert torch.equal(outside, maps[0, 0] == 0)


def test_prototypes_give_boxes_the_classes_of_like_features(module):
    """Two classes that are two directions of the features, and a background that is a third."""
    prototypes = module("prototypes")
    boxes = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.75, 0.75, 0.25, 0.25], [0.25, 0.75, 0.25, 0.25]])
    maps = torch.zeros(1, 3, 16, 16)
    maps[:, 2] = 1.0
    for channel, (rows, columns) in enumerate(((slice(2, 6), slice(2, 6)), (slice(10, 14), slice(10, 14)))):
        maps[0, 2, rows, columns], maps[0, channel, rows, columns] = 0.0, 1.0

    class Detector(nn.Module):
        config = SimpleNamespace(backbone_config=SimpleNamespace(hidden_size=3))

        def backbone(self, pixel_values):
            return SimpleNamespace(feature_maps=[maps])

        def forward(self, pixel_values):
            return SimpleNamespace(logits=torch.zeros(1, 3, 1), pred_boxes=boxes[None])

    model = prototypes.PrototypeDetector(Detector(), 2)
    model.add(torch.zeros(1), [{"boxes": boxes[:2], "class_labels": torch.tensor([0, 1])}])
    scores = model(torch.zeros(1)).logits[0].sigmoid()
    assert scores.tolist() == [pytest.approx(row, abs=1e-3) for row in ([0.5, 0.0], [0.0, 0.5], [0.0, 0.0])]


def test_d_fine_sees_the_pixels_of_its_own_image_processor(module):
    script = module("transformers_detector")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "png")
    processor = script.RTDetrImageProcessorPil(size={"height": 32, "width": 64})
    arm = SimpleNamespace(args=SimpleNamespace(augmentation={}, image_hw=(32, 64)), class_names=["a"])
    objects = {"bbox": [[16.0, 8.0, 32.0, 16.0]], "category": [0], "area": [512.0], "iscrowd": [0]}
    example = {"image": {"bytes": file.getvalue(), "path": None}, "image_id": 3, "objects": objects}
    ours = script.transform_like(processor, arm, train=False)(example, np.random.default_rng(0))
    annotation = {
        "bbox": [16.0, 8.0, 32.0, 16.0],
        "category_id": 0,
        "area": 512.0,
        "iscrowd": 0,
        "image_id": 3,
        "id": 1,
    }
    theirs = processor(
        Image.fromarray(pixels), annotations={"image_id": 3, "annotations": [annotation]}, return_tensors="pt"
    )
    assert torch.allclose(ours["pixel_values"], theirs["pixel_values"][0], atol=1e-6)
    for name in ("boxes", "class_labels"):
        assert torch.equal(ours["labels"][name], theirs["labels"][0][name])


def test_d_fine_trains_every_parameter_at_the_official_rates(module):
    script = module("transformers_detector")
    model = script.DFineForObjectDetection(script.dfine_config(10, ["a", "b"]))
    groups = script.parameter_groups(model, 1.0)
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(map(id, model.parameters()))
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        decay = 0.0 if parameter.ndim < 2 else 1e-4
        assert rates[id(parameter)] == (0.5 if ".backbone." in name else 1.0, decay), name
