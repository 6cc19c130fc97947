"""A Hub on loopback, and processes that talk to it with the real clients."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def _load_hub() -> Any:
    spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).parents[1] / "hub_server.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.setdefault("hub_server", importlib.util.module_from_spec(spec))
    if not hasattr(module, "Hub"):
        spec.loader.exec_module(module)
    return module.Hub


RunPython = Callable[..., str]
StartHub = Callable[[Path], tuple[Any, RunPython]]


def _runner(run_process: RunPython, endpoint: str, folder: Path) -> RunPython:
    """Clients need processes of their own: huggingface_hub reads its endpoint when it is imported."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir(exist_ok=True)

    def run(code: str, *, token: str | None = "owner", forbid_hf_vlm: bool = False) -> str:
        hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf_home"), "HF_HUB_DISABLE_XET": "1"}
        login = {"HF_TOKEN": token} if token else {}
        return run_process(code, elsewhere, forbid_hf_vlm=forbid_hf_vlm, **hub, **login)

    return run


@pytest.fixture(scope="session")
def start_hub(run_process: RunPython) -> Iterator[StartHub]:
    """`start_hub(folder) -> (hub, run_python)`: an empty Hub, and a way to run clients of it inside the folder.

    The hub has `endpoint`, `tokens`, `repos`, `files(repo_id)` and the `requests` it served.
    `run_python(code, token="owner", forbid_hf_vlm=False)` returns what the code printed; it works in
    `folder / "elsewhere"`, where no source of hf_vlm is in sight.
    """
    servers = []

    def start(folder: Path) -> tuple[Any, RunPython]:
        server = _load_hub()().start()
        servers.append(server)
        return server, _runner(run_process, server.endpoint, folder)

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def hub_server(start_hub: StartHub, tmp_path: Path) -> Any:
    """An empty Hub of the test's own; see `start_hub`."""
    return start_hub(tmp_path)[0]


@pytest.fixture
def run_python(hub_server: Any, run_process: RunPython, tmp_path: Path) -> RunPython:
    """Runs code as a client of `hub_server`; see `start_hub`."""
    return _runner(run_process, hub_server.endpoint, tmp_path)


RECIPE = {"method": "detection", "data": "scenes:easy", "eval_split": "test", "max_steps": 4}
RUN = {
    "method": "detection",
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "data": {
        "source": "scenes:easy",
        "split": "train",
        "fingerprint": "abc123",
        "num_examples": 400,
        "class_names": None,
    },
    "git": {"commit": "0123abc", "dirty": False},
    "seconds": 90.4,
    "num_steps": 1200,
    "num_images_seen": 19200,
    "encoder": None,
    "metrics": {"ap": 0.51234, "ap50": 0.8, "ap_large": float("nan")},
    "train_loss": 1.25,
    "machine": "2 CPU cores",
}


def _save_run(folder: Path, model: Any, recipe: dict[str, Any], run: dict[str, Any]) -> Path:
    import yaml

    from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor

    model.save_pretrained(folder)
    height, width = ENCODER["image_size"]
    VLMViTImageProcessor(size={"height": height, "width": width}).save_pretrained(folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "run.json").write_text(json.dumps(run))
    return folder


ENCODER = {
    "image_size": [32, 48],
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="session")
def saved_detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished detection run: tiny random weights with scores around 0.5. Do not change it."""
    import torch

    import hf_vlm.registry  # noqa: F401
    from hf_vlm.models.modeling_detection import VLMViTDetectionConfig, VLMViTForObjectDetection

    config = VLMViTDetectionConfig(
        backbone_config=ENCODER,
        hidden_size=16,
        neck_num_blocks=1,
        num_decoder_layers=1,
        intermediate_size=32,
        num_self_attention_heads=2,
        num_cross_attention_heads=2,
        num_queries=6,
        prior_probability=0.5,
        id2label={0: "cat", 1: "dog", 2: "bird"},
    )
    torch.manual_seed(0)
    model = VLMViTForObjectDetection(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "backbone" not in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return _save_run(tmp_path_factory.mktemp("detection") / "tiny-detector", model, RECIPE, RUN)


@pytest.fixture(scope="session")
def saved_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished pretraining run, with tiny random weights. Do not change it."""
    import hf_vlm.registry  # noqa: F401
    from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
    from hf_vlm.models.modeling_vlm_vit import VLMViTModel

    model = VLMViTModel(VLMViTConfig(**ENCODER))
    data = {"source": "org/pictures", "split": "train", "num_examples": None}
    run = RUN | {"method": "mae", "metrics": {"knn": 0.75}, "data": data}
    recipe = RECIPE | {"method": "mae", "data": "org/pictures"}
    return _save_run(tmp_path_factory.mktemp("pretraining") / "tiny-encoder", model, recipe, run)


@pytest.fixture
def detector_run(saved_detector: Path, tmp_path: Path) -> Path:
    """A copy of the detection run that a test may change."""
    return Path(shutil.copytree(saved_detector, tmp_path / "tiny-detector"))


@pytest.fixture
def encoder_run(saved_encoder: Path, tmp_path: Path) -> Path:
    """A copy of the pretraining run that a test may change."""
    return Path(shutil.copytree(saved_encoder, tmp_path / "tiny-encoder"))
