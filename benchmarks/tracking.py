"""Does appearance keep identities where boxes alone lose them? Clips with truth, equal detections for all trackers.

`python benchmarks/tracking.py [--quick] [--pretrained RUN] [--mot_folder FOLDER]`; needs the extra `hf_vlm[track]` for
ByteTrack, BoT-SORT and the metrics (HOTA, IDF1, MOTA by `trackers.eval`). Clips are rendered (`tracking_clips.py`) or
sequences of MOTChallenge. Detections are the true boxes with misses, noise of position and size, and scores below 1;
`--false_detections` adds some that show no object.
Appearance is what the middle of each detection shows: its mean colour (the baseline without an encoder), or the mean
of an encoder's patch tokens, of random weights or of the run of `--pretrained`, for which `--write_frames FOLDER`
writes images of the training split.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe
from tracking_clips import Clip, mot_clips, rendered_clips, write_frames

from hf_vlm.deploy.mot import mot_rows, write_mot
from hf_vlm.deploy.track import create_tracker
from hf_vlm.features.boxes import appearance_features
from hf_vlm.features.loading import load_frozen_encoder
from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_vlm_vit import VLMViTModel

THRESHOLD = 0.5
MIN_SIDE = 192  # of images as encoders see them: patches of 8 pixels are then small beside objects of 18
NUM_TRAINING_CLIPS = 1000
LIBRARY = ("bytetrack", "botsort")
METRICS = (("hota", 100), ("idf1", 100), ("mota", 100), ("switches", 1))

Features = Callable[[Clip], list[Any]]  # of a clip's detections, (n, dim) per frame


def colors(clip: Clip) -> list[Any]:
    """Mean colours (n, 3) of the middles of boxes."""
    maps = [torch.from_numpy(image).permute(2, 0, 1) for image in clip.images]
    return [
        appearance_features(colors_of, torch.from_numpy(one.boxes), one.image_size).numpy()
        for colors_of, one in zip(maps, clip.found, strict=True)
    ]


def tokens(model: VLMViTModel, processor: Any) -> Features:
    """Mean patch tokens (n, dim) of the middles of boxes."""

    @torch.inference_mode()
    def features(clip: Clip) -> list[Any]:
        patch = model.config.patch_size
        scale = max(1.0, MIN_SIDE / min(clip.images[0].shape[:2]))
        height, width = (patch * round(scale * side / patch) for side in clip.images[0].shape[:2])
        found = []
        for image, one in zip(clip.images, clip.found, strict=True):
            size = {"height": height, "width": width}
            pixels = processor(image, return_tensors="pt", input_data_format="channels_last", size=size)
            output = model(pixel_values=pixels["pixel_values"]).last_hidden_state[0, model.config.num_prefix_tokens :]
            feature_map = output.T.unflatten(1, (height // patch, width // patch))
            found.append(appearance_features(feature_map, torch.from_numpy(one.boxes), one.image_size).numpy())
        return found

    return features


def appearances(pretrained: str | None) -> dict[str, Features]:
    """All kinds of appearance: colour, tokens of random weights, and those of a run with the same architecture."""
    torch.manual_seed(0)
    if pretrained is None:
        config = VLMViTConfig(
            image_size=96,
            patch_size=8,
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=3,
            position_embedding_type="sincos",
        )
        return {"colour": colors, "random": tokens(VLMViTModel(config).eval(), VLMViTImageProcessor())}
    model, processor = load_frozen_encoder(pretrained)
    random = VLMViTModel(model.config).eval()
    return {"colour": colors, "random": tokens(random, processor), "pretrained": tokens(model.eval(), processor)}


def tracked(clip: Clip, name: str) -> tuple[list[Any], float]:
    """Rows of MOT, and the seconds of tracking."""
    tracker = create_tracker(name, threshold=THRESHOLD)
    start = time.perf_counter()
    ids = [tracker(prediction, image) for prediction, image in zip(clip.found, clip.images, strict=True)]
    seconds = time.perf_counter() - start
    rows = []
    for frame, (prediction, numbers) in enumerate(zip(clip.found, ids, strict=True), 1):
        rows.append(mot_rows(dataclasses.replace(prediction, track_ids=numbers).select(numbers > 0), frame))
    return rows, seconds


def evaluate(folder: Path, name: str) -> dict[str, float]:
    from trackers.eval import evaluate_mot_sequences

    result = evaluate_mot_sequences(folder / "truth", folder / name, metrics=["CLEAR", "HOTA", "Identity"]).aggregate
    return {
        "hota": float(result.HOTA.HOTA),
        "idf1": float(result.Identity.IDF1),
        "mota": float(result.CLEAR.MOTA),
        "switches": float(result.CLEAR.IDSW),
    }


def compare(clips: list[Clip], features: dict[str, Features], speed: dict[str, list[float]]) -> dict[str, Any]:
    """Metrics by tracker over all clips; adds the frames per second on each clip to `speed`."""
    names = [*LIBRARY, "motion", *features]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("truth", *names):
            (folder / name).mkdir()
        for number, clip in enumerate(clips):
            write_mot(folder / "truth" / f"{number}.txt", clip.truth)
            for name in names:
                shown = clip.with_appearance(features[name](clip)) if name in features else clip
                rows, seconds = tracked(shown, "appearance" if name in features else name)
                speed.setdefault(name, []).append(len(clip.images) / seconds)
                write_mot(folder / name / f"{number}.txt", rows)
        return {name: evaluate(folder, name) for name in names}


def print_table(scores: list[dict[str, Any]], speed: dict[str, list[float]]) -> None:
    print("| tracker | HOTA | IDF1 | MOTA | identity switches | frames per second |\n|---|---:|---:|---:|---:|---:|")
    for name in scores[0]:
        cells = []
        for metric, scale in METRICS:
            values = scale * np.array([of_seed[name][metric] for of_seed in scores])
            cells.append(f"{values.mean():.1f} ± {values.std(ddof=1) if len(values) > 1 else 0:.1f}")
        title = name if name in (*LIBRARY, "motion") else f"appearance, {name}"
        print(f"| {title} | {' | '.join(cells)} | {np.median(speed[name]):.0f} |")


def headline(scores: list[dict[str, Any]]) -> dict[str, float]:
    """What the last line of the output gives; ours has the appearance of the pretrained encoder where there is one."""
    ours = "pretrained" if "pretrained" in scores[0] else "random"
    chosen = {"bytetrack": "bytetrack", "ours": ours, "random": "random", "motion": "motion", "colour": "colour"}
    found = {f"idf1_{key}": [of_seed[name]["idf1"] for of_seed in scores] for key, name in chosen.items()}
    found["hota_ours"] = [of_seed[ours]["hota"] for of_seed in scores]
    return {key: round(float(np.mean(values)), 4) for key, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter clips")
    parser.add_argument("--pretrained", help="run of a pretrained encoder whose features are the appearance")
    parser.add_argument("--mot_folder", type=Path, help="sequences of MOTChallenge to track instead of rendered clips")
    parser.add_argument("--write_frames", type=Path, help="folder to write images for pretraining to, and end")
    parser.add_argument("--split", default="test", help="of rendered clips; settings are chosen on validation")
    parser.add_argument("--false_detections", type=float, default=0.0, help="mean number per frame")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.write_frames is not None:
        write_frames(arguments.write_frames, NUM_TRAINING_CLIPS)
        return
    num_clips, num_frames = (3, 60) if arguments.quick else (8, 120)
    features = appearances(arguments.pretrained)
    scores: list[dict[str, Any]] = []
    speed: dict[str, list[float]] = {}
    for seed in range(arguments.seeds):
        num_false = arguments.false_detections
        if arguments.mot_folder is None:
            clips = rendered_clips(seed, num_clips, num_frames, split=arguments.split, num_false=num_false)
        else:
            clips = mot_clips(arguments.mot_folder, seed, num_false=num_false)
        scores.append(compare(list(clips), features, speed))
    print(f"{describe(torch.device('cpu'))}\n{arguments.seeds} seeds of {len(speed['motion']) // len(scores)} clips\n")
    print_table(scores, speed)
    print(json.dumps(headline(scores)))


if __name__ == "__main__":
    main()
