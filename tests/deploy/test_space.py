"""A Space has all that it needs, and runs as it was pushed; pushes that are interrupted are repeated."""

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from tiny import slow_but

from hf_vlm.deploy import runtime
from hf_vlm.deploy.predict import Predictor
from hf_vlm.deploy.space import space_upload
from hf_vlm.models.image_processing_detection import VLMViTDetectionImageProcessor

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


RUN_EXPORT = """
import json, runpy, sys, types
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "hf_vlm", "huggingface_hub", "cv2", "scipy"):
            raise ModuleNotFoundError(f"{name} is blocked by the test", name=name)
sys.meta_path.insert(0, Blocked())
class Interface:
    def __init__(self, show, inputs, outputs, *, examples, title, **options):
        self.show, self.examples = show, examples
        assert title == "demo"
    def launch(self):
        assert self.show(None, 0.5) == (None, "", None)
        try:
            self.show("requirements.txt", 0.5)
        except gradio.Error as error:
            assert "cannot be read" in str(error)
        for path, start in self.examples:
            (image, marked), text, record = self.show(path, start)
            regions = [region if type(region) is tuple else [region.shape, int(region.sum())] for region, _ in marked]
            print(json.dumps([start, image.shape, regions, [name for _, name in marked], text, record]))
class Error(Exception):
    def __init__(self, text, print_exception): super().__init__(text)
class Component:
    def __init__(self, *arguments, **options): pass
gradio = types.ModuleType("gradio")
gradio.Interface, gradio.Error = Interface, Error
gradio.Image = gradio.Slider = gradio.AnnotatedImage = gradio.Textbox = gradio.JSON = Component
sys.modules["gradio"] = gradio
runpy.run_path("app.py", run_name="__main__")
"""
CLASS_NAMES = {str(index): name for index, name in enumerate(["cat", "dog", "bird"])}
OUTPUTS = {  # of the programs, by the type of the model
    "vlm_vit_detection": {"logits": (6, 3), "pred_boxes": (6, 4)},
    "vlm_vit_instance_segmentation": {"logits": (6, 3), "pred_boxes": (6, 4), "pred_masks": (6, 5, 7)},
    "vlm_vit_semantic_segmentation": {"logits": (3, 4, 6)},
    "vlm_vit_classification": {"logits": (3,)},
}


def save_export(folder, model_type):
    """What `hf-vlm export` writes, around a program that is linear in the mean colour."""
    rng, nodes, weights, outputs = np.random.default_rng(0), [], [], []
    nodes.append(helper.make_node("ReduceMean", ["pixel_values", "axes"], ["mean"], keepdims=0))
    weights.append(numpy_helper.from_array(np.array([2, 3]), "axes"))
    for name, shape in OUTPUTS[model_type].items():
        values = rng.normal(0, 2, (3, int(np.prod(shape)))).astype(np.float32)
        weights.append(numpy_helper.from_array(values, f"{name}_weight"))
        weights.append(numpy_helper.from_array(np.array([-1, *shape]), f"{name}_shape"))
        last = "Sigmoid" if name == "pred_boxes" else "Identity"
        nodes.append(helper.make_node("MatMul", ["mean", f"{name}_weight"], [f"{name}_flat"]))
        nodes.append(helper.make_node("Reshape", [f"{name}_flat", f"{name}_shape"], [f"{name}_linear"]))
        nodes.append(helper.make_node(last, [f"{name}_linear"], [name]))
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape]))
    inputs = [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, 16, 24])]
    graph = helper.make_graph(nodes, "program", inputs, outputs, initializer=weights)
    folder.mkdir()
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    onnx.save(model, folder / "model.onnx")
    config = {"model_type": model_type, "id2label": CLASS_NAMES, "auto_map": {"AutoConfig": "code.Config"}}
    size = {"height": 16, "width": 24}
    processor = VLMViTDetectionImageProcessor(size=size, score_threshold=0.3).to_dict()
    manifest = {"components": {"m": {"file": "model.onnx"}}, "export_format": "onnx"}
    contents = {
        "config.json": config,
        "preprocessor_config.json": processor | {"auto_map": {"AutoImageProcessor": "code.Processor"}},
        "export.json": manifest,
        "parity.json": {"format": "onnx"},
        "run.json": {"origins": []},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "code.py").touch()
    shutil.copyfile(runtime.__file__, folder / "predict.py")


@pytest.mark.parametrize("model_type", slow_but(OUTPUTS, "vlm_vit_instance_segmentation"))
def test_a_pushed_space_of_an_export_runs_without_torch(hub_server, run_python, tmp_path, model_type):
    """From the files on the Hub, in a process that finds neither torch nor transformers nor hf_vlm."""
    here = tmp_path / "elsewhere"
    save_export(here / "detector", model_type)
    (here / "photos").mkdir()
    for number, color in enumerate([(250, 10, 120), (10, 200, 240)]):
        Image.new("RGB", (60, 40), color).save(here / "photos" / f"{number}.png")
    run_python(PUSH)
    repo = hub_server.repos["space", "me/demo"]
    assert len(repo.messages) == 2  # the second push had nothing to send
    files = hub_server.files("me/demo", kind="space")
    needed = [f"numpy=={np.__version__}", f"onnxruntime=={version('onnxruntime')}", "pillow"]
    assert files["requirements.txt"].decode().splitlines() == needed
    assert not [name for name in files if name.startswith("hf_vlm/")]
    for name, content in files.items():
        path = tmp_path / "space" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    command = [sys.executable, "-I", "-c", RUN_EXPORT]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path / "space", timeout=100)
    assert done.returncode == 0, done.stderr
    predictor = runtime.Runtime(here / "detector")
    for line, example in zip(done.stdout.splitlines(), ["00.png", "01.png"], strict=True):
        start, shape, regions, names, text, record = json.loads(line)
        assert start == (0.3 if "pred_boxes" in OUTPUTS[model_type] else 0)
        assert shape == [40, 60, 3]
        found = predictor.predict(here / "photos" / example[1:], start)
        assert record | {"path": str(here / "photos" / example[1:])} == runtime.as_record(found)
        assert "path" not in record
        assert text
        assert len(names) == len(regions) == (0 if model_type.endswith("classification") else len(found["scores"]))
        if "masks" in found:
            assert regions == [[[40, 60], int(mask.sum())] for mask in found["masks"]]
        elif "segmentation" in found:
            assert regions == [[[40, 60], int((found["segmentation"] == label).sum())] for label in found["labels"]]
        elif "boxes" in found:
            np.testing.assert_allclose(regions, found["boxes"], atol=0.5)


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
    assert "pillow" in requirements  # gradio decides
    assert all(re.fullmatch(r"[\w-]+==[\w.]+(\+cpu)?", line) for line in requirements[1:] if line != "pillow")
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
    with pytest.raises(ValueError, match="holds an encoder, which predicts no classes: name a fine-tuned model"):
        space_upload(encoder_run, "me/demo")
    record = json.loads((encoder_run / "run.json").read_text())
    (encoder_run / "run.json").write_text(json.dumps(record | {"origins": ["org/dinov2"]}))
    with pytest.raises(ValueError, match="trained with weights of org/dinov2: name with --license"):
        space_upload(encoder_run, "me/demo")
    with pytest.raises(ValueError, match="There are no images at"):
        space_upload(detector_run, "me/demo", examples=["nothing/*"])


INTERRUPTED = """
from huggingface_hub import HfApi
from hf_vlm.deploy.hub import Repository
from hf_vlm.deploy.push import push
from hf_vlm.deploy.space import space_upload

class Interrupted(Exception):
    pass

def interrupt(*arguments, **options):  # when the large files are there, and before the commit
    send_large(*arguments, **options)
    raise Interrupted

def attempt():
    try:
        {push}
    except Interrupted:
        print("interrupted")

send_large, HfApi.preupload_lfs_files = HfApi.preupload_lfs_files, interrupt
attempt()
HfApi.preupload_lfs_files = send_large
attempt()
attempt()
"""


@pytest.mark.parametrize(
    ("kind", "weights", "push"),
    [
        ("model", "model.safetensors", "push('detector', 'me/thing')"),
        ("model", "model.onnx", "push('export', 'me/thing', license='mit')"),
        (
            "space",
            "model/model.safetensors",
            "Repository('me/thing', type='space').send(space_upload('detector', 'me/thing'), message='x')",
        ),
    ],
)
def test_a_push_that_was_interrupted_leaves_nothing_half_and_sends_no_weights_again(
    hub_server, run_python, detector_run, tmp_path, kind, weights, push
):
    here = tmp_path / "elsewhere"
    shutil.copytree(detector_run, here / "detector")
    save_export(here / "export", "vlm_vit_detection")
    (here / "export" / "README.md").write_text("---\nlibrary_name: onnx\n---\n")
    printed = run_python(INTERRUPTED.format(push=push))
    assert printed.count("interrupted") == 1
    repo = hub_server.repos[kind, "me/thing"]
    first, second = repo.commits.values()  # that of creation, and all files at once; the third push had nothing new
    assert not set(first) - {"README.md", ".gitattributes"}
    folder = here / ("export" if "export" in push else "detector")
    assert second[weights].data == (folder / Path(weights).name).read_bytes()
    sent = [request for request in hub_server.requests if request.startswith("PUT /large/")]
    assert len(sent) == len(set(sent)) == sum(blob.large for blob in second.values()) > 0
