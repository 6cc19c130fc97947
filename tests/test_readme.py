"""Every block of code in README.md runs as it is there, on small data and models."""

import json
import re
import shlex
from pathlib import Path

from tiny import DETECTION_HEAD

ROOT = Path(__file__).parents[1]

# What the commands find in their folder: images of every kind that README names, and an encoder of transformers.
PREPARE = """
import json
from pathlib import Path
import numpy as np
from PIL import Image
from transformers import Dinov2Config, Dinov2Model
from datasets import Dataset
from hf_vlm.data.video import VideoWriter

rng = np.random.default_rng(0)

def save_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(path)

for index in range(8):
    for folder in ("my-images", "my-org/unlabelled-images"):
        save_image(Path(folder, f"{index}.png"))
    for split in ("train", "validation", "test"):
        save_image(Path("my-coco-folder", split, f"{index}.png"))
        for name in ("cat", "dog"):
            save_image(Path("my-class-folders", split, name, f"{index}.png"))
images = [{"bytes": path.read_bytes(), "path": None} for path in Path("my-images").iterdir()]
Path("my-shards").mkdir()
Dataset.from_dict({"image": images}).to_parquet("my-shards/train.parquet")
for split in ("train", "validation", "test"):
    boxes = [
        {"id": i, "image_id": i, "category_id": i % 2, "bbox": [4, 6, 20, 30], "area": 600, "iscrowd": 0,
         "segmentation": [[4, 6, 24, 6, 24, 36, 4, 36]]}
        for i in range(8)
    ]
    Path("my-coco-folder", split, "_annotations.coco.json").write_text(json.dumps({
        "images": [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 48} for i in range(8)],
        "annotations": boxes,
        "categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}],
    }))
save_image(Path("photo.jpg"))
save_image(Path("aerial.tif"))
save_image(Path("photos", "1.jpg"))
with VideoWriter(Path("clip.mp4"), 10) as writer:
    for _ in range(2):
        writer.write(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8))
Dinov2Model(
    Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
).save_pretrained("facebook/dinov2-small")
"""
RUN_COMMANDS = """
from hf_vlm.cli.main import main
for arguments in COMMANDS:
    assert main(arguments) == 0, arguments
"""

ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
TINY_STACK = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
HEADS = {  # by recipe
    "mae/vit_small.yaml": {"decoder_config": TINY_STACK},
    "detection/vit_small.yaml": DETECTION_HEAD,
    "classification/vit_small.yaml": {},
    "simclr/vit_small.yaml": {"projection_hidden_size": 32},
    "image_text/vit_small.yaml": {"lock_encoder": True, "text_config": {**TINY_STACK, "intermediate_size": 32}},
}
for recipe in ("region_detection/vit_small.yaml", "instance_segmentation/vit_small.yaml"):
    HEADS[recipe] = HEADS["detection/vit_small.yaml"]
NAMES = {"my-org/my-detector": "me/my-detector"}  # who pushes in the test


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def small(command):
    """The arguments of a command of README, its trainings made small enough to be run."""
    arguments = [NAMES.get(word, word) for word in shlex.split(command, comments=True)]
    if arguments[0] == "accelerate":  # the command it starts on many devices, here on one
        assert (ROOT / arguments[arguments.index("--config_file") + 1]).is_file()
        arguments = [*arguments[arguments.index("hf_vlm.cli") :], "--overwrite_output_dir", "true"]
    arguments = arguments[1:]
    recipe = arguments[1]
    if recipe.startswith("--"):  # none is named, and on a CPU the nano ones are chosen, whose heads have these fields
        recipe = {"pretrain": "region_detection", "finetune": "detection"}[arguments[0]] + "/vit_small.yaml"
    if arguments[0] in ("pretrain", "finetune", "probe"):
        arguments += ["--max_steps", "1", "--per_device_train_batch_size", "2", "--num_probe_examples", "4"]
        if "--encoder" not in arguments:
            arguments += ["--encoder_config", json.dumps(ENCODER | {"position_embedding_type": "sincos"})]
        arguments += ["--model_config", json.dumps(HEADS[recipe]), "--image_size", "32"]
        arguments += ["--dataloader_num_workers", "0", "--use_cpu", "true", "--bf16", "false"]
    if recipe.startswith("region_detection"):  # after one step it is sure of nothing
        arguments += ["--labels_per_image", "1", "--rounds", "1"]
    if arguments[0] == "probe":
        arguments += ["--protocols", "knn", "lora"]
    if arguments[0] == "push":  # verification starts a process that imports torch again
        arguments += ["--verify", "false"]
    if arguments[0] == "embed":
        arguments += ["--num_queries", "2", "--num_neighbors", "2"]
    return arguments


def test_the_commands_run_in_their_order(hub, run_process, tmp_path):
    hub.clear()
    make, commands = blocks("")
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {line.split()[1] for line in make.splitlines() if line.strip()} <= set(targets)
    lines = commands.replace("\\\n", "").splitlines()
    # An export takes as long as all others together, and a server has no end: tests/deploy/ has one of each.
    others = ("hf-vlm export", "hf-vlm serve")
    runs = [small(line) for line in lines if line.strip() and not line.startswith(others)]
    code = f"{PREPARE}\nCOMMANDS = {runs!r}\n{RUN_COMMANDS}"
    printed = run_process(code, tmp_path, token="owner")
    assert "AP" in printed
    for name in (
        "curated/report.html",
        "out.png",
        "features.parquet",
        "found.png",
        "neighbors.png",
        "maps.png",
        "confusion.png",
        "views.png",
        "accuracies.png",
    ):
        assert (tmp_path / name).stat().st_size > 0
    assert "model.safetensors" in hub.files("me/my-detector")

    (block,) = blocks("python")
    link = tmp_path / "my-org" / "my-detector"
    link.symlink_to(tmp_path / "runs" / "detector")
    run_process(block + "\nassert detect('photo.jpg') is not None and mae.config.mask_ratio == 0.75", tmp_path)
