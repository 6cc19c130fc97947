"""How long a resumed run waits for its first batch, early and late in the data, and the stock Trainer for comparison.

    python benchmarks/resume.py [--quick]

Three sources of tiny images: an index of 12 million, a Parquet file and WebDataset tars of fewer. Each is read to a
position as training reads it, its state is saved, and a new loader is timed from there to its first batch. The stock
Trainer saves no position: it reads and drops all batches up to it; that is timed at 10 thousand and not run at 10
million. The last line of stdout is JSON.
"""

import argparse
import io
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torchdata.stateful_dataloader import StatefulDataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments

from hf_vlm.data.io.decode import decode_image
from hf_vlm.data.io.indexed import indexed_stream
from hf_vlm.data.schema import image_feature
from hf_vlm.data.stream import ExampleStream

BATCH_SIZE = 64
FEATURES = datasets.Features({"image": image_feature(), "image_id": datasets.Value("int64")})


def encoded_image() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(file, "PNG")
    return file.getvalue()


PNG = encoded_image()


def read(position: int) -> dict[str, Any]:
    return {"image": {"bytes": PNG, "path": None}, "image_id": position}


def write_parquet(folder: Path, num_images: int) -> Path:
    folder.mkdir()
    rows = datasets.Dataset.from_dict({"image": [PNG] * num_images, "image_id": list(range(num_images))})
    rows.to_parquet(folder / "train.parquet", batch_size=1000)
    return folder


def write_tars(folder: Path, num_images: int, *, per_tar: int = 10_000) -> Path:
    folder.mkdir()
    for first in range(0, num_images, per_tar):
        with tarfile.open(folder / f"train-{first // per_tar:05d}.tar", "w") as tar:
            for index in range(first, min(first + per_tar, num_images)):
                member = tarfile.TarInfo(f"{index:08d}.png")
                member.size = len(PNG)
                tar.addfile(member, io.BytesIO(PNG))
    return folder


def pixels(example: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
    return {"pixel_values": torch.from_numpy(decode_image(example["image"])[0]), "image_id": example["image_id"]}


def identity(example: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
    return {"image_id": example["image_id"]}


def time_resume(open_source: Callable[[], datasets.IterableDataset], position: int, *, repeats: int) -> list[float]:
    """Seconds from a saved state to the first batch, each time with a newly opened source."""
    passed = ExampleStream(open_source(), identity)
    examples = iter(passed)
    for _ in tqdm(range(position), desc=f"Reading {position:,} examples", mininterval=2.0):
        next(examples)
    state = passed.state_dict()
    expected = [next(examples)["image_id"] for _ in range(BATCH_SIZE)]
    seconds = []
    for _ in range(repeats):
        stream = ExampleStream(open_source(), pixels)
        started = time.perf_counter()
        stream.load_state_dict(state)
        batch = next(iter(StatefulDataLoader(stream, batch_size=BATCH_SIZE, num_workers=0)))
        seconds.append(time.perf_counter() - started)
        assert batch["image_id"].tolist() == expected
    return seconds


class OneWeight(PreTrainedModel):
    """The smallest model that Trainer can train."""

    config_class = PreTrainedConfig

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor]:
        return {"loss": self.weight * pixel_values.float().mean()}


def time_trainer(folder: Path, parquet: Path, position: int) -> float:
    """Seconds that the stock Trainer takes longer to resume at a position than to start from scratch."""

    def decoded(example: dict[str, Any]) -> dict[str, Any]:
        return {"pixel_values": np.asarray(example["image"].convert("RGB"))}

    def train(max_steps: int, resume: str | None) -> float:
        stream = datasets.load_dataset("parquet", data_files=str(parquet / "*.parquet"), split="train", streaming=True)
        stream = stream.cast_column("image", datasets.Image()).select_columns(["image"]).map(decoded)
        args = TrainingArguments(
            output_dir=str(folder / "trainer"),
            max_steps=max_steps,
            per_device_train_batch_size=BATCH_SIZE,
            save_steps=max_steps,
            logging_steps=10**9,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=OneWeight(PreTrainedConfig()), args=args, train_dataset=stream.select_columns(["pixel_values"])
        )
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=resume)
        return time.perf_counter() - started

    num_steps = position // BATCH_SIZE
    train(num_steps, None)
    resumed = train(num_steps + 1, str(folder / "trainer" / f"checkpoint-{num_steps}"))
    return resumed - train(1, None)


def main() -> None:
    """Prints a table and the JSON line."""
    parser = argparse.ArgumentParser(description="Seconds to the first batch of a resumed run.")
    parser.add_argument("--quick", action="store_true", help="a tenth of the positions: not a result to quote")
    quick = parser.parse_args().quick
    late, num_files, repeats = (1_000_000, 20_000, 3) if quick else (10_000_000, 200_000, 5)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parquet = write_parquet(folder / "parquet", num_files)
        tars = write_tars(folder / "tars", num_files)
        table = {
            "index": (lambda: indexed_stream(read, 12_000_000, FEATURES), (10_000, late)),
            "parquet": (lambda: open_source(parquet).dataset, (10_000, num_files - 5_000)),
            "webdataset": (lambda: open_source(tars).dataset, (10_000, num_files - 5_000)),
        }
        medians = {}
        for name, (open_source, positions) in table.items():
            for position in positions:
                seconds = time_resume(open_source, position, repeats=repeats)
                median = medians[name, position] = statistics.median(seconds)
                print(f"{name:<11} {position:>10,}  {median:.3f} s  ({min(seconds):.3f} to {max(seconds):.3f})")
        replay = time_trainer(folder, parquet, 10_000)
        hours = replay / 10_000 * 10_000_000 / 3600
        print(f"stock Trainer, replay of 10,000: {replay:.2f} s; at this rate {hours:.1f} hours for 10 million")
    result = {
        "seconds_at_10k": round(medians["index", 10_000], 3),
        "seconds_at_10m": round(medians["index", late], 3),
        "trainer_replay_seconds_at_10k": round(replay, 2),
    }
    print(json.dumps(result | ({"quick": True} if quick else {})))


if __name__ == "__main__":
    main()
