"""A Space has all that it needs, and runs as it was pushed."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from hf_vlm.deploy.predict import Predictor
from hf_vlm.deploy.space import space_upload

ROOT = Path(__file__).parents[2]
PUSH = """
from hf_vlm.deploy.hub import Repository
from hf_vlm.deploy.space import space_upload
for _ in range(2):
    upload = space_upload("detector", "me/demo", examples=["photos"])
    Repository("me/demo", type="space").send(upload, message="space")
"""
# The page itself is gradio's; what it is given is what a Space decides.
RUN = """
import json, pathlib, runpy, sys, types
from huggingface_hub import snapshot_download
space = pathlib.Path(snapshot_download("me/demo", repo_type="space", local_dir="space")).resolve()
sys.path.insert(0, str(space))
def build_app(predictor, examples, name, threshold):
    assert name == 'demo'
    found = [prediction.to_dict() for prediction in predictor.predict(examples, 0.3)]
    return types.SimpleNamespace(launch=lambda: print("RESULT", json.dumps(found)))
sys.modules["hf_vlm.deploy.app"] = types.SimpleNamespace(build_app=build_app)
runpy.run_path(str(space / "app.py"), run_name="__main__")
import hf_vlm
assert pathlib.Path(hf_vlm.__file__).is_relative_to(space), hf_vlm.__file__
"""


@pytest.mark.slow
def test_a_pushed_space_predicts_with_its_own_package_and_model(hub_server, run_python, saved_detector, tmp_path):
    here = tmp_path / "elsewhere"
    shutil.copytree(saved_detector, here / "detector")
    (here / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    for name in ("a.PNG", "b.jpg"):
        Image.fromarray(pixels).resize((60, 40)).save(here / "photos" / name)
    run_python(PUSH)
    repo = hub_server.repos["space", "me/demo"]
    assert len(repo.messages) == 2  # the second push had nothing to send
    files = hub_server.files("me/demo", kind="space")
    assert {"app.py", "requirements.txt", "model/config.json", "hf_vlm/__init__.py", "examples/00.png"} <= set(files)
    found = json.loads(run_python(RUN, token=None).split("RESULT ")[1].splitlines()[0])
    expected = [item.to_dict() for item in Predictor.from_pretrained(saved_detector).predict([here / "photos"], 0.3)]
    assert len(expected[0]["detections"]) >= 1
    for one, other in zip(found, expected, strict=True):
        assert [item["label"] for item in one["detections"]] == [item["label"] for item in other["detections"]]
        scores = [[item["score"] for item in record["detections"]] for record in (one, other)]
        np.testing.assert_allclose(*scores, atol=1e-5)


def test_what_a_space_needs_is_pinned_and_installed_from_where_it_is_named(detector_run, encoder_run):
    files = space_upload(detector_run, "me/demo").files
    header = yaml.safe_load(re.match(r"---\n(.*?)---\n", files["README.md"].decode(), re.DOTALL)[1])
    assert (header["sdk"], header["app_file"], header["license"]) == ("gradio", "app.py", "apache-2.0")
    assert re.fullmatch(r"\d+\.\d+\.\d+", header["sdk_version"])
    requirements = files["requirements.txt"].decode().splitlines()
    assert requirements[0] == "--extra-index-url https://download.pytorch.org/whl/cpu"
    assert all(re.fullmatch(r"[\w-]+==[\w.]+(\+cpu)?", line) for line in requirements[1:])
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"gradio=={header['sdk_version']}" in constraints
    assert not [line for line in requirements if line.startswith("hf_vlm")]  # no registry decides what that is
    assert not [name for name in files if "__pycache__" in name]
    (detector_run / "export.json").write_text(
        json.dumps({"components": {"m": {"file": "model.safetensors"}}, "export_format": ""})
    )
    (detector_run / "parity.json").write_text('{"format": "onnx"}')
    exported = space_upload(detector_run, "me/demo").files["requirements.txt"].decode().splitlines()
    assert [line.partition("==")[0] for line in exported if line not in requirements] == ["onnxruntime"]
    (detector_run / "export.json").unlink()
    record = json.loads((encoder_run / "run.json").read_text())
    (encoder_run / "run.json").write_text(json.dumps(record | {"origins": ["org/dinov2"]}))
    with pytest.raises(ValueError, match="trained with weights of org/dinov2: name with --license"):
        space_upload(encoder_run, "me/demo")
    with pytest.raises(ValueError, match="There are no images at"):
        space_upload(detector_run, "me/demo", examples=["nothing/*"])
