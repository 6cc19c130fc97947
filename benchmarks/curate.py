"""`hf-vlm curate` on generated images with planted copies: what it finds, how fast, in how much memory.

    python benchmarks/curate.py [--num_images 200000] [--quick]

The images are random colours with shapes on them, of 96 x 96 pixels, generated fast; JPEGs in Parquet shards. A tenth
are exact copies of another, and a fifth near copies: compressed again, and by turns resized or cropped by 2 to 5 % on
each side. Two workers curate them; they and their parent are killed once half of the shards are measured, and the same
command is started again. With `--quick`, the shards are compared with those of a run that nobody killed. The last line
of stdout is JSON.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from hf_vlm.curation.measure import Reason
from hf_vlm.curation.selection import reasons_of
from hf_vlm.curation.work import WORK_FOLDER, CurationOptions, Work, open_work
from hf_vlm.data.io.decode import decode_image

Array = np.ndarray[Any, Any]

NUM_WORKERS = 2
SIDE = 96  # pixels
EXACT, NEAR = 0.1, 0.2  # fractions of the images
POLL_SECONDS = 0.2


def as_jpeg(image: Array, quality: int) -> bytes:
    data: bytes = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
    return data


def generated(number: int) -> Array:
    """Colours and shapes of an image, (96, 96, 3) uint8, by its number."""
    rng = np.random.default_rng((0, number))
    colors = rng.integers(0, 256, (*rng.integers(2, 7, 2), 3), dtype=np.uint8)
    image = cv2.resize(colors, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    for _ in range(rng.integers(2, 9)):
        color, radius = rng.integers(0, 256, 3).tolist(), int(rng.integers(3, SIDE // 4))
        x, y = rng.integers(0, SIDE, 2).tolist()
        if rng.random() < 0.5:
            cv2.circle(image, (x, y), radius, color, -1)
        else:
            cv2.rectangle(image, (x, y), (x + radius, y + 2 * radius), color, -1)
    noise = rng.integers(0, 16, image.shape, dtype=np.uint8)
    return cv2.add(image, noise)


def near_copy(data: bytes, rng: np.random.Generator) -> bytes:
    """The image compressed again, and by turns resized to 0.6 to 1.4 of its sides or cropped by 2 to 5 % on each."""
    image, (height, width) = decode_image(data)
    change = rng.integers(3)
    if change == 1:
        size = [max(1, round(side * rng.uniform(0.6, 1.4))) for side in (width, height)]
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    elif change == 2:
        top, bottom, left, right = rng.uniform(0.02, 0.05, 4)
        rows, columns = (
            slice(int(top * height), int((1 - bottom) * height)),
            slice(int(left * width), int((1 - right) * width)),
        )
        image = image[rows, columns]
    return as_jpeg(image, int(rng.integers(40, 90)))


def write_shard(folder: Path, shard: int, indices: range, num_originals: int) -> None:
    """A shard of rows: each an original, the exact copy of one, or a near copy, of any of the set."""
    rng = np.random.default_rng((1, shard))
    images, groups = [], []
    for index in indices:
        # The first 70 of each 100 images are originals, and each of the others is a copy of any.
        is_copy = index % 100 >= 100 * (1 - EXACT - NEAR)
        group = int(rng.integers(num_originals)) if is_copy else index // 100 * 70 + index % 100
        data = as_jpeg(generated(group), 92)
        images.append(near_copy(data, rng) if index % 100 >= 100 * (1 - NEAR) else data)
        groups.append(group)
    rows = [{"bytes": data, "path": None} for data in images]
    pq.write_table(
        pa.table({"image": rows, "group": groups}), folder / f"train-{shard:05d}.parquet", row_group_size=100
    )


def write_images(folder: Path, num_images: int, images_per_shard: int) -> None:
    folder.mkdir()
    num_originals = num_images * 7 // 10
    with ProcessPoolExecutor(NUM_WORKERS) as pool:
        starts = range(0, num_images, images_per_shard)
        shards = [range(start, min(start + images_per_shard, num_images)) for start in starts]
        futures = [pool.submit(write_shard, folder, *shard, num_originals) for shard in enumerate(shards)]
        for future in futures:
            future.result()


class Run:
    """A run of the command, and the most memory that one of its processes took."""

    def __init__(self, data: Path, output: Path) -> None:
        self.output, self.peak, self.quarters = output, 0.0, [0.0] * 4
        self.num_shards = len(list(data.iterdir()))
        command = [sys.executable, "-m", "hf_vlm.cli", "curate", str(data), str(output)]
        self.started = time.perf_counter()
        self.process = subprocess.Popen([*command, "--num_workers", str(NUM_WORKERS)], start_new_session=True)

    def num_measured(self) -> int:
        return len(list((self.output / WORK_FOLDER / "measure").glob("*.safetensors")))

    def watch(self, *, until: float = 2.0) -> float:
        """Wait for its end, or until a fraction of the shards is measured; seconds since the start."""
        while self.process.poll() is None and self.num_measured() < until * self.num_shards:
            memory = max(map(resident, processes_of(self.process.pid)), default=0.0)
            self.peak = max(self.peak, memory)
            quarter = min(3, 4 * self.num_measured() // self.num_shards)
            self.quarters[quarter] = max(self.quarters[quarter], memory)
            time.sleep(POLL_SECONDS)
        return time.perf_counter() - self.started

    def kill(self) -> None:
        """Kill it and its workers at once, as a machine that fails does."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def processes_of(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def resident(process: psutil.Process) -> float:
    try:
        return float(process.memory_info().rss) / 2**20
    except psutil.NoSuchProcess:
        return 0.0


def found_copies(work: Work) -> tuple[float, float, float]:
    """Recall of all planted copies, precision of all that were dropped as copies, and recall of exact ones.

    Of a group of n equal images n - 1 are to be dropped, whichever.
    """
    groups, reasons = [], []
    for shard, path in enumerate(work.shards):
        groups.append(pq.read_table(path, columns=["group"]).column("group").to_numpy())
        reasons.append(reasons_of(work, shard))
    group, reason = np.concatenate(groups), np.concatenate(reasons)
    sizes = np.bincount(group)
    dropped = np.bincount(group[(reason == Reason.EXACT) | (reason == Reason.NEAR)], minlength=len(sizes))
    planted = np.maximum(sizes - 1, 0)
    right = np.minimum(dropped, planted).sum()
    return float(right / planted.sum()), float(right / max(1, dropped.sum())), float((reason == Reason.EXACT).mean())


def digests(folder: Path) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.parquet"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, default=200_000)
    parser.add_argument("--quick", action="store_true", help="2,000 images")
    arguments = parser.parse_args()
    num_images = 2000 if arguments.quick else arguments.num_images
    images_per_shard = 250 if arguments.quick else 2000
    with tempfile.TemporaryDirectory() as name:
        data, output = Path(name, "data"), Path(name, "curated")
        started = time.perf_counter()
        write_images(data, num_images, images_per_shard)
        print(f"{num_images:,} images were generated in {time.perf_counter() - started:.0f} s", flush=True)
        killed = Run(data, output)
        seconds = killed.watch(until=0.5)
        killed.kill()
        print(f"killed after {seconds:.1f} s, {killed.num_measured()} of {killed.num_shards} shards being measured")
        continued = Run(data, output)
        seconds += continued.watch()
        if continued.process.returncode:
            raise SystemExit("the command failed")
        recall, precision, exact = found_copies(open_work(str(data), output, options=CurationOptions()))
        result = {
            "recall": round(recall, 4),
            "precision": round(precision, 4),
            "images_per_second": round(num_images / seconds, 1),
            "peak_rss_mb": round(max(killed.peak, continued.peak)),
            "images": num_images,
            "rss_by_quarter_mb": [round(max(pair)) for pair in zip(killed.quarters, continued.quarters)],
            "exact_fraction": round(exact, 4),
        }
        if arguments.quick:
            whole = Run(data, Path(name, "whole"))
            whole.watch()
            result["same_after_kill"] = digests(whole.output) == digests(output)
        print(json.dumps(result))


if __name__ == "__main__":
    main()
