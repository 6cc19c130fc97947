"""`hf-vlm export RUN --format onnx [--precision int8] [--data SOURCE]`"""

from collections.abc import Sequence
from pathlib import Path

from hf_vlm.cli.options import Parser, add_allow_outside, check_positive


def run(argv: Sequence[str]) -> None:
    """Exports a model, and prints how the artifact compares with it."""
    parser = Parser(
        prog="hf-vlm export",
        description="Exports a model for a runtime, for batches of any size. The artifact is compared with the model: "
        "outputs or predictions on images, the task's metric on labelled ones, and the time of each. One that differs "
        "is not written.",
    )
    parser.add_argument("run", help="folder of a model, or its name on the Hub")
    parser.add_argument("--format", default="onnx", help="onnx (the default), openvino, torch or executorch")
    parser.add_argument(
        "--precision", default="fp32", help="fp32 (the default); int8 in onnx; fp16, bf16 or int8 in openvino"
    )
    parser.add_argument("--output_dir", type=Path, help="folder to write; by default that of the run, and the format")
    parser.add_argument(
        "--data",
        help="images to compare on, and to calibrate int8 with; labelled ones for the metric. By default those of the "
        "run, or scenes where these are not here",
    )
    parser.add_argument("--data_format", help="format of the source, guessed when not given")
    parser.add_argument("--split", default="test", help="split of --data; int8 is calibrated on the train split")
    parser.add_argument("--num_examples", type=int, default=200, help="first N labelled images for the metric")
    add_allow_outside(parser)
    arguments = parser.parse_args(argv)
    check_positive(arguments, "num_examples")

    from hf_vlm.deploy.export import ExportData, export_model
    from hf_vlm.deploy.exported_card import PREDICT_FILE, parity_rows
    from hf_vlm.training.run import quiet_libraries

    quiet_libraries()
    data = None
    if arguments.data is not None:
        data = ExportData(
            arguments.data,
            arguments.split,
            format=arguments.data_format,
            num_examples=arguments.num_examples,
            allow_outside=arguments.allow_outside,
        )
    folder = arguments.output_dir or default_folder(arguments.run, arguments.format, arguments.precision)
    record = export_model(arguments.run, folder, format=arguments.format, precision=arguments.precision, data=data)
    rows = parity_rows(record)
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    print(f"\nThe model is in {folder}. Next: hf-vlm predict {folder} photo.jpg")
    if (folder / PREDICT_FILE).is_file():
        print(f"Where neither hf_vlm nor torch is installed: python {folder / PREDICT_FILE} photo.jpg")


def default_folder(run: str, format: str, precision: str) -> Path:
    """A folder beside that of the run; for a model of the Hub one in `runs/`."""
    path = Path(run)
    suffix = format if precision == "fp32" else f"{format}-{precision}"
    return (path if path.is_dir() else Path("runs") / path.name).with_name(f"{path.resolve().name}-{suffix}")
