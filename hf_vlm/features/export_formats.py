"""The table of export formats: the exporter of transformers, its precisions, and how its runtime is set up."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import exporters
from transformers.exporters.utils import register_patch

__all__ = ["FORMATS", "ExportFormat", "Precision", "find_format", "find_precision", "format_of_backend"]

OPENVINO_PRECISION = ["runtime_options", "INFERENCE_PRECISION_HINT"]  # where a program records it

Samples = Sequence[Mapping[str, Any]]


def _nothing(*_: Any) -> dict[str, Any]:
    return {}


def _unchanged(program: Any) -> None:
    """Leaves a program as the exporter made it."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How a precision is reached in a format.

    Attributes:
        config: Function from calibration samples, one dict of inputs per image, to fields of the exporter's config.
        finish: What changes the program after the export, in place.
        is_calibrated: Whether it is tuned on images.
        packages: Packages that it needs beside those of the format.
    """

    config: Callable[[Samples], dict[str, Any]] = _nothing
    finish: Callable[[Any], None] = _unchanged
    is_calibrated: bool = False
    packages: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExportFormat:
    """A row of the table.

    Attributes:
        backend: Name of the format in transformers, as in `export.json`.
        exporter: Class in `transformers.exporters`.
        config: Class of its configuration.
        packages: Packages that transformers needs to export and to run it.
        extra: Extra of hf_vlm that installs them.
        largest_batch: Images that its programs take at a time, where memory is planned ahead; any number by default.
        precisions: How each precision is reached.
        runner: Function from the folder of a program to the options of its runner, with as many threads as torch
            computes with.
    """

    backend: str
    exporter: str
    config: str
    precisions: Mapping[str, Precision]
    packages: tuple[str, ...] = ()
    extra: str | None = None
    largest_batch: int | None = None
    runner: Callable[[Path], dict[str, Any]] = field(default=_nothing)

    def require(self, packages: Sequence[str]) -> None:
        """ValueError that names the extra, where a package is missing."""
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing:
            raise ValueError(
                f'{" and ".join(missing)} must be installed for this format: pip install "hf_vlm[{self.extra}]"'
            )


def _onnx_int8(samples: Samples) -> dict[str, Any]:
    """8 bit weights, and activations quantised as they come: static activations were no faster, and less exact."""
    config = exporters.OnnxRuntimeDynamicConfig(op_types_to_quantize=["MatMul", "Gemm"], per_channel=True)
    return {"quantizer": exporters.OnnxRuntimeQuantizer(config)}


def _openvino_int8(samples: Samples) -> dict[str, Any]:
    return {"quantizer": exporters.NNCFOpenVINOQuantizer(calibration_dataset=list(samples))}


def _compute_in_bf16(program: Any) -> None:
    """The precision to compute in is recorded in the program, where the exporter has written float32."""
    program.set_rt_info("bf16", OPENVINO_PRECISION)


def _onnx_runner(folder: Path) -> dict[str, Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return {"session_options": options}


def _openvino_runner(folder: Path) -> dict[str, Any]:
    """The CPU does not heed the precision that the program records: where it can, it computes in bfloat16."""
    import openvino

    program = openvino.Core().read_model(str(folder / "openvino_model.xml"))
    hint = program.get_rt_info(OPENVINO_PRECISION).astype(str)
    settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    return {"device": "cpu", "config": settings}


@register_patch("executorch", "executorch.exir.verification.verifier._check_tensor_args_matching_op_allowed_dtype")
def _without_check(check: Callable[[Any], None]) -> Callable[[Any], None]:
    """Leaves out a check of ExecuTorch 1.5, which takes the length of the tensors in a list: that fixes the batch."""
    return lambda graph_module: None


FORMATS = {
    "onnx": ExportFormat(
        backend="onnx",
        exporter="OnnxExporter",
        config="OnnxConfig",
        precisions={"fp32": Precision(), "int8": Precision(config=_onnx_int8)},
        packages=("onnx", "onnxscript", "onnxruntime"),
        extra="export",
        runner=_onnx_runner,
    ),
    "openvino": ExportFormat(
        backend="openvino",
        exporter="OpenVINOExporter",
        config="OpenVINOConfig",
        precisions={
            "fp32": Precision(),
            "fp16": Precision(config=lambda samples: {"compress_to_fp16": True}),  # weights; computes in float32
            "bf16": Precision(finish=_compute_in_bf16),
            "int8": Precision(config=_openvino_int8, is_calibrated=True, packages=("nncf",)),
        },
        packages=("openvino",),
        extra="openvino",
        runner=_openvino_runner,
    ),
    "torch": ExportFormat(
        backend="dynamo", exporter="DynamoExporter", config="DynamoConfig", precisions={"fp32": Precision()}
    ),
    "executorch": ExportFormat(
        backend="executorch",
        exporter="ExecutorchExporter",
        config="ExecutorchConfig",
        precisions={"fp32": Precision()},
        packages=("executorch",),
        extra="executorch",
        largest_batch=8,
    ),
}


def find_format(name: str) -> ExportFormat:
    """The row of a format; ValueError where there is none, or its packages are not installed."""
    if name not in FORMATS:
        raise ValueError(f"There is no export format {name!r}. There are: {', '.join(FORMATS)}.")
    FORMATS[name].require(FORMATS[name].packages)
    return FORMATS[name]


def find_precision(format_name: str, precision: str) -> Precision:
    """How a format reaches a precision; ValueError where it does not, or packages are not installed."""
    precisions = FORMATS[format_name].precisions
    if precision not in precisions:
        others = [f"{name} in {', '.join(row.precisions)}" for name, row in FORMATS.items()]
        raise ValueError(f"{format_name} is not exported in {precision!r}. There are: {'; '.join(others)}.")
    FORMATS[format_name].require(precisions[precision].packages)
    return precisions[precision]


def format_of_backend(backend: str) -> str:
    """The name of the format that transformers calls `backend`; ValueError where there is none."""
    for name, row in FORMATS.items():
        if row.backend == backend:
            return name
    raise ValueError(f"There is no export format {backend!r}. There are: {', '.join(FORMATS)}.")
