"""What is pushed loads elsewhere, without hf_vlm, and gives the same boxes; what must not be pushed is not."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from hub_server import Blob
from PIL import Image
from safetensors.torch import load, save

from hf_vlm.cli.main import main
from hf_vlm.deploy import verify
from hf_vlm.deploy.push import export_upload, files_to_push, model_upload

DETECTOR_FILES = [
    "config.json",
    "preprocessor_config.json",
    "recipe.yaml",
    "run.json",
    "model.safetensors",
    "configuration_detection.py",
    "configuration_vlm_vit.py",
    "image_processing_detection.py",
    "image_processing_vlm_vit.py",
    "modeling_detection.py",
    "modeling_vlm_vit.py",
]


def picture(path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((300, 200)).save(path)


def write_export(folder, run):
    """A folder as `hf-vlm export` writes it, whose program prints the sum of its weights."""
    shutil.copytree(run, folder, ignore=lambda _, names: set(names) - {*files_to_push(run)})
    for path in (*folder.glob("modeling_*.py"), *(folder / name for name in ("run.json", "recipe.yaml"))):
        path.unlink()
    (folder / "model.safetensors").unlink()
    (folder / "model.onnx").write_bytes(bytes(range(100)))
    manifest = {"components": {"model": {"file": "model.onnx"}}, "export_format": "onnx"}
    (folder / "export.json").write_text(json.dumps(manifest))
    (folder / "parity.json").write_text("{}")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "predict.pyc").write_bytes(b"")
    card = "---\nlibrary_name: onnx\n---\n\n# Exported\n\n| | |\n|---|---|\n| size | 1 MB |\n"
    (folder / "README.md").write_text(card)
    program = (
        "import pathlib, sys\nprint(sys.argv[1], sum(pathlib.Path(__file__).with_name('model.onnx').read_bytes()))"
    )
    (folder / "predict.py").write_text(program)


def litter(run):
    """What training leaves in a run's folder and nobody should publish."""
    (run / "checkpoint-10").mkdir()
    for name in ("checkpoint-10/model.safetensors", "checkpoint-10/optimizer.pt", "optimizer.pt", "training_args.bin"):
        (run / name).write_bytes(b"state")
    for name in ("trainer_state.json", "train.log", "token", ".env", "notes.py"):
        (run / name).write_text("private")


def test_only_the_run_is_pushed(detector_run):
    litter(detector_run)
    files = files_to_push(detector_run)
    assert set(DETECTOR_FILES) <= set(files)
    assert all((detector_run / name).is_file() for name in files)
    parts = {
        "detection_layers.py",
        "expert_layers.py",
        "loss_detection.py",
        "model_on_encoder.py",
        "packing.py",
        "ranks.py",
        "router_loss.py",
        "saved_config.py",
        "self_initialised.py",
        "stochastic_depth.py",
        "vit_layers.py",
    }
    assert set(files) - set(DETECTOR_FILES) == parts
    assert len(files) == len(set(files))


def test_sharded_weights(detector_run):
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (detector_run / "model.safetensors").rename(detector_run / shards[0])
    index = {"weight_map": {"a": shards[1], "b": shards[0], "c": shards[0]}}
    (detector_run / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"it has no {shards[1]}"):
        files_to_push(detector_run)
    shutil.copy(detector_run / shards[0], detector_run / shards[1])
    assert files_to_push(detector_run)[4:7] == ["model.safetensors.index.json", *shards]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", r"it has no config\.json \(the model's configuration\)"),
        ("preprocessor_config.json", r"it has no preprocessor_config\.json \(the image processor\)"),
        ("recipe.yaml", r"it has no recipe\.yaml"),
        ("run.json", r"it has no run\.json"),
        ("model.safetensors", r"it has no model\.safetensors \(the weights\)"),
        ("modeling_detection.py", r"it has no modeling_detection\.py \(code"),
        ("modeling_vlm_vit.py", r"it has no modeling_vlm_vit\.py \(code"),
        ("image_processing_vlm_vit.py", r"it has no image_processing_vlm_vit\.py \(code"),
    ],
)
def test_what_is_missing_is_named(detector_run, name, message):
    (detector_run / name).unlink()
    with pytest.raises(ValueError, match=message):
        files_to_push(detector_run)


def test_all_that_is_missing_is_named_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json.*preprocessor_config\.json.*recipe\.yaml.*run\.json.*weights"):
        files_to_push(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        files_to_push(tmp_path / "nothing")


def test_a_model_without_code_is_refused(detector_run):
    config = json.loads((detector_run / "config.json").read_text())
    foreign = {key: f"them/other--{value}" for key, value in config["auto_map"].items()}
    (detector_run / "config.json").write_text(json.dumps(config | {"auto_map": foreign}))
    with pytest.raises(ValueError, match="takes its code from another repository: them/other--"):
        files_to_push(detector_run)
    del config["auto_map"]
    (detector_run / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"import hf_vlm\.registry before save_pretrained"):
        files_to_push(detector_run)


@pytest.mark.parametrize("name", ["recipe.yaml", "run.json", "README.md"])
def test_a_token_is_never_published(detector_run, name):
    with (detector_run / name).open("a") as file:
        file.write("\n# hub_token: hf_" + "aB3" * 11)
    with pytest.raises(ValueError, match=f"{name} holds what looks like a Hugging Face token"):
        model_upload(detector_run, "me/my-detector")


PUSH = """
import json, os, shutil
import huggingface_hub
from huggingface_hub import create_repo
from hf_vlm.cli.main import main
from hf_vlm.deploy.push import push

said = {}
def attempt(name, run, repo_id, token="owner", **options):
    os.environ["HF_TOKEN"] = token
    try:
        said[name] = push(run, repo_id, **options)
    except ValueError as error:
        said[name] = "REFUSED " + str(error)

attempt("detector", "detector", "my-detector", commit_message="first")
attempt("encoder", "encoder", "me/my-encoder")

attempt("export", "export", "me/my-export")
attempt("export with a licence", "export", "me/my-export", license="mit")
assert main(["push", "export", "me/my-export", "--license", "mit"]) == 0

# The same run with sharded weights and a card of the publisher's own words, to a branch.
shutil.copytree("detector", "sharded")
os.rename("sharded/model.safetensors", "sharded/model-00001-of-00001.safetensors")
with open("sharded/model.safetensors.index.json", "w") as index:
    json.dump({"weight_map": {"a": "model-00001-of-00001.safetensors"}}, index)
with open("sharded/README.md", "w") as card:
    card.write("---\\nlicense: mit\\n---\\n\\nmy own words\\n")
attempt("sharded", "sharded", "me/my-detector", revision="sharded")
attempt("private", "sharded", "me/secret", private=True)
attempt("private again", "sharded", "me/secret", private=True)

create_repo("me/public")
attempt("public", "sharded", "me/public", private=True)
attempt("no token", "sharded", "me/model", token="")
attempt("invalid token", "sharded", "me/model", token="wrong")
attempt("read-only token", "sharded", "me/model", token="reader")
attempt("other owner", "sharded", "them/model")
attempt("bad name", "sharded", "me/my model")
with open("sharded/README.md", "w") as card:
    card.write("---\\nlicense: [\\n---\\n")
attempt("broken card", "sharded", "me/other")
huggingface_hub.constants.ENDPOINT = "http://127.0.0.1:9"
attempt("unreachable", "sharded", "me/other")
print("RESULT", json.dumps(said))
"""

LOAD = """
import base64, json, runpy, torch
from huggingface_hub import snapshot_download
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection, pipeline

options = dict(trust_remote_code=True)
image = Image.open("photo.jpg")
model = AutoModelForObjectDetection.from_pretrained("me/my-detector", **options)
processor = AutoImageProcessor.from_pretrained("me/my-detector", **options)
with torch.no_grad():
    outputs = model(**processor(images=image, return_tensors="pt"))
found = processor.post_process_object_detection(outputs, threshold=0.3, target_sizes=[(200, 300)])[0]
piped = pipeline("object-detection", model="me/my-detector", **options)(image, threshold=0.3)
folder = snapshot_download("me/my-detector")
handler = runpy.run_path(f"{folder}/handler.py")["EndpointHandler"](folder)
photo = open("photo.jpg", "rb").read()
text = base64.b64encode(photo).decode()
parameters = {"threshold": 0.3}
inputs = [photo, image, text, f"data:image/jpeg;base64,{text}"]
answers = [handler({"inputs": value, "parameters": parameters}) for value in inputs]
wrong = [{}, {"inputs": "photo.jpg"}, {"inputs": "http://127.0.0.1/a.jpg"}, {"inputs": photo[:200]}, {"inputs": 7}]
wrong.append({"inputs": photo, "parameters": {"threshold": 7}})
refusals = [handler(data) for data in wrong]
print("RESULT", json.dumps(dict(
    answers=answers, refusals=refusals, module=type(model).__module__, piped=piped,
    **{k: v.tolist() for k, v in found.items()}
)))
"""


@pytest.fixture(scope="module")
def pushed(start_hub, saved_detector, saved_encoder, tmp_path_factory):
    """(hub, what each push said, the folder of the runs, what was printed by a process without hf_vlm).

    One process pushes and one loads, because importing transformers is what takes the time.
    """
    folder = tmp_path_factory.mktemp("pushed")
    hub, run_python = start_hub(folder)
    runs = folder / "elsewhere"
    shutil.copytree(saved_detector, runs / "detector")
    shutil.copytree(saved_encoder, runs / "encoder")
    litter(runs / "detector")
    write_export(runs / "export", runs / "detector")
    printed = run_python(PUSH)
    assert f"Published at {hub.endpoint}/me/my-export" in printed
    said = json.loads(printed.split("RESULT ")[1])
    picture(runs / "photo.jpg")
    cards = "".join(hub.files(f"me/my-{kind}")["README.md"].decode() for kind in ("detector", "encoder"))
    code = "\n".join(re.findall(r"```python\n(.*?)```", cards, re.DOTALL)).replace("threshold=0.5", "threshold=0.3")
    return hub, said, runs, run_python(LOAD + code, forbid_hf_vlm=True)


def test_what_arrives_is_the_run(pushed):
    hub, said, runs, _ = pushed
    assert said["detector"] == f"{hub.endpoint}/me/my-detector"
    files = hub.files("me/my-detector")
    names = {*files_to_push(runs / "detector"), "README.md"}
    assert set(files) == names | {"handler.py", "requirements.txt"}
    assert all(files[name] == (runs / "detector" / name).read_bytes() for name in names)
    assert b'TASK = "object-detection"' in files["handler.py"]
    assert b'TASK = "image-feature-extraction"' in hub.files("me/my-encoder")["handler.py"]
    assert b'"me/my-detector"' in files["README.md"]
    assert hub.repos["model", "me/my-detector"].messages[1:3] == ["first", "Upload a model trained with hf_vlm"]


def test_a_pushed_detector_gives_the_same_boxes_elsewhere(pushed):
    from hf_vlm.models.image_processing_detection import VLMViTDetectionImageProcessor
    from hf_vlm.models.modeling_detection import VLMViTForObjectDetection

    _, _, runs, printed = pushed
    result = json.loads(printed.split("RESULT ")[1].splitlines()[0])
    assert result["module"].startswith("transformers_modules.me.")

    model = VLMViTForObjectDetection.from_pretrained(runs / "detector").eval()
    processor = VLMViTDetectionImageProcessor.from_pretrained(runs / "detector")
    with torch.no_grad():
        outputs = model(**processor(images=Image.open(runs / "photo.jpg"), return_tensors="pt"))
    local = processor.post_process_object_detection(outputs, threshold=0.3, target_sizes=[(200, 300)])[0]
    assert len(local["scores"]) >= 3
    assert result["labels"] == local["labels"].tolist()
    np.testing.assert_allclose(result["scores"], local["scores"], atol=1e-6)
    np.testing.assert_allclose(result["boxes"], local["boxes"], atol=1e-3)
    # The pipeline rounds boxes down to whole pixels.
    piped = [([d["box"][k] for k in ("xmin", "ymin", "xmax", "ymax")], d["label"]) for d in result["piped"]]
    names = [model.config.id2label[label] for label in result["labels"]]
    assert piped == [([int(v) for v in box], name) for box, name in zip(result["boxes"], names, strict=True)]
    # The card's two ways to use a detector print the same objects, the encoder's card prints its features' shapes.
    lines = re.findall(r"^(cat|dog|bird) (0\.\d+) ([\[{].*)$", printed, re.MULTILINE)
    expected = [(name, f"{round(score, 2)}") for name, score in zip(names, result["scores"], strict=True)]
    assert [line[:2] for line in lines] == expected * 2
    assert printed.endswith("torch.Size([1, 16])\n")


def test_the_handler_of_an_endpoint_answers_as_the_pipeline_does(pushed):
    result = json.loads(pushed[3].split("RESULT ")[1].splitlines()[0])
    assert len(result["piped"]) >= 3
    assert result["answers"] == [result["piped"]] * 4
    for answer, text in zip(
        result["refusals"], ["inputs must be an image"] * 5 + ["scores are from 0 to 1"], strict=True
    ):
        assert text in answer["error"]


def test_an_export_is_pushed_whole_with_a_licence(pushed):
    hub, said, runs, _ = pushed
    assert said["export"].startswith("REFUSED export does not record where its weights came from")
    assert said["export with a licence"] == f"{hub.endpoint}/me/my-export"
    files = hub.files("me/my-export")
    assert set(files) == {*files_to_push(runs / "export"), "README.md"}
    assert {"export.json", "model.onnx", "parity.json", "predict.py", "configuration_detection.py"} <= set(files)
    assert b"license: mit" in files["README.md"]
    assert b"| size | 1 MB |" in files["README.md"]
    assert b"## Licence and provenance\n\nThe weights are published under mit." in files["README.md"]
    (runs / "export" / "run.json").write_text('{"origins": []}')
    assert b"license: apache-2.0" in export_upload(runs / "export").files["README.md"]
    (runs / "export" / "run.json").write_text('{"origins": ["org/dinov2"]}')
    with pytest.raises(ValueError, match=r"trained with weights of org/dinov2: .*--license"):
        export_upload(runs / "export")
    card = export_upload(runs / "export", "cc-by-nc-4.0").files["README.md"]
    assert b"weights of [org/dinov2](https://huggingface.co/org/dinov2)" in card


def new_commit(hub, name, content):
    """Changes a file of the pushed detector behind its publisher's back."""
    repo = hub.repos["model", "me/my-detector"]
    files = dict(repo.commits[repo.resolve("main")])
    files[name] = Blob(content, large=files[name].large)
    return repo.commit("changed", files, "changed")


def test_verification_finds_weights_and_code_that_are_not_those_of_the_run(
    pushed, fork_server, program_environment, monkeypatch
):
    """The process that loads is a fork of one that has imported the libraries, which takes seconds."""
    hub, _, runs, _ = pushed

    def start(argv, folder, environment):
        settings = {**environment, **program_environment, "HF_TOKEN": "owner"}
        return fork_server.run(argv, cwd=folder, env=settings)

    monkeypatch.setattr(verify, "start", start)
    arguments = runs / "detector", "AutoModelForObjectDetection", "me/my-detector"
    assert verify.verify_model(*arguments, "main") < 1e-5
    weights = load(hub.files("me/my-detector")["model.safetensors"])
    weights = {name: value * 1.05 for name, value in weights.items()}
    with pytest.raises(ValueError, match=r"on the Hub does not give what .*detector gives: \w+ differs by"):
        verify.verify_model(*arguments, new_commit(hub, "model.safetensors", save(weights, {"format": "pt"})))
    broken = b"raise RuntimeError('not the code that was trained')"
    with pytest.raises(ValueError, match=r"does not load from the Hub: RuntimeError: not the code that was trained"):
        verify.verify_model(*arguments, new_commit(hub, "modeling_detection.py", broken))
    with pytest.raises(ValueError, match=r"returns \['b'\], but run returns \['a'\]"):
        verify.compare_outputs({"a": np.ones(1)}, {"b": np.ones(1)}, "me/x", "run")
    with pytest.raises(ValueError, match="a differs by inf"):
        verify.compare_outputs({"a": np.ones(1)}, {"a": np.ones(2)}, "me/x", "run")
    with pytest.raises(ValueError, match="a differs by nan"):
        verify.compare_outputs({"a": np.ones(1)}, {"a": np.full(1, np.nan)}, "me/x", "run")


def test_a_dry_run_lists_what_would_be_sent_and_sends_nothing(detector_run, capsys):
    assert main(["push", str(detector_run), "me/new", "--private", "--revision", "dev", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Would be sent to the model repository me/new (private, branch dev):\n")
    listed = {line.split()[-1] for line in out.splitlines()[1:-1]}
    assert listed == {*files_to_push(detector_run), "README.md", "handler.py", "requirements.txt"}
    size = (detector_run / "config.json").stat().st_size
    assert re.search(rf"{size / 1000:.1f} kB  config\.json$", out, re.MULTILINE)
    assert not (detector_run / "README.md").exists()
    assert main(["push", str(detector_run), "me/new", "--splits", "train"]) == 2
    assert "--splits is for --type dataset, and not for --type model" in capsys.readouterr().err


def test_pictures_of_private_data_are_sent_only_when_asked_for(detector_run):
    for name in ("predictions.png", "confusion.png", "notes.png"):
        picture(detector_run / name)
    sent = model_upload(detector_run, "me/x").files  # of built-in scenes
    assert {"predictions.png", "confusion.png"} <= set(sent)
    assert "notes.png" not in sent
    assert "![Confusion matrix.](confusion.png)" in sent["README.md"].decode()
    record = json.loads((detector_run / "run.json").read_text())
    (detector_run / "run.json").write_text(json.dumps(record | {"data": {"source": "patients"}}))
    sent = model_upload(detector_run, "me/x").files
    assert "predictions.png" not in sent
    assert "predictions.png" not in sent["README.md"].decode()
    assert "confusion.png" in sent
    assert "predictions.png" in model_upload(detector_run, "me/x", pictures=True).files


def test_pushing_again_replaces_what_is_stale_and_keeps_a_card_of_ones_own(pushed):
    hub, said, _, _ = pushed
    assert said["sharded"] == f"{hub.endpoint}/me/my-detector/tree/sharded"
    first, second = hub.files("me/my-detector"), hub.files("me/my-detector", revision="sharded")
    assert set(second) - set(first) == {"model.safetensors.index.json", "model-00001-of-00001.safetensors"}
    assert set(first) - set(second) == {"model.safetensors"}
    assert second["README.md"] == b"---\nlicense: mit\n---\n\nmy own words\n"


def test_private_stays_private(pushed):
    hub, said, _, _ = pushed
    assert said["private"] == said["private again"] == f"{hub.endpoint}/me/secret"
    assert hub.repos["model", "me/secret"].private
    assert not hub.repos["model", "me/my-detector"].private
    assert said["public"].startswith("REFUSED me/public exists and is public")
    assert hub.files("me/public") == {}


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no token", r"There is no Hugging Face token: run `hf auth login`, or set HF_TOKEN\."),
        ("invalid token", r"The Hub does not accept the token \(Invalid credentials"),
        ("read-only token", r"The token may not write to me/model .*write access to 'me'"),
        ("other owner", r"The token may not write to them/model .*write access to 'them'"),
        ("bad name", r"'me/my model' is not a name that the Hub accepts"),
        ("broken card", r"Invalid metadata in README\.md"),
        ("unreachable", r"The Hub cannot be reached: .*Check the network, HF_ENDPOINT"),
    ],
)
def test_refusals_say_what_to_do(pushed, case, message):
    hub, said, _, _ = pushed
    assert re.match(f"REFUSED {message}", said[case], re.DOTALL), said[case]
    assert ("model", "me/model") not in hub.repos
