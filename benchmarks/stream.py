"""JPEGs of a stream to ready uint8 batches at 224 px: images/s per core, vs what the field uses.

    python benchmarks/stream.py [--quick]           three image sizes, contestants interleaved
    python benchmarks/stream.py --workers           how two data workers scale (needs two idle cores)
    python benchmarks/stream.py --soak [1000000]    memory over this many examples

Contestants, each shuffled as its users usually do: ours (Parquet, block shuffle); `datasets` streaming Parquet,
decoded by Pillow, resized by Pillow; webdataset's tars, decoded and resized by Pillow (`pip install -e ".[bench]"`).
Time is the process's CPU time on one thread. The last line of stdout is JSON.
"""

import argparse
import io
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import datasets
import numpy as np
import psutil
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchdata.stateful_dataloader import StatefulDataLoader
from tqdm.auto import tqdm

from hf_vlm.data.io.decode import decode_image
from hf_vlm.data.sources import open_source
from hf_vlm.data.stream import ExampleStream
from hf_vlm.data.transforms.collate import stack
from hf_vlm.data.transforms.image_ops import resize

SIZE = (224, 224)
BATCH_SIZE = 64
SHUFFLE = 1000  # examples shuffled together
IMAGE_SIZES = {"500x375": (375, 500), "640x480": (480, 640), "1600x1200": (1200, 1600)}
MAIN_SIZE = "640x480"  # typical of COCO and of photos sent by phone; ImageNet's mean is 500 x 375


def write_images(folder: Path, size: tuple[int, int], num_images: int) -> None:
    """The same JPEGs, crops of photographs with the noise of a sensor, as Parquet and as a tar."""
    photographs = load_sample_images().images  # two, of 640 x 427
    generator = np.random.default_rng(0)
    encoded = []
    for index in range(num_images):
        photograph = photographs[index % 2]
        scale = generator.uniform(0.5, 1.0)
        height, width = (int(side * scale) for side in photograph.shape[:2])
        top, left = (
            int(generator.integers(0, side - part + 1)) for side, part in zip(photograph.shape, (height, width))
        )
        crop = cv2.resize(
            photograph[top : top + height, left : left + width], size[::-1], interpolation=cv2.INTER_CUBIC
        )
        noisy = np.clip(crop + generator.normal(0, 3, crop.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "JPEG", quality=90)
        encoded.append(file.getvalue())
    (folder / "parquet").mkdir(parents=True)
    features = datasets.Features({"image": datasets.Image()})
    rows = [{"image": {"bytes": data, "path": None}} for data in encoded]
    datasets.Dataset.from_list(rows, features=features).to_parquet(
        folder / "parquet" / "train.parquet", batch_size=100
    )
    with tarfile.open(folder / "train.tar", "w") as tar:
        for index, data in enumerate(encoded):
            member = tarfile.TarInfo(f"{index:06d}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def stacked(images: list[np.ndarray[Any, Any]]) -> torch.Tensor:
    return stack([torch.from_numpy(image) for image in images])  # (B, H, W, C) uint8


def pixels(example: dict[str, Any], generator: np.random.Generator) -> np.ndarray[Any, Any]:
    image, _ = decode_image(example["image"], at_least=SIZE)
    return resize(image, SIZE)


def ours(folder: Path, num_workers: int = 0) -> Iterator[torch.Tensor]:
    stream: Any = ExampleStream(open_source(folder / "parquet").dataset, pixels, block_size=SHUFFLE)
    return iter(StatefulDataLoader(stream, batch_size=BATCH_SIZE, collate_fn=stacked, num_workers=num_workers))


def resized(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.array(image.convert("RGB").resize(SIZE[::-1], Image.Resampling.BILINEAR))


def datasets_pillow(folder: Path) -> Iterator[torch.Tensor]:
    stream = datasets.load_dataset("parquet", data_files=str(folder / "parquet/*"), split="train", streaming=True)
    stream = stream.shuffle(seed=0, buffer_size=SHUFFLE).repeat(None).map(lambda row: {"image": resized(row["image"])})
    loader: Any = torch.utils.data.DataLoader(
        stream, batch_size=BATCH_SIZE, collate_fn=lambda rows: stacked([row["image"] for row in rows])
    )
    return iter(loader)


def webdataset_pillow(folder: Path) -> Iterator[torch.Tensor]:
    import webdataset

    stream = webdataset.WebDataset(str(folder / "train.tar"), shardshuffle=False).repeat()
    stream = stream.shuffle(SHUFFLE).decode("pil").to_tuple("jpg").map(lambda sample: resized(sample[0]))
    return iter(torch.utils.data.DataLoader(stream, batch_size=BATCH_SIZE, collate_fn=stacked))


CONTESTANTS: dict[str, Callable[[Path], Iterator[torch.Tensor]]] = {
    "ours": ours,
    "datasets_pillow": datasets_pillow,
    "webdataset_pillow": webdataset_pillow,
}


def seconds_per_image(batches: Iterator[torch.Tensor], num_batches: int) -> float:
    started = time.process_time()
    for batch in islice(batches, num_batches):
        assert batch.shape == (BATCH_SIZE, *SIZE, 3)
        assert batch.dtype == torch.uint8
    return (time.process_time() - started) / (num_batches * BATCH_SIZE)


def compare(folder: Path, *, rounds: int, num_batches: int) -> dict[str, float]:
    """Median ratios of the others' time to ours; contestants alternate within each round."""
    batches = {name: contestant(folder) for name, contestant in CONTESTANTS.items()}
    for contestant in batches.values():
        next(contestant)  # fills the shuffle buffer, once
    found: dict[str, list[float]] = {name: [] for name in batches}
    for _ in tqdm(range(rounds), desc=folder.name):
        for name, contestant in batches.items():
            found[name].append(seconds_per_image(contestant, num_batches))
    ratios = {}
    for name, seconds in found.items():
        ratio = [theirs / ours for theirs, ours in zip(seconds, found["ours"])]
        ratios[name] = statistics.median(ratio)
        print(
            f"{folder.name:<10} {name:<18} {1 / statistics.median(seconds):7.0f} images/s per core   "
            f"ours is {ratios[name]:.2f} times as fast ({min(ratio):.2f} to {max(ratio):.2f})"
        )
    return ratios


def check_pixels(folder: Path) -> float:
    """Mean absolute difference of our pixels from Pillow's with the same resize, in grey levels (0 to 255)."""
    differences = []
    for example in islice(open_source(folder / "parquet"), 20):
        with Image.open(io.BytesIO(example["image"]["bytes"])) as image:
            expected = np.asarray(image.convert("RGB").resize(SIZE[::-1], Image.Resampling.BILINEAR)).astype(float)
        differences.append(np.abs(pixels(example, np.random.default_rng(0)) - expected).mean())
    return float(np.mean(differences))


def scaling(folder: Path, *, rounds: int, num_batches: int) -> float:
    """Images per second of two data workers relative to one, in wall time; the two alternate."""
    ratios = []
    loaders = {workers: ours(folder, num_workers=workers) for workers in (1, 2)}
    for batches in loaders.values():
        for _ in range(8):
            next(batches)
    for _ in range(rounds):
        seconds = {}
        for workers, batches in loaders.items():
            for _ in range(2 * workers):
                next(batches)  # what was prefetched while the other ran
            started = time.perf_counter()
            for _ in range(num_batches):
                next(batches)
            seconds[workers] = time.perf_counter() - started
        ratios.append(seconds[1] / seconds[2])
    print(f"two workers: {statistics.median(ratios):.2f} times one ({min(ratios):.2f} to {max(ratios):.2f})")
    return statistics.median(ratios)


def soak(folder: Path, num_examples: int) -> float:
    """Growth of this process's memory in MiB, from a tenth of the examples to the end."""
    file = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(file, "JPEG")
    rows = datasets.Dataset.from_dict({"image": [file.getvalue()] * 100_000})
    folder.mkdir()
    rows.to_parquet(folder / "train.parquet", batch_size=1000)
    stream = ExampleStream(open_source(folder).dataset, lambda example, generator: decode_image(example["image"])[0])
    used = []
    for index, _ in enumerate(tqdm(islice(stream, num_examples), total=num_examples, mininterval=2.0)):
        if index % (num_examples // 100) == 0:
            used.append(psutil.Process().memory_info().rss / 2**20)
    growth = used[-1] - used[10]
    print(f"memory over {num_examples:,} examples: {used[0]:.0f} MiB, {used[10]:.0f} at a tenth, then {used[-1]:.0f}")
    return growth


def main() -> None:
    """Runs what the options select and prints the JSON line."""
    parser = argparse.ArgumentParser(description="Images per second of the data stream.")
    parser.add_argument("--quick", action="store_true", help="few images: not a result to quote")
    parser.add_argument("--workers", action="store_true", help="only how two workers scale")
    parser.add_argument("--soak", type=int, nargs="?", const=1_000_000, help="only memory over this many examples")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # otherwise each epoch of theirs sleeps for seconds
    num_images, rounds, num_batches = (130, 3, 2) if arguments.quick else (1500, 9, 6)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        if arguments.soak:
            print(json.dumps({"rss_growth_mib": round(soak(root / "soak", arguments.soak), 1)}))
            return
        if arguments.workers:
            write_images(root / MAIN_SIZE, IMAGE_SIZES[MAIN_SIZE], num_images)
            print(json.dumps({"workers_scaling": round(scaling(root / MAIN_SIZE, rounds=rounds, num_batches=40), 3)}))
            return
        ratios_by_size: dict[str, float] = {}
        for name, size in IMAGE_SIZES.items():
            write_images(root / name, size, num_images if size[0] < 1000 else num_images // 4)
            print(f"{name:<10} {check_pixels(root / name):.2f} grey levels from Pillow's bilinear resize, on average")
            ratios = compare(root / name, rounds=rounds, num_batches=num_batches)
            for other in ("datasets_pillow", "webdataset_pillow"):
                ratios_by_size[f"vs_{other}_{name}"] = round(ratios[other], 3)
                if name == MAIN_SIZE:
                    ratios_by_size[f"vs_{other}"] = round(ratios[other], 3)
        print(json.dumps(ratios_by_size | ({"quick": True} if arguments.quick else {})))


if __name__ == "__main__":
    main()
