"""A mistyped folder is refused at once, with the folders that are near, and the Hub is not asked for it."""

import time

import httpx2
import pytest
from huggingface_hub.utils import set_client_factory
from huggingface_hub.utils._http import default_client_factory

from hf_vlm.cli.main import main
from hf_vlm.features.loading import find_encoder, find_head, load_frozen_encoder, load_model
from hf_vlm.models.model_source import check_source
from hf_vlm.models.modeling_detection import VLMViTForObjectDetection
from hf_vlm.models.ssl_frozen import read_encoder


@pytest.fixture
def requests(monkeypatch):
    """The requests to a Hub that does not answer, as the client would send them."""
    sent = []

    def refuse(request):
        sent.append(request)
        raise httpx2.ConnectError("no route", request=request)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("the Hub is asked again"))
    set_client_factory(lambda: httpx2.Client(transport=httpx2.MockTransport(refuse)))
    yield sent
    set_client_factory(default_client_factory)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    for name in ("runs/detector", "models/large", ".hidden"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "runs/detector/model.safetensors").touch()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "runs/detectr",
            r"'runs/detectr'; did you mean 'runs/detector'\? It is not .* begins with .* runs\.",
        ),
        (
            "./detector",
            r"; in \. are models, runs\. It is not looked for on the Hub, where models are called owner/",
        ),
        ("rns/detector/checkpoint-5", "did you mean 'runs/detector/checkpoint-5'"),
        ("models/lage", r"did you mean 'models/large'\? .* for it begins with the folder models\."),
        ("../nowhere", "There is no folder '../nowhere'"),
        ("~/nowhere/at-all", "There is no folder '~/nowhere/at-all'"),
        ("/nowhere/at-all", "in / are "),
        ("one/two/three", "There is no folder 'one/two/three'"),
        ("runs/detector/model.safetensors", "model.safetensors', but a file: name the folder that it is in"),
        ("runs/detector/checkpoint-5", "; in runs/detector are none"),
    ],
)
def test_paths_are_refused_without_asking_the_hub(requests, source, words):
    with pytest.raises(ValueError, match=words):
        check_source(source)
    assert not requests


def of_head(source):
    return find_head(source, VLMViTForObjectDetection)


@pytest.mark.parametrize("load", [load_model, load_frozen_encoder, find_encoder, of_head, read_encoder])
def test_every_loader_refuses_them_and_asks_an_unreachable_hub_once(requests, load):
    with pytest.raises(ValueError, match="did you mean 'runs/detector'"):
        load("runs/detectr")
    assert not requests
    with pytest.raises(ValueError, match=r"'org/detector' is neither a folder .* as far as it can be reached: no rou"):
        load("org/detector")
    asked = [request.url.path for request in requests if request.method == "HEAD"]  # others are the client's own
    assert asked == ["/org/detector/resolve/main/config.json"]


@pytest.mark.parametrize(
    "words",
    [
        ["finetune", "detection/vit_small.yaml", "--data", "scenes:easy", "--encoder", "runs/detectr"],
        ["pretrain", "detection/vit_small.yaml", "--data", "scenes:easy", "--labels_from", "runs/detectr"],
        ["pretrain", "distill/vit_small.yaml", "--data", "scenes:easy", "--model_config.teacher", "runs/detectr"],
        ["predict", "runs/detectr", "a.png"],
        ["evaluate", "runs/detectr", "--data", "scenes:easy"],
        ["embed", "runs/detectr", "--data", "scenes:easy"],
        ["export", "runs/detectr"],
        ["serve", "runs/detectr", "--no_page"],
        ["convert", "runs/detectr", "out"],
    ],
    ids=lambda words: " ".join(words[:1] + words[-2:-1]),
)
def test_every_command_refuses_them(requests, words, capsys, tmp_path):
    (tmp_path / "a.png").touch()
    assert main(words) == 2
    assert "did you mean 'runs/detector'?" in capsys.readouterr().err
    assert not requests
