"""What an export gains and costs: speed of each format and precision over torch, and AP before and after.

    python benchmarks/export.py [--quick]
    python benchmarks/export.py --run runs/detector --data ./my-coco-folder [--num_examples 60]

Exports a trained detector by the package's own command, gate included, and times artifact and model in turn on one
thread, one image at a time, in processor time, which other work on the machine does not count in. Without --run the
demo's detector is trained on built-in scenes first. The last line of stdout is JSON: speed-up by format and precision,
null where an artifact did not pass the gate, and the AP that int8 loses in OpenVINO.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from commands import hf_vlm
from machine import describe

from hf_vlm.data.images import first_images
from hf_vlm.data.sources import open_source
from hf_vlm.deploy.export import ExportData, export_model
from hf_vlm.deploy.gate import time_interleaved
from hf_vlm.features.export_formats import FORMATS
from hf_vlm.features.loading import load_model
from hf_vlm.training.run import quiet_libraries

SCENES = "scenes:icons"


def train(folder: Path, num_steps: int) -> Path:
    """The demo's detector, from random initialisation."""
    command = ["finetune", "demo/detector.yaml", "--data", SCENES, "--output_dir", str(folder)]
    command += ["--max_steps", str(num_steps), "--eval_strategy", "no", "--num_train_examples", "2000"]
    hf_vlm(*command)
    return folder


def measure(
    run: Path, folder: Path, format: str, precision: str, data: ExportData, repetitions: int
) -> dict[str, Any]:
    """Record of the gate, with the speed-up in processor time: median and quartiles of the pairs."""
    record = export_model(run, folder, format=format, precision=precision, data=data)
    model, artifact = load_model(run), load_model(folder)
    image = first_images(open_source(data.data, data.split, num_samples=1), 1)
    inputs = model.processor(image, return_tensors="pt", input_data_format="channels_last")
    with torch.inference_mode():
        times = time_interleaved(
            lambda: model.model(**inputs),
            lambda: artifact.model(**inputs),
            repetitions=repetitions,
            clock=time.process_time,
        )
    low, median, high = statistics.quantiles((before / after for before, after in times), n=4)
    return record | {"speed_up": median, "speed_up_quartiles": (low, high)}


def show(name: str, record: dict[str, Any]) -> str:
    """A row of the table."""
    low, high = record["speed_up_quartiles"]
    before, after = record["metric"]["before"], record["metric"]["after"]
    return (
        f"{name:<16} {record['megabytes']:6.2f} MB  {record['speed_up']:5.2f} ({low:.2f} to {high:.2f})  "
        f"AP {before:.4f} {after:.4f}  agreement {record['agreement']:.3f}  difference {record['max_difference']:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="detector to export; by default one is trained on built-in scenes")
    parser.add_argument("--data", default=SCENES, help="labelled images with a split test")
    parser.add_argument("--num_examples", type=int, default=200, help="test images that AP is measured on")
    parser.add_argument("--repetitions", type=int, default=40, help="timed pairs of each artifact")
    parser.add_argument("--formats", nargs="+", default=["onnx", "openvino", "torch"])
    parser.add_argument("--quick", action="store_true", help="a short training, 50 test images, no bf16 and fp16")
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    num_examples = 50 if options.quick else options.num_examples
    data = ExportData(options.data, "test", num_examples=num_examples)
    cases = [(name, precision) for name in options.formats for precision in FORMATS[name].precisions]
    cases = [case for case in cases if not options.quick or case[1] in ("fp32", "int8")]
    metrics: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        run = options.run or train(Path(temporary) / "detector", 120 if options.quick else 700)
        print(describe(torch.device("cpu")))
        for format, precision in cases:
            name = f"{format}_{precision}"
            try:
                record = measure(run, Path(temporary) / name, format, precision, data, options.repetitions)
            except ValueError as error:
                print(f"{name}: {error}", flush=True)
                metrics[name] = None
                continue
            print(show(name, record), flush=True)
            metrics[name] = round(record["speed_up"], 2)
            if name == "openvino_int8":
                metrics["ap_drop_int8"] = round(record["metric"]["before"] - record["metric"]["after"], 4)
    print(json.dumps(metrics))


if __name__ == "__main__":
    main()
