"""Runs to publish, and programs that talk to a Hub with the real clients."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RunPython = Callable[..., str]
StartHub = Callable[[Path], tuple[Any, RunPython]]


@pytest.fixture(scope="session")
def start_hub(hub: Any, run_process: RunPython) -> StartHub:
    """`start_hub(folder) -> (hub, run_python)`: the Hub, emptied, and a way to run clients of it inside the folder.

    `run_python(code, token="owner", forbid_hf_vlm=False)` returns what the code printed; it works in
    `folder / "elsewhere"`, where no source of hf_vlm is in sight.
    """

    def start(folder: Path) -> tuple[Any, RunPython]:
        hub.clear()
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir()

        def run(code: str, *, token: str | None = "owner", forbid_hf_vlm: bool = False) -> str:
            return run_process(code, elsewhere, forbid_hf_vlm=forbid_hf_vlm, token=token)

        return hub, run

    return start


@pytest.fixture
def hub_client(start_hub: StartHub, tmp_path: Path) -> tuple[Any, RunPython]:
    """An empty Hub, and how to run clients of it; see `start_hub`."""
    return start_hub(tmp_path)


@pytest.fixture
def hub_server(hub_client: tuple[Any, RunPython]) -> Any:
    """An empty Hub; see `start_hub`."""
    return hub_client[0]


@pytest.fixture
def run_python(hub_client: tuple[Any, RunPython]) -> RunPython:
    """Runs code as a client of `hub_server`; see `start_hub`."""
    return hub_client[1]


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

    from hf_vlm.registry import find_model_type

    model.save_pretrained(folder)
    height, width = ENCODER["image_size"]
    find_model_type(model.config.model_type).processor_class(size={"height": height, "width": width}).save_pretrained(
        folder
    )
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
