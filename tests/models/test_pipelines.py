"""transformers' pipelines and Auto classes on saved folders, with the package and without it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import build, perturb
from transformers import AutoConfig, AutoModel, pipeline

from hf_vlm.registry import MODELS, find_model
from hf_vlm.tasks import TASKS

WITH_PIPELINE = (
    *("encoder", "detection", "instance_segmentation", "classification"),
    *("semantic_segmentation", "mask_query_segmentation"),
)


def save(name, folder, **settings):
    """A tiny model with its image processor and five images of different sizes; the rows of the detector differ."""
    model, entry = build(name).eval(), find_model(name)
    perturb(model)
    model.save_pretrained(folder)
    entry.processor_class(size={"height": 32, "width": 32}, **settings).save_pretrained(folder)
    return TASKS[entry.task].pipeline


def images():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (40 + 8 * i, 60, 3), dtype=np.uint8)) for i in range(5)]


def options(name):
    instances = {"threshold": 0.0, "overlap_mask_area_threshold": 0.0}
    return {
        "detection": {"threshold": 0.0},
        "instance_segmentation": instances,
        "classification": {"top_k": 3},
    }.get(name, {})


def numbers(results):
    """All numbers of nested results, in their order, and all names; of a mask the means of its columns."""
    if isinstance(results, Image.Image):
        results = np.asarray(results).mean(axis=0).tolist()
    if isinstance(results, dict):
        results = [results[key] for key in sorted(results)]
    if isinstance(results, list):
        parts = [numbers(result) for result in results]
        return [value for values, _ in parts for value in values], [name for _, names in parts for name in names]
    return ([], [results]) if isinstance(results, str | None) else ([results], [])


@pytest.mark.parametrize("name", WITH_PIPELINE)
def test_a_batch_gives_what_images_give_one_by_one(name, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", asked.append)
    found = pipeline(save(name, tmp_path), model=str(tmp_path))
    assert asked == []  # whether code of the folder may be run: it is installed
    one_by_one = [found(image, **options(name)) for image in images()]
    in_batches = found(images(), batch_size=3, **options(name))
    (values, names), (expected, expected_names) = numbers(in_batches), numbers(one_by_one)
    assert len(values) > 10
    assert names == expected_names
    torch.testing.assert_close(values, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("entry", MODELS, ids=lambda entry: entry.name)
def test_all_auto_classes_are_named_for_remote_code(entry, tmp_path):
    model = build(entry.name, tmp_path)
    model.save_pretrained(tmp_path / "saved")
    auto_map = json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"]
    module = entry.model_class.__module__.rpartition(".")[2]
    names = {"AutoConfig", "AutoModel", entry.auto_class.__name__}
    names |= {entry.pipeline_class.__name__} if entry.pipeline_class else set()
    assert set(auto_map) == (names | {"AutoBackbone"} if entry.name in ("encoder", "backbone") else names)
    assert auto_map[entry.auto_class.__name__] == f"{module}.{entry.model_class.__name__}"
    if entry.name != "backbone":
        assert type(AutoModel.from_pretrained(tmp_path / "saved")) is entry.model_class

    again = type(model).from_pretrained(pretrained_model_name_or_path=tmp_path / "saved")
    again.save_pretrained(tmp_path / "again")
    assert AutoConfig.from_pretrained(tmp_path / "again").auto_map == auto_map


WITHOUT_THE_PACKAGE = """
import json, numpy as np
from PIL import Image
from transformers import AutoBackbone, AutoModel, pipeline
from huggingface_hub import HfApi
generator = np.random.default_rng(0)
images = [Image.fromarray(generator.integers(0, 255, (40 + 8 * i, 60, 3), dtype=np.uint8)) for i in range(5)]
results = {}
for name, (task, folder, options) in json.loads(MODELS).items():
    found = pipeline(task, model=folder, trust_remote_code=True)
    results[name] = found(images, batch_size=3, **options)
    results[name + " class"] = type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__
HfApi().create_repo("me/encoder")
HfApi().upload_folder(repo_id="me/encoder", folder_path=folder)
results["backbone class"] = type(AutoBackbone.from_pretrained("me/encoder", trust_remote_code=True)).__name__
print(json.dumps(results, default=lambda mask: np.asarray(mask).mean(axis=0).tolist()))
"""


def test_pipelines_and_auto_classes_without_the_package(tmp_path, hub, run_process):
    hub.clear()
    models, expected = {}, {}
    for name in reversed(WITH_PIPELINE):  # the encoder last: it is uploaded
        padding = {"do_pad": True} if name in ("detection", "semantic_segmentation") else {}
        task = save(name, tmp_path / name, **padding)
        models[name] = (task, str(tmp_path / name), options(name))
        expected[name] = numbers(pipeline(task, model=str(tmp_path / name))(images(), batch_size=3, **options(name)))
    code = f"MODELS = {json.dumps(json.dumps(models))}\n{WITHOUT_THE_PACKAGE}"
    results = json.loads(run_process(code, tmp_path, forbid_hf_vlm=True, token="owner").splitlines()[-1])
    assert results["backbone class"] == "VLMViTBackbone"
    for name, (values, names) in expected.items():
        assert results[f"{name} class"] == find_model(name).model_class.__name__
        found, found_names = numbers(results[name])
        assert found_names == names
        torch.testing.assert_close(found, values, atol=1e-4, rtol=1e-4)
