"""Exports predict what their models predict, with and without torch, and what differs leaves nothing."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as coco_mask
from PIL import Image
from tiny import SPARSE, TINY, batch, build, perturb

from hf_vlm.cli.export import default_folder
from hf_vlm.cli.main import main
from hf_vlm.data.images import first_images
from hf_vlm.data.sources import open_source
from hf_vlm.deploy import export as exporting
from hf_vlm.deploy.export import ExportData, export_model, recorded_data
from hf_vlm.deploy.predict import Predictor
from hf_vlm.deploy.push import files_to_push, writes_card
from hf_vlm.features.export_formats import FORMATS, find_precision
from hf_vlm.features.exported import ExportedVisionModel
from hf_vlm.features.loading import load_model
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.registry import find_model

DATA = ExportData("scenes:easy", num_examples=8)
# What predict.py must do without.
NO_TORCH = """
import json, runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "hf_vlm", "cv2", "scipy"):
            raise ModuleNotFoundError(f"{name} is blocked by the test", name=name)
sys.meta_path.insert(0, Blocked())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def save_trained(name, folder, *, num_steps):
    """A tiny model that has learned one batch: of random weights many outputs nearly tie."""
    model, inputs = build(name), batch(name)
    perturb(model, 0.1)
    if "labels" in inputs:
        optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(num_steps):
            optimiser.zero_grad()
            model(**inputs).loss.backward()
            optimiser.step()
    model.eval().save_pretrained(folder)
    entry = find_model(TINY[name].row)
    entry.processor_class(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for index, size in enumerate([(60, 90), (40, 30), (32, 32)]):
        noise = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        noise.resize(size[::-1]).save(folder / f"{index}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_trained("classification", tmp_path_factory.mktemp("runs") / "tiny", num_steps=20)


@pytest.fixture(scope="module")
def exported(run):
    """The classifier in ONNX: the one export of the default suite."""
    folder = run.with_name("tiny-onnx")
    export_model(run, folder, data=DATA)
    return folder


def check_predictions(run, folder, photos, threshold=None):
    """Whether the model, its export in hf_vlm and predict.py find the same."""
    expected, found = (
        Predictor.from_pretrained(path, device="cpu").predict(photos, threshold) for path in (run, folder)
    )
    command = [sys.executable, "-c", NO_TORCH, str(folder / "predict.py"), *map(str, photos)]
    command += [] if threshold is None else ["--threshold", str(threshold)]
    done = subprocess.run(
        [*command, "--num_threads", "1"], capture_output=True, text=True, cwd=folder.parent, timeout=100
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for one, other, line in zip(expected, found, lines, strict=True):
        np.testing.assert_array_equal(other.labels, one.labels)
        np.testing.assert_allclose(other.scores, one.scores, atol=1e-4)
        record = one.to_dict()
        key = "classes" if one.boxes is None else "detections"
        assert (line["path"], line["height"], line["width"]) == (record["path"], record["height"], record["width"])
        assert [entry["label_id"] for entry in line[key]] == [entry["label_id"] for entry in record[key]]
        for entry, reference in zip(line[key], record[key], strict=True):
            value = "fraction" if one.segmentation is not None else "score"
            assert entry["label"] == reference["label"]
            assert entry[value] == pytest.approx(reference[value], abs=2e-4)
        if one.boxes is not None:
            np.testing.assert_allclose(other.boxes, one.boxes, atol=0.02)
            boxes = [list(entry["box"].values()) for entry in line[key]]
            np.testing.assert_allclose(np.reshape(boxes, (-1, 4)), one.boxes, atol=0.02)
        if one.masks is not None:
            assert (other.masks == one.masks).mean() > 0.999
            for entry, mask in zip(line[key], one.masks, strict=True):
                assert (coco_mask.decode(entry["mask"]) == mask).mean() > 0.999
        if one.segmentation is not None:
            assert (other.segmentation == one.segmentation).mean() > 0.999


def test_an_export_predicts_what_its_model_predicts(run, exported, photos):
    check_predictions(run, exported, photos)
    assert not (exported.parent / ".partial").exists()


def test_what_is_in_the_folder(exported):
    record = json.loads((exported / "parity.json").read_text())
    assert (record["format"], record["precision"], record["task"]) == ("onnx", "fp32", "image-classification")
    assert record["num_images"] == 16
    assert record["max_difference"] <= 1e-4
    assert record["agreement"] == 1.0
    assert record["metric"] is None  # scenes have other classes
    size = sum((exported / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert record["megabytes"] == pytest.approx(size / 1e6, abs=0.02)
    assert (exported / "predict.py").read_bytes() == Path(exporting.runtime.__file__).read_bytes()
    card = (exported / "README.md").read_text()
    assert "library_name: onnx" in card
    assert "cat, dog, bird" in card
    assert "| largest difference of outputs |" in card
    processor = json.loads((exported / "preprocessor_config.json").read_text())
    assert '<canvas width="32" height="32">' in card  # of the snippet for browsers
    assert f"const mean = {processor['image_mean']}, std = {processor['image_std']};" in card


def test_what_differs_leaves_nothing(run, exported, tmp_path, monkeypatch):
    """The program of another model, in place of that of the run."""
    other = Path(shutil.copytree(run, tmp_path / "other"))
    model = load_model(other).model
    perturb(model, 0.01)
    model.save_pretrained(other)
    program = load_model(exported).model.program
    monkeypatch.setattr(exporting, "_export", lambda *arguments: program)
    with pytest.raises(
        ValueError, match=r"does not pass the gate: its outputs differ by .* \(at most 0\.0001 is allowed"
    ):
        export_model(other, tmp_path / "out", data=DATA)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]
    assert main(["export", str(other), "--data", "scenes:easy", "--output_dir", str(tmp_path / "out")]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


def test_an_export_is_pushed_without_what_else_lies_there(exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    (folder / "notes.txt").write_text("private")
    (folder / "__pycache__").mkdir()
    expected = {path.name for path in exported.iterdir() if path.name != "README.md"}
    assert set(files_to_push(folder)) == expected >= {"model.onnx", "model.onnx.data", "export.json", "predict.py"}
    assert not writes_card(folder)


def test_batches_larger_than_a_program_takes_are_cut(run):
    """As those of ExecuTorch, which plans its memory ahead."""
    model = load_model(run).model
    sizes = []

    def program(pixel_values):
        sizes.append(pixel_values.shape[0])
        return model(pixel_values)

    program.config, program.device = model.config, "cpu"
    images = torch.randn(7, 3, 32, 32)
    with torch.inference_mode():
        found = ExportedVisionModel(program, largest_batch=3)(pixel_values=images)
        assert sizes == [3, 3, 1]
        torch.testing.assert_close(found.logits, model(images).logits)
        assert type(found) is type(model(images))


def test_a_damaged_program_is_named(exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "damaged"))
    (folder / "model.onnx").write_bytes(b"no program")
    with pytest.raises(ValueError, match="damaged holds no program that onnx can run"):
        load_model(folder)
    (folder / "export.json").write_text("{}")
    with pytest.raises(ValueError, match=r"export\.json cannot be read"):
        load_model(folder)


def test_what_cannot_be_exported_is_refused_before_anything_is_loaded(exported, tmp_path):
    with pytest.raises(ValueError, match=r"no export format 'tflite'\. There are: onnx, openvino, torch, executorch"):
        export_model("nowhere", tmp_path / "out", format="tflite")
    with pytest.raises(
        ValueError, match=r"onnx is not exported in 'fp8'\. There are: onnx in fp32, int8; openvino in fp32, fp16"
    ):
        export_model("nowhere", tmp_path / "out", precision="fp8")
    with pytest.raises(ValueError, match="exists: name another folder with --output_dir"):
        export_model("nowhere", exported)
    with pytest.raises(ValueError, match="tiny-onnx is an export: name the run that it came from"):
        export_model(exported, tmp_path / "out")


def test_a_sparse_encoder_is_refused(tmp_path):
    build("encoder", backbone=SPARSE).save_pretrained(tmp_path / "run")
    VLMViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match="run has a sparse encoder, which is not exported"):
        export_model(tmp_path / "run", tmp_path / "out")


def test_the_data_of_a_run_or_scenes(tmp_path, caplog):
    assert recorded_data(tmp_path) is None
    (tmp_path / "recipe.yaml").write_text("{data: 'scenes:easy', eval_split: validation}")
    assert recorded_data(tmp_path) == ExportData("scenes:easy", "validation")
    (tmp_path / "recipe.yaml").write_text("{data: 'scenes:easy', eval_split: validation, holdout: 0.2}")
    held_out = ExportData("scenes:easy", "train", holdout=0.2)
    assert recorded_data(tmp_path) == held_out
    (image,) = held_out.images(1, 3)
    assert np.array_equal(image, first_images(open_source("scenes:easy").holdout(0.2)[1], 1, num_channels=3)[0])
    (tmp_path / "recipe.yaml").write_text("{data: ./gone, eval_split: validation}")
    assert recorded_data(tmp_path) is None
    assert "cannot be opened, so built-in scenes take their place" in caplog.text


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'executorch must be installed .* pip install "hf_vlm\[executorch\]"'):
        export_model("nowhere", "out", format="executorch")
    with pytest.raises(ValueError, match=r'nncf must be installed .* pip install "hf_vlm\[openvino\]"'):
        find_precision("openvino", "int8")


def test_folders_by_default(tmp_path):
    (tmp_path / "detector").mkdir()
    assert default_folder(str(tmp_path / "detector"), "onnx", "fp32") == tmp_path / "detector-onnx"
    assert default_folder(str(tmp_path / "detector") + "/", "onnx", "int8") == tmp_path / "detector-onnx-int8"
    assert default_folder("org/detector", "openvino", "bf16") == Path("runs/detector-openvino-bf16")


# --- exports of every task and format take seconds each


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["detection", "instance_segmentation", "semantic_segmentation", "mask_query_segmentation"]
)
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_every_task(name, format, tmp_path, photos):
    run = save_trained(name, tmp_path / "run", num_steps=60)
    export_model(run, tmp_path / "out", format=format, data=DATA)
    check_predictions(run, tmp_path / "out", photos, threshold=0.2)
    assert "predict.py" in files_to_push(tmp_path / "out")  # nothing that its configuration names is missing


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None,
    reason='executorch is not installed: pip install "hf_vlm[executorch]"',
)
def test_executorch(tmp_path, photos):
    """A detector, whose lists of tensors once fixed the batch, in more images than it takes at a time."""
    run = save_trained("detection", tmp_path / "run", num_steps=60)
    record = export_model(run, tmp_path / "out", format="executorch", data=DATA)
    assert record["max_difference"] <= 1e-4
    images = [*photos] * 4
    expected, found = (
        Predictor.from_pretrained(path, device="cpu").predict(images, 0.2, batch_size=12)
        for path in (run, tmp_path / "out")
    )
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(other.labels, one.labels)
        np.testing.assert_allclose(other.scores, one.scores, atol=1e-4)
        np.testing.assert_allclose(other.boxes, one.boxes, atol=0.02)
    assert not (tmp_path / "out" / "predict.py").exists()


@pytest.mark.slow
def test_an_encoder(tmp_path, photos):
    run = save_trained("encoder", tmp_path / "run", num_steps=0)
    export_model(run, tmp_path / "out", data=DATA)
    loaded = load_model(run)
    found = exporting.runtime.Runtime(tmp_path / "out", num_threads=1).predict(photos[0])
    with torch.no_grad():
        tokens = loaded.model(**loaded.processor(Image.open(photos[0]), return_tensors="pt")).last_hidden_state
    expected = tokens[0, loaded.model.config.num_prefix_tokens :].mean(dim=0)
    np.testing.assert_allclose(found["features"], expected, atol=1e-4)


# Of int8 the gate's agreement alone is asked for: in a model 32 wide, noise has classes that nearly tie.
SCORE_TOLERANCE = {"fp32": 1e-4, "fp16": 0.01, "bf16": 0.05}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "precision"),
    [(name, precision) for name in ("onnx", "openvino", "torch") for precision in FORMATS[name].precisions],
)
def test_every_precision(run, format, precision, tmp_path, photos):
    record = export_model(run, tmp_path / "out", format=format, precision=precision, data=DATA)
    assert record["agreement"] >= 0.9
    if precision not in SCORE_TOLERANCE:
        return
    expected, found = (
        Predictor.from_pretrained(path, device="cpu").predict(photos) for path in (run, tmp_path / "out")
    )
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(other.labels, one.labels)
        np.testing.assert_allclose(other.scores, one.scores, atol=SCORE_TOLERANCE[precision])


@pytest.mark.slow
def test_the_metric_is_measured_on_the_artifact(tmp_path):
    """Class names of the scenes, so that they serve as labelled data."""
    names = {str(index): str(index) for index in range(5)}
    run = save_trained("classification", tmp_path / "run", num_steps=0)
    config = json.loads((run / "config.json").read_text())
    build("classification", id2label=names).save_pretrained(run)
    assert config["id2label"] != names
    record = export_model(run, tmp_path / "out", data=DATA)
    assert record["metric"]["name"] == "top1"
    assert record["metric"]["after"] == record["metric"]["before"]
    assert main(["evaluate", str(tmp_path / "out"), "--data", "scenes:easy", "--num_examples", "8"]) == 0


@pytest.mark.slow
def test_a_pipeline_without_hf_vlm(exported, photos, run_process, tmp_path):
    """The folder is loaded by transformers alone, in a process that finds no hf_vlm."""
    printed = run_process(
        f"""
        from transformers import AutoImageProcessor, pipeline
        from transformers.exporters import ExportedModel

        model = ExportedModel.from_pretrained({str(exported)!r}, trust_remote_code=True)
        processor = AutoImageProcessor.from_pretrained({str(exported)!r}, trust_remote_code=True)
        found = pipeline("image-classification", model=model, image_processor=processor)({str(photos[0])!r})
        print(found[0]["label"], found[0]["score"])
        """,
        tmp_path,
        forbid_hf_vlm=True,
        OMP_NUM_THREADS="1",
    )
    label, score = printed.split()[-2:]
    best = Predictor.from_pretrained(exported).predict(photos[0])[0]
    assert (label, float(score)) == (best.label_names[0], pytest.approx(float(best.scores[0]), abs=1e-4))
