"""Does appearance from the encoder keep identities where boxes alone lose them? Clips with truth, equal detections.

`python benchmarks/tracking.py [--quick] [--pretrained RUN]`; needs the extra `hf_vlm[track]` for ByteTrack and the
metrics (HOTA, IDF1, MOTA by `trackers.eval`). Clips are rendered (`render_clip`): five to seven objects of one class,
of several colours, that cross and hide each other before a panning background and a shaking camera. Detections are the
true boxes with misses, noise of position and size, and scores below 1, the same for all trackers. Appearance is the
encoder's patch tokens within each detection: of random weights, or of the run of `--pretrained`.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe

from hf_vlm.data.scenes.render import SceneSettings, render_clip
from hf_vlm.deploy.mot import mot_rows, write_mot
from hf_vlm.deploy.prediction import Prediction
from hf_vlm.deploy.track import create_tracker
from hf_vlm.features.boxes import box_features
from hf_vlm.features.loading import load_frozen_encoder
from hf_vlm.models.modeling_vlm_vit import VLMViTModel

CLIPS = SceneSettings(
    objects="symbols",
    backgrounds="landscapes",
    image_size=96,
    num_classes=1,
    min_objects=5,
    max_objects=7,
    min_object_size=18.0,
    max_object_size=26.0,
    max_rotation=15.0,
    min_contrast=0.3,
    max_contrast=0.55,
    min_crop=72,
    max_speed=3.0,
    camera_shake=3.0,
)
THRESHOLD = 0.5
MISSES, NOISE = 0.15, 0.06  # fraction of detections that are left out; standard deviation relative to the box


def detections(scenes: list[Any], rng: np.random.Generator) -> list[Prediction]:
    """The true boxes with misses, noise and scores of 0.3 to 0.95."""
    found = []
    for frame, scene in enumerate(scenes):
        rows = np.flatnonzero(rng.uniform(size=len(scene.boxes)) >= MISSES)
        size = scene.boxes[rows, 2:]
        noise = rng.normal(scale=NOISE, size=(len(rows), 4)) * np.tile(size, 2)
        corners = np.concatenate([scene.boxes[rows, :2], scene.boxes[rows, :2] + size], axis=1) + noise
        found.append(
            Prediction(
                scores=rng.uniform(0.3, 0.95, len(rows)).astype(np.float32),
                labels=np.zeros(len(rows), dtype=np.int64),
                label_names=["object"] * len(rows),
                image_size=(scene.image.shape[0], scene.image.shape[1]),
                boxes=np.clip(corners, 0, scene.image.shape[0]).astype(np.float32),
                frame=frame,
            )
        )
    return found


@torch.inference_mode()
def with_appearance(found: list[Prediction], scenes: list[Any], model: Any, processor: Any) -> list[Prediction]:
    """The detections with the means of the encoder's patch tokens in their boxes."""
    images = [scene.image for scene in scenes]
    pixels = processor(images, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    tokens = model(pixel_values=pixels).last_hidden_state  # (frames, prefix + patches, dim)
    side = pixels.shape[-1] // model.config.patch_size
    maps = tokens[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))
    result = []
    for prediction, feature_map in zip(found, maps, strict=True):
        boxes = torch.from_numpy(prediction.boxes) / images[0].shape[0]
        centered = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], dim=1)
        features = box_features(feature_map[None], centered[None])[0].numpy()
        result.append(dataclasses.replace(prediction, appearance=features))
    return result


def tracked(found: list[Prediction], images: list[Any], name: str) -> tuple[list[Any], float]:
    """Rows of MOT, and the seconds of tracking."""
    tracker = create_tracker(name, threshold=THRESHOLD)
    start = time.perf_counter()
    ids = [tracker(prediction, image) for prediction, image in zip(found, images, strict=True)]
    seconds = time.perf_counter() - start
    rows = []
    for frame, (prediction, numbers) in enumerate(zip(found, ids, strict=True), 1):
        rows.append(mot_rows(dataclasses.replace(prediction, track_ids=numbers).select(numbers > 0), frame))
    return rows, seconds


def truth(scenes: list[Any]) -> list[Any]:
    rows = []
    for frame, scene in enumerate(scenes, 1):
        ones = np.ones(len(scene.boxes))
        columns = [frame * ones, scene.track_ids + 1, *scene.boxes.T, ones, ones, ones]
        rows.append(np.stack(columns, axis=1).astype(np.float64))
    return rows


def evaluate(folder: Path, name: str) -> dict[str, float]:
    from trackers.eval import evaluate_mot_sequences

    result = evaluate_mot_sequences(folder / "truth", folder / name, metrics=["CLEAR", "HOTA", "Identity"]).aggregate
    return {
        "hota": float(result.HOTA.HOTA),
        "idf1": float(result.Identity.IDF1),
        "mota": float(result.CLEAR.MOTA),
        "switches": float(result.CLEAR.IDSW),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter clips")
    parser.add_argument("--pretrained", help="run of a pretrained encoder whose features are the appearance")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    num_clips, num_frames = (3, 60) if arguments.quick else (8, 120)
    encoders: dict[str, tuple[Any, Any]] = {}
    if arguments.pretrained:
        model, processor = load_frozen_encoder(arguments.pretrained)
        torch.manual_seed(0)
        encoders = {
            "pretrained": (model.eval(), processor),
            "random": (VLMViTModel(model.config).eval(), processor),
        }
    else:
        from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
        from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor

        config = VLMViTConfig(image_size=96, patch_size=8, hidden_size=96, num_hidden_layers=4, num_attention_heads=3)
        torch.manual_seed(0)
        encoders = {"random": (VLMViTModel(config).eval(), VLMViTImageProcessor(size=96))}
    scores: dict[str, list[dict[str, float]]] = {}
    frames, seconds = 0, {}
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            names = {"bytetrack": "bytetrack", "botsort": "botsort", "motion": "motion"}
            names |= {f"appearance, {name}": "appearance" for name in encoders}
            for name in ("truth", *names):
                (folder / name).mkdir()
            for clip in range(num_clips):
                scenes = render_clip(seed, clip, num_frames, CLIPS, split="test")
                images = [scene.image for scene in scenes]
                found = detections(scenes, np.random.default_rng([seed, clip]))
                write_mot(folder / "truth" / f"{clip}.txt", truth(scenes))
                frames += num_frames
                for name, tracker in names.items():
                    encoder = encoders.get(name.removeprefix("appearance, "))
                    shown = found if encoder is None else with_appearance(found, scenes, *encoder)
                    rows, taken = tracked(shown, images, tracker)
                    seconds[name] = seconds.get(name, 0.0) + taken
                    write_mot(folder / name / f"{clip}.txt", rows)
            for name in names:
                scores.setdefault(name, []).append(evaluate(folder, name))
    print(f"{describe(torch.device('cpu'))}\n{arguments.seeds} seeds of {num_clips} clips of {num_frames} frames\n")
    print("| tracker | HOTA | IDF1 | MOTA | identity switches | frames per second |\n|---|---:|---:|---:|---:|---:|")
    for name, of_seeds in scores.items():
        cells = []
        for metric, scale in (("hota", 100), ("idf1", 100), ("mota", 100), ("switches", 1)):
            values = scale * np.array([one[metric] for one in of_seeds])
            cells.append(f"{values.mean():.1f} ± {values.std(ddof=1) if len(values) > 1 else 0:.1f}")
        print(f"| {name} | {' | '.join(cells)} | {frames / seconds[name]:.0f} |")
    mean = {name: {key: np.mean([one[key] for one in of]) for key in of[0]} for name, of in scores.items()}
    appearance = "appearance, pretrained" if arguments.pretrained else "appearance, random"
    names = {"bytetrack": "bytetrack", "ours": "motion", "appearance": appearance, "random": "appearance, random"}
    metrics = {f"idf1_{key}": mean[name]["idf1"] for key, name in names.items()} | {
        "hota_ours": mean["motion"]["hota"]
    }
    print(json.dumps({key: round(float(value), 4) for key, value in metrics.items()}))


if __name__ == "__main__":
    main()
