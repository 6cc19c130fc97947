"""Trainer's own pushing: checkpoints while training runs, and the finished model, code and card included."""

import json

TRAIN = """
import json
from hf_vlm.deploy.push import write_hub_files
from hf_vlm.training.run import {train}
recipe = json.loads('''{recipe}''')
{train}(recipe, write_card=write_hub_files)
"""
LOAD = """
import torch
from transformers import AutoImageProcessor, {auto}
model = {auto}.from_pretrained("{repo}", trust_remote_code=True).eval()
AutoImageProcessor.from_pretrained("{repo}", trust_remote_code=True)
print(type(model).__name__)
"""
RECIPE = {
    "encoder_config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8},
    "image_size": 32,
    "data": "scenes:easy",
    "num_train_examples": 8,
    "num_eval_examples": 4,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "save_strategy": "steps",
    "save_steps": 1,
    "num_probe_examples": 16,
    "use_cpu": True,
    "disable_tqdm": True,
    "push_to_hub": True,
    "hub_always_push": True,
}
METHODS = {
    "detection": {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_decoder_layers": 1,
        "num_queries": 5,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
    "mae": {"decoder_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}},
}


def train(run_python, method, repo):
    recipe = RECIPE | {"method": method, "model_config": METHODS[method], "hub_model_id": repo, "output_dir": method}
    name = "finetune" if method == "detection" else "pretrain"
    run_python(TRAIN.format(train=name, recipe=json.dumps(recipe)))


def test_a_detector_is_pushed_while_it_trains(hub_server, run_python):
    train(run_python, "detection", "me/det")
    commits = hub_server.repos["model", "me/det"].commits.values()
    weights = [commit["model.safetensors"].data for commit in commits if "model.safetensors" in commit]
    assert len(set(weights)) == 2  # after each of the two steps
    files = hub_server.files("me/det")
    assert {"model.safetensors", "modeling_detection.py", "recipe.yaml", "run.json", "README.md"} <= set(files)
    assert b'TASK = "object-detection"' in files["handler.py"]
    assert "requirements.txt" in files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth")) or "state" in name]
    card = files["README.md"].decode()
    assert "me/det" in card
    assert "More Information Needed" not in card
    loaded = run_python(LOAD.format(auto="AutoModelForObjectDetection", repo="me/det"), forbid_hf_vlm=True)
    assert loaded.splitlines()[-1] == "VLMViTForObjectDetection"


def test_pretraining_leaves_an_encoder_on_the_hub(hub_server, run_python):
    train(run_python, "mae", "me/enc")
    loaded = run_python(LOAD.format(auto="AutoModel", repo="me/enc"), forbid_hf_vlm=True)
    assert loaded.splitlines()[-1] == "VLMViTModel"
    assert "pretraining_model/model.safetensors" in hub_server.files("me/enc")
