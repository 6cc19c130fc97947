"""Exported programs run at other batch sizes than the one they were traced with."""

import ast
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY, batch, build, perturb
from torch.utils import _pytree as pytree

import hf_vlm.models
from hf_vlm.registry import MODELS

MODELS_FOLDER = Path(hf_vlm.models.__file__).parent
INFERENCE = [entry.name for entry in MODELS if entry.task != "pretraining"]
BACKBONES: dict[str, dict[str, Any]] = {
    "learned": {},
    "rope": {"position_embedding_type": "rope", "num_register_tokens": 1, "layerscale_value": 0.1},
    "sincos": {"position_embedding_type": "sincos", "image_size": 64},  # positions of another size
}
CASES = [
    # Instance segmentation holds the detector.
    *(pytest.param(name, "learned", marks=[pytest.mark.slow] * (name == "detection")) for name in INFERENCE),
    *(("encoder", "rope"), ("encoder", "sincos")),
]
DYNAMIC = {"pixel_values": {0: torch.export.Dim("batch")}}


def exported_model(name: str, backbone: str) -> torch.nn.Module:
    model = build(name, backbone=BACKBONES[backbone]).eval()
    perturb(model, 0.1)
    return model


def expected_outputs(model: torch.nn.Module, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return pytree.tree_leaves(model(pixel_values))


@pytest.mark.parametrize(("name", "backbone"), CASES)
def test_export_with_a_dynamic_batch(name: str, backbone: str) -> None:
    model = exported_model(name, backbone)
    program = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=DYNAMIC)
    for num_images in (1, 5):
        images = torch.randn(num_images, 3, 32, 32)
        found = pytree.tree_leaves(program.module()(images))
        torch.testing.assert_close(found, expected_outputs(model, images), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # torch's exporter warns of torch
@pytest.mark.parametrize(("name", "backbone"), CASES)
def test_onnx_with_a_dynamic_batch(name: str, backbone: str, tmp_path: Path) -> None:
    import onnxruntime

    model, file = exported_model(name, backbone), str(tmp_path / "model.onnx")
    program = torch.onnx.export(model, (torch.randn(2, 3, 32, 32),), dynamo=True, dynamic_shapes=DYNAMIC)
    program.save(file)
    session = onnxruntime.InferenceSession(file)
    for num_images in (1, 5):
        images = torch.randn(num_images, 3, 32, 32)
        found = [torch.from_numpy(value) for value in session.run(None, {"pixel_values": images.numpy()})]
        torch.testing.assert_close(found, expected_outputs(model, images), atol=1e-4, rtol=1e-4)


# --- len(tensor) is a number, and so fixes the batch size of whatever is traced: tensor.shape[0] stays symbolic


@pytest.mark.parametrize("name", TINY)
def test_no_model_asks_a_tensor_for_its_length(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build(name, backbone={"drop_path_rate": 0.5}), batch(name)
    length = torch.Tensor.__len__

    def checked(tensor: torch.Tensor) -> int:
        caller = sys._getframe(1).f_code
        assert Path(caller.co_filename).parent != MODELS_FOLDER, f"{caller.co_qualname}: use shape[0]"
        return length(tensor)

    monkeypatch.setattr(torch.Tensor, "__len__", checked)
    model(**inputs)
    inputs.pop("labels", None)
    model.eval()(**inputs)


def test_no_function_of_the_models_asks_a_tensor_argument_for_its_length() -> None:
    """What the models above do not reach, such as the code of several ranks."""
    found = []
    for file in MODELS_FOLDER.glob("*.py"):
        functions = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
        for function in functions:
            arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            annotated = {arg.arg: ast.unparse(arg.annotation) for arg in arguments if arg.annotation is not None}
            tensors = {name for name, annotation in annotated.items() if annotation in ("Tensor", "Tensor | None")}
            found += [
                f"{file.name}:{node.lineno}"
                for node in ast.walk(function)
                if isinstance(node, ast.Call)
                and ast.unparse(node.func) == "len"
                and ast.unparse(node.args[0]) in tensors
            ]
    assert found == []
