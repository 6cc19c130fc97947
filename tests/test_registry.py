"""Each row of the registry: saved with its code, loaded by a process that cannot import the package."""

import inspect
import json
from types import SimpleNamespace

import pytest
import torch
from tiny import SPARSE, TINY, batch, build, perturb
from transformers import AutoImageProcessor

from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.registry import MODELS, find_model

BACKBONE = {"layerscale_value": 1e-5, "num_register_tokens": 1, **SPARSE}
PRINT_OUTPUT = """
import json, torch, transformers
report, models = {}, json.loads(MODELS)
for name, (auto_class, folder) in models.items():
    loader = getattr(transformers, auto_class)
    if auto_class == "AutoBackbone":  # its from_pretrained asks the Hub even for a folder
        from transformers.dynamic_module_utils import get_class_from_dynamic_module
        loader = get_class_from_dynamic_module("modeling_vlm_vit.VLMViTBackbone", folder)
        model = loader.from_pretrained(folder).eval()
    else:
        model = loader.from_pretrained(folder, trust_remote_code=True).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    batch = torch.load(f"{folder}/batch.pt")
    report[name] = [type(model).__name__, type(processor).__name__, processor.size["height"], checksum(model(**batch))]
print(json.dumps(report))
"""


def checksum(output):
    values = output.to_tuple()
    first = values[0] if not isinstance(values[0], tuple) else values[0][0]
    return first.double().abs().sum().item()


def test_every_row_has_a_tiny_model():
    assert {tiny.row for tiny in TINY.values()} == {entry.name for entry in MODELS}


@pytest.mark.slow  # tests/models/test_pipelines.py does so with every head
def test_every_row_loads_where_the_package_is_not_installed(tmp_path, run_process):
    models, expected = {}, {}
    for entry in MODELS:
        folder = tmp_path / entry.name
        model, inputs = build(entry.name, tmp_path, BACKBONE).eval(), batch(entry.name, 2)
        model.save_pretrained(folder)
        VLMViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
        torch.save(inputs, folder / "batch.pt")
        with torch.no_grad():
            value = checksum(model(**inputs))
        models[entry.name] = (entry.auto_class.__name__, str(folder))
        expected[entry.name] = [entry.model_class.__name__, "VLMViTImageProcessor", 32, pytest.approx(value)]
    code = f"MODELS = {json.dumps(json.dumps(models))}\n{inspect.getsource(checksum)}\n{PRINT_OUTPUT}"
    printed = run_process(code, tmp_path, forbid_hf_vlm=True, HF_HUB_OFFLINE="1")
    assert json.loads(printed.splitlines()[-1]) == expected


def test_an_encoder_is_read_out_of_every_pretraining_model(tmp_path):
    encoder_class = find_model("encoder").model_class
    for entry in MODELS:
        if entry.task == "pretraining":
            model = build(entry.name, tmp_path, BACKBONE)
            perturb(model)  # a teacher is not its student any more
            model.save_pretrained(tmp_path / entry.name)
            encoder = encoder_class.from_pretrained(tmp_path / entry.name)
            encoder.save_pretrained(tmp_path / entry.name / "encoder")
            again = encoder_class.from_pretrained(tmp_path / entry.name / "encoder")
            for name, weight in model.trained_encoder.state_dict().items():
                assert torch.equal(weight, encoder.state_dict()[name]), (entry.name, name)
                assert torch.equal(weight, again.state_dict()[name]), (entry.name, name)


def test_the_image_processor_of_former_detectors_post_processes_boxes(tmp_path):
    VLMViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)  # as version 0.1 left it
    former = AutoImageProcessor.from_pretrained(tmp_path)
    logits, boxes = torch.tensor([[[2.0, -3.0], [-4.0, 1.0]]]), torch.tensor([[[0.5, 0.5, 0.2, 0.4]] * 2])
    found = former.post_process_object_detection(
        SimpleNamespace(logits=logits, pred_boxes=boxes), threshold=0.5, target_sizes=[(100, 200)]
    )
    assert found[0]["labels"].tolist() == [0, 1]
    torch.testing.assert_close(found[0]["scores"], torch.tensor([2.0, 1.0]).sigmoid())
    torch.testing.assert_close(found[0]["boxes"], torch.tensor([[80.0, 30.0, 120.0, 70.0]] * 2))


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'simclr'"):
        find_model("simcrl")
    with pytest.raises(ValueError, match="no pretraining method 'encoder'"):
        find_model("encoder", ["pretraining"])
