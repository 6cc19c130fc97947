"""What a model of images and texts understands: hard negatives of scenes, and classes that it never saw.

    python benchmarks/image_text.py --data_dir D [--quick]

Scenes: a model is pretrained by `recipes/image_text/vit_nano_cpu.yaml` on the built-in scenes with captions. Of each
scene of the test split it chooses between its caption and a false one that differs in a colour, a count, a class or a
relation alone, by which of the two is more similar to the image: chance is 0.5. R@1 is among all captions of the first
`NUM_RANKED` scenes.

Groceries: `D/grocery_store` has 81 classes. `NUM_UNSEEN` of them, chosen by the seed, are left out of training, in
which the texts of the others are their names. The images of the unseen classes in the test split are then classified
by name among these. The anchor is a frozen MobileNetV2 of ImageNet with a ridge regression to the embeddings of a
sentence model (29.9 %, measured once with 5 draws); chance is 1 / `NUM_UNSEEN`.

Search: the nearest of random features, in memory, to one query.

The last line of stdout is one JSON object of the metrics.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from hf_vlm.data.scenes.captions import KINDS, hard_negatives
from hf_vlm.data.scenes.render import PRESETS, render_scene
from hf_vlm.data.source import Source
from hf_vlm.data.sources import open_source
from hf_vlm.features.extraction import SHARED, encode
from hf_vlm.features.loading import LoadedModel, load_model
from hf_vlm.features.neighbors import nearest_rows
from hf_vlm.features.search import CHUNK_SIZE
from hf_vlm.features.texts import embed_classes, embed_texts, load_tokenizer
from hf_vlm.tasks.evaluation import eval_stream, evaluate_run
from hf_vlm.tasks.zero_shot import ZERO_SHOT
from hf_vlm.training.recipe import load_recipe
from hf_vlm.training.run import pretrain, quiet_libraries

RECIPE = "image_text/vit_nano_cpu.yaml"
ANCHOR = 0.299
NUM_UNSEEN = 16
NUM_RANKED = 1000
BATCH_SIZE = 250


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    return {**load_recipe(RECIPE), "output_dir": str(folder), "probe_steps": 0, "save_strategy": "no", **changes}


def measure_scenes(folder: Path, num_scenes: int) -> dict[str, float]:
    """Accuracy by kind of hard negative, and recall among all captions."""
    loaded, settings, rng = load_model(folder), PRESETS["captions"], np.random.default_rng(0)
    tokenizer = load_tokenizer(loaded.model)
    found: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for first in range(0, num_scenes, BATCH_SIZE):
        shown = [render_scene(0, i, settings, split="test") for i in range(first, min(first + BATCH_SIZE, num_scenes))]
        images = embed(loaded, [scene.image for scene in shown])  # (scenes, dim)
        pairs = [
            (row, kind, pair)
            for row, scene in enumerate(shown)
            for kind, pair in hard_negatives(scene, settings, rng).items()
        ]
        texts = embed_texts(loaded.model, tokenizer, [text for *_, pair in pairs for text in pair]).unflatten(
            0, (-1, 2)
        )
        for (row, kind, _), (true, false) in zip(pairs, texts):
            found[kind].append(bool(images[row] @ true > images[row] @ false))
    metrics = {f"scenes_{kind}": float(np.mean(hits)) for kind, hits in found.items()}
    recall = evaluate_run(folder, "scenes:captions", "test", num_examples=NUM_RANKED).metrics
    return metrics | {name: recall[name] for name in ("image_to_text_r1", "text_to_image_r1", "text_to_image_r10")}


def embed(loaded: LoadedModel, images: list[Any]) -> Tensor:
    pixel_values = loaded.processor(images, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    return encode(loaded.model, pixel_values, pooling=SHARED)


def only_classes(source: Source, labels: list[int]) -> Source:
    kept = set(labels)
    return replace(source, dataset=source.dataset.filter(lambda example: example["label"] in kept), num_examples=None)


def measure_groceries(folder: Path, data: Path, args: argparse.Namespace) -> float:
    """Zero-shot accuracy on classes that were left out of training."""
    source = open_source(data, "train")
    names = source.label_names or []
    order = np.random.default_rng(args.seed).permutation(len(names)).tolist()
    unseen, seen = sorted(order[:NUM_UNSEEN]), sorted(order[NUM_UNSEEN:])
    changes: dict[str, Any] = {"data": str(data), "max_steps": args.grocery_steps, "image_size": args.image_size}
    if args.text_encoder:
        changes["text_encoder"] = args.text_encoder
    if args.encoder:
        model = {"projection_size": 256, "lock_encoder": True, "num_extra_blocks": 2}
        changes |= {"encoder": args.encoder, "encoder_preset": None, "encoder_config": {}, "model_config": model}
    pretrain(recipe(folder, **changes), only_classes(source, seen))
    loaded = load_model(folder)
    test = only_classes(open_source(data, "test"), unseen)
    stream = eval_stream(test, ZERO_SHOT.transform(loaded.processor), max_bad_fraction=0.0)
    classes = embed_classes(loaded.model, load_tokenizer(loaded.model), [names[label] for label in unseen])
    hits = []
    for batch in DataLoader(stream, batch_size=BATCH_SIZE, collate_fn=ZERO_SHOT.collate()):
        nearest = (encode(loaded.model, batch["pixel_values"], pooling=SHARED) @ classes.T).argmax(dim=1)
        hits += [unseen[row] == label for row, label in zip(nearest.tolist(), batch["label"])]
    return float(np.mean(hits))


def measure_search(num_features: int, width: int = 256) -> float:
    """Seconds, the best of three, in which the ten nearest of random features in memory are found."""
    features = torch.empty(num_features, width)
    for part in features.split(CHUNK_SIZE):
        F.normalize(part.normal_(), dim=1, out=part)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        nearest_rows(features[:1], features.split(CHUNK_SIZE), 10, are_normalized=True)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, help="folder with grocery_store; without it that part is left out")
    parser.add_argument("--run", type=Path, help="model of scenes that is there already, to be measured alone")
    parser.add_argument("--encoder", help="trained encoder to lock, for groceries; by default both learn")
    parser.add_argument("--text_encoder", help="text model of transformers, for groceries; by default a new one")
    parser.add_argument("--scene_steps", type=int, default=1500)
    parser.add_argument("--grocery_steps", type=int, default=400)
    parser.add_argument("--num_scenes", type=int, default=2000)
    parser.add_argument("--num_features", type=int, default=1_000_000)
    parser.add_argument("--image_size", type=int, default=96, help="of groceries")
    parser.add_argument("--seed", type=int, default=0, help="of the classes that are left out")
    parser.add_argument("--quick", action="store_true", help="few steps: that it runs, not how good the models are")
    args = parser.parse_args()
    if args.quick:
        args.scene_steps, args.grocery_steps, args.num_scenes, args.num_features = 40, 20, 200, 100_000
    quiet_libraries()
    print(f"{machine.describe(torch.device('cpu'))}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.run or Path(temporary, "scenes")
        if args.run is None:
            pretrain(recipe(folder, data="scenes:captions", max_steps=args.scene_steps))
        metrics: dict[str, float] = {"chance": 0.5, **measure_scenes(folder, args.num_scenes)}
        if args.data_dir is not None:
            top1 = measure_groceries(Path(temporary, "groceries"), args.data_dir / "grocery_store", args)
            metrics |= {"unseen_top1": top1, "anchor": ANCHOR, "unseen_chance": 1 / NUM_UNSEEN}
    metrics["search_seconds"] = measure_search(args.num_features)
    for name, value in metrics.items():
        print(f"{name:<20} {value:.4f}")
    print(json.dumps({name: round(value, 4) for name, value in metrics.items()}))


if __name__ == "__main__":
    main()
