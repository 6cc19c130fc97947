"""What `hf-vlm serve` stands: many requests at once, malformed ones, and its memory before and after.

    python benchmarks/serve.py [--run runs/detector] [--quick]

Starts the command on a free port of this machine, the endpoint alone, and asks it as other processes do. Without --run
it serves the nano detector of recipes/detection/vit_nano_cpu.yaml with random weights, which are as fast. Every answer
is compared with the one to the same image when nothing else was asked. The last line of stdout is JSON.
"""

import argparse
import asyncio
import io
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import torch
from machine import describe
from PIL import Image

from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.image_processing_detection import VLMViTDetectionImageProcessor
from hf_vlm.models.modeling_detection import VLMViTDetectionConfig, VLMViTForObjectDetection
from hf_vlm.training.recipe import load_recipe

RECIPE, SIZE = "detection/vit_nano_cpu.yaml", (192, 256)
NUM_IMAGES = 8
SECONDS = 600.0  # after which a request counts as lost


def save_detector(folder: Path) -> Path:
    """The nano recipe's detector with random weights."""
    backbone = VLMViTConfig.from_preset("nano", image_size=list(SIZE), patch_size=16)
    fields = {"prior_probability": 0.5, **load_recipe(RECIPE)["model_config"]}
    torch.manual_seed(0)
    names = {index: f"class {index}" for index in range(6)}
    model = VLMViTForObjectDetection(VLMViTDetectionConfig(backbone_config=backbone, id2label=names, **fields))
    model.save_pretrained(folder)
    VLMViTDetectionImageProcessor(size={"height": SIZE[0], "width": SIZE[1]}).save_pretrained(folder)
    return folder


def photos() -> list[bytes]:
    """JPEGs of 640 x 480."""
    generator, found = np.random.default_rng(0), []
    for _ in range(NUM_IMAGES):
        blocks = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        file = io.BytesIO()
        blocks.resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


def malformed(photo: bytes, generator: random.Random) -> dict[str, Any]:
    """A request that must get a 4xx status: of one of these kinds, with random contents."""
    noise, position = generator.randbytes(generator.randrange(1, 2000)), generator.randrange(20, len(photo) // 2)
    jpeg, form = {"Content-Type": "image/jpeg"}, {"Content-Type": "multipart/form-data; boundary=x"}
    return generator.choice(
        [
            {"content": noise, "headers": jpeg},
            {"content": photo[:position], "headers": jpeg},
            {"content": b"", "headers": jpeg},
            {"content": photo, "headers": {"Content-Type": "text/plain"}},
            {"content": noise, "headers": form},
            {"content": b"--x\r\n" + noise, "headers": form},
            {"content": noise, "headers": {"Content-Type": "application/json"}},
            {"json": {"image": noise.hex() + "%"}},
            {"json": {"image": "aGVsbG8=", "threshold": generator.uniform(1.1, 9)}},
            {"files": {"image": photo}, "data": {"threshold": "nan"}},
            {"files": {"image": bytes(11_000_000)}},
            {"content": photo, "headers": {**jpeg, "Content-Encoding": "gzip"}},
        ]
    )


async def ask_all(client: httpx2.AsyncClient, requests: list[dict[str, Any]]) -> list[tuple[int, Any, float]]:
    """Status, JSON and seconds of requests that are sent at the same time; status 0 for those without an answer."""

    async def ask(request: dict[str, Any]) -> tuple[int, Any, float]:
        started = time.perf_counter()
        try:
            answer = await client.post("/predict", **request)
            return answer.status_code, answer.json(), time.perf_counter() - started
        except (httpx2.HTTPError, ValueError) as error:
            print(f"no answer: {error!r}", file=sys.stderr)
            return 0, None, time.perf_counter() - started

    return list(await asyncio.gather(*map(ask, requests)))


async def measure(url: str, process_id: int, *, num_requests: int, num_rounds: int, num_malformed: int) -> Any:
    """Figures of a server."""
    images = [{"files": {"image": photo}} for photo in photos()]
    generator = random.Random(0)
    wrong = [malformed(images[0]["files"]["image"], generator) for _ in range(num_malformed)]
    limits = httpx2.Limits(max_connections=num_requests)
    async with httpx2.AsyncClient(base_url=url, timeout=SECONDS, limits=limits) as client:
        alone = [(await ask_all(client, [request]))[0] for request in images * 3][-NUM_IMAGES:]
        memory = [resident_mib(process_id)]
        rates, lost, different, cpu_before = [], 0, 0, cpu_seconds(process_id)
        for _ in range(num_rounds):
            started = time.perf_counter()
            found = await ask_all(client, [images[i % NUM_IMAGES] for i in range(num_requests)])
            rates.append(num_requests / (time.perf_counter() - started))
            lost += sum(status != 200 for status, _, _ in found)
            different += sum(answer != alone[i % NUM_IMAGES][1] for i, (_, answer, _) in enumerate(found))
            memory.append(resident_mib(process_id))
        cpu = cpu_seconds(process_id) - cpu_before
        refused: list[tuple[int, Any, float]] = []
        for first in range(0, num_malformed, 20):
            refused += await ask_all(client, wrong[first : first + 20])
        memory.append(resident_mib(process_id))
    return {
        "requests_per_second": round(statistics.median(rates), 1),
        "cpu_ms_per_request": round(1000 * cpu / (num_requests * num_rounds), 1),
        "alone_ms": round(1000 * statistics.median(seconds for _, _, seconds in alone), 1),
        "requests": num_requests * num_rounds,
        "lost": lost,
        "different": different,
        "malformed": num_malformed,
        "malformed_not_4xx": sum(not 400 <= status < 500 or "error" not in answer for status, answer, _ in refused),
        "malformed_slowest_ms": round(1000 * max(seconds for _, _, seconds in refused)),
        "mib": memory,
    }


def resident_mib(process_id: int) -> int:
    """Resident memory of a process."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process_id}/status").read_text())
    assert found is not None
    return int(found[1]) // 1024


def cpu_seconds(process_id: int) -> float:
    """Processor time of a process, in which other work on the machine does not count."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Prints the metrics."""
    parser = argparse.ArgumentParser(description="Load of hf-vlm serve on this machine.")
    parser.add_argument("--run", help="folder of a model")
    parser.add_argument("--quick", action="store_true", help="few requests: not a result to quote")
    arguments = parser.parse_args()
    print(describe(torch.device("cpu")))
    sizes = {"num_requests": 200, "num_rounds": 1 if arguments.quick else 3}
    sizes["num_malformed"] = 60 if arguments.quick else 500
    with tempfile.TemporaryDirectory() as folder:
        run = arguments.run or str(save_detector(Path(folder, "detector")))
        words = [sys.executable, "-m", "hf_vlm.cli", "serve", run, "--port", "0", "--no_page"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
            assert server.stdout is not None
            url = re.search(r"http://[\d.:]+\d", server.stdout.readline())
            assert url is not None
            try:
                print(json.dumps(asyncio.run(measure(url[0], server.pid, **sizes))))
            finally:
                server.terminate()


if __name__ == "__main__":
    main()
