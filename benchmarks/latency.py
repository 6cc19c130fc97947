"""Latency of our detector on a CPU, relative to transformers' RT-DETR v2 r18, D-FINE n and RF-DETR nano.

    python benchmarks/latency.py [--quick] [--repetitions 20] [--rows dfine_n rfdetr_nano]

One image, one thread, in torch as transformers runs it and as an ONNX program in ONNX Runtime, both written by
transformers' exporter, which `hf-vlm export` runs. A peer and ours take turns, in processor time, which other work on
the machine does not count in. Both have random weights: the same products are computed whatever they hold. Both take
images of the peer's official size, have 80 classes and 300 queries, and about as many parameters; what only training
uses (our dense head, the other groups of queries of RF-DETR) is not counted.
Architectures of the peers are the official ones:

- RT-DETR v2 r18 (https://github.com/lyuwenyu/RT-DETR): maps of strides 8, 16 and 32, three decoder layers;
- D-FINE n (https://github.com/Peterande/D-FINE): strides 16 and 32, three decoder layers;
- RF-DETR nano (https://github.com/roboflow/rf-detr): ViT-S with attention in windows, stride 16, two decoder layers.

Ours has as many decoder layers. The plain ViT computes everything on its patches, so their size decides: with each
peer it is compared with maps down to the peer's finest stride, and in other rows with maps twice as coarse or without
the coarser level. The last line of stdout is JSON: the speed of ours relative to theirs, above 1 where ours is faster;
keys without a suffix are those of equal finest strides in torch.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from machine import describe, set_products
from torch import nn
from transformers import (
    DFineConfig,
    DFineForObjectDetection,
    PreTrainedModel,
    RfDetrConfig,
    RfDetrDinov2Config,
    RfDetrForObjectDetection,
    RTDetrResNetConfig,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
)
from transformers.exporters import OnnxConfig, OnnxExporter
from transformers_detector import hgnet_b0

from hf_vlm.deploy.export import ServingModel, quiet_exporters
from hf_vlm.deploy.gate import time_interleaved
from hf_vlm.features.exported import load_exported
from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.modeling_detection import VLMViTDetectionConfig, VLMViTForObjectDetection
from hf_vlm.tasks.detection import DETECTION
from hf_vlm.training.run import quiet_libraries

CLASSES = {index: str(index) for index in range(80)}
TRAINING_ONLY = ("dense_head.",)  # of ours


def rtdetr_v2_r18() -> PreTrainedModel:
    backbone = RTDetrResNetConfig(
        embedding_size=64,
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    return RTDetrV2ForObjectDetection(
        RTDetrV2Config(
            backbone_config=backbone,
            encoder_in_channels=[128, 256, 512],
            hidden_expansion=0.5,
            decoder_layers=3,
            id2label=CLASSES,
        )
    )


def dfine_n() -> PreTrainedModel:
    backbone = hgnet_b0(["stage3", "stage4"])
    return DFineForObjectDetection(
        DFineConfig(
            backbone_config=backbone,
            encoder_in_channels=backbone.stage_out_channels[2:],
            feat_strides=[16, 32],
            num_feature_levels=2,
            encode_proj_layers=[1],
            encoder_hidden_dim=128,
            encoder_ffn_dim=512,
            hidden_expansion=0.34,
            depth_mult=0.5,
            d_model=128,
            decoder_in_channels=[128, 128],
            decoder_ffn_dim=512,
            decoder_layers=3,
            decoder_n_points=[6, 6],
            id2label=CLASSES,
        )
    )


def rfdetr_nano() -> PreTrainedModel:
    backbone = RfDetrDinov2Config(
        hidden_size=384,
        num_attention_heads=6,
        image_size=384,
        patch_size=16,
        num_windows=2,
        out_features=["stage3", "stage6", "stage9", "stage12"],
    )
    return RfDetrForObjectDetection(
        RfDetrConfig(backbone_config=backbone, decoder_layers=2, decoder_n_points=2, group_detr=1, id2label=CLASSES)
    )


@dataclass(frozen=True)
class Comparison:
    """A row: a peer, and the fields of our encoder and head."""

    peer: Callable[[], PreTrainedModel]
    image_size: int
    encoder: dict[str, Any]
    head: dict[str, Any]

    @property
    def strides(self) -> list[int]:
        patch = self.encoder["patch_size"]
        return [patch // 2, patch] if self.head.get("num_neck_levels") == 2 else [patch]

    def ours(self) -> PreTrainedModel:
        encoder = VLMViTConfig(image_size=self.image_size, position_embedding_type="sincos", **self.encoder)
        return VLMViTForObjectDetection(VLMViTDetectionConfig(backbone_config=encoder, id2label=CLASSES, **self.head))


SMALL = {"hidden_size": 384, "num_attention_heads": 6}
TINY = {"hidden_size": 192, "num_attention_heads": 3}
NARROW = {"hidden_size": 128, "intermediate_size": 512, "num_cross_attention_heads": 8, "neck_num_blocks": 1}
TWO_LEVELS = {"num_neck_levels": 2, "num_points": 4}
COMPARISONS = {
    "rtdetr_v2_r18": Comparison(
        rtdetr_v2_r18,
        640,
        {"patch_size": 16, "num_hidden_layers": 7, **SMALL},
        {"intermediate_size": 1024, **TWO_LEVELS},
    ),
    "rtdetr_v2_r18_coarse": Comparison(
        rtdetr_v2_r18,
        640,
        {"patch_size": 32, "num_hidden_layers": 7, **SMALL},
        {"intermediate_size": 1024, **TWO_LEVELS},
    ),
    "dfine_n": Comparison(dfine_n, 640, {"patch_size": 32, "num_hidden_layers": 4, **TINY}, NARROW | TWO_LEVELS),
    "dfine_n_one_level": Comparison(dfine_n, 640, {"patch_size": 16, "num_hidden_layers": 6, **TINY}, NARROW),
    "rfdetr_nano": Comparison(
        rfdetr_nano, 384, {"patch_size": 16, "num_hidden_layers": 12, **SMALL}, {"num_decoder_layers": 2}
    ),
}


def num_parameters(model: nn.Module) -> int:
    """Parameters that inference uses."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(TRAINING_ONLY))


def exported(model: PreTrainedModel, pixel_values: torch.Tensor) -> nn.Module:
    """The model as an ONNX program for one image, in its runtime."""
    assert DETECTION.served is not None
    serving = ServingModel(model, DETECTION.served).eval()
    with quiet_exporters():  # not by `export_model`, whose programs take any batch: RT-DETR's cannot
        program = OnnxExporter().export(serving, {"pixel_values": pixel_values}, OnnxConfig())
    with tempfile.TemporaryDirectory() as folder:
        program.save_pretrained(folder)
        return load_exported(folder)


@torch.inference_mode()
def speed(theirs: nn.Module, ours: nn.Module, pixel_values: torch.Tensor, repetitions: int) -> dict[str, Any]:
    """Median milliseconds of both, and the median and quartiles of the ratios of pairs in turn."""
    times = time_interleaved(
        lambda: theirs(pixel_values=pixel_values),
        lambda: ours(pixel_values=pixel_values),
        repetitions=repetitions,
        clock=time.process_time,
    )
    low, median, high = statistics.quantiles((before / after for before, after in times), n=4)
    milliseconds = [statistics.median(side) for side in zip(*times)]
    return {"theirs": milliseconds[0], "ours": milliseconds[1], "ratio": median, "quartiles": (low, high)}


def compare(name: str, row: Comparison, repetitions: int) -> dict[str, float]:
    """Prints a row of the table; returns the relative speeds by their keys."""
    torch.manual_seed(0)
    models = [build().eval() for build in (row.peer, row.ours)]
    pixel_values = torch.randn(1, 3, row.image_size, row.image_size)
    measured = {"": speed(*models, pixel_values, repetitions)}
    measured["_onnx"] = speed(*(exported(model, pixel_values) for model in models), pixel_values, repetitions)
    counts = " | ".join(f"{num_parameters(model) / 1e6:.1f}" for model in models)
    columns = [
        f"{m['theirs']:.0f} | {m['ours']:.0f} | {m['ratio']:.2f} ({m['quartiles'][0]:.2f} to {m['quartiles'][1]:.2f})"
        for m in measured.values()
    ]
    strides = " and ".join(map(str, row.strides))
    print(f"| {name} | {row.image_size} | {strides} | {counts} | {' | '.join(columns)} |", flush=True)
    return {f"vs_{name}{suffix}": round(m["ratio"], 2) for suffix, m in measured.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=20, help="timed pairs of each row")
    parser.add_argument("--rows", nargs="+", choices=COMPARISONS, default=list(COMPARISONS), metavar="ROW")
    parser.add_argument("--quick", action="store_true", help="three pairs: not a result to quote")
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    print(describe(torch.device("cpu")))
    set_products(as_trained=False)  # torch's default kernels for both
    print(
        "| peer | pixels | our strides | theirs, M | ours, M | theirs, ms | ours, ms | torch | theirs | ours | ONNX |"
    )
    print("|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    found: dict[str, Any] = {}
    for name in options.rows:
        found |= compare(name, COMPARISONS[name], 3 if options.quick else options.repetitions)
    print(json.dumps(found | ({"quick": True} if options.quick else {})))


if __name__ == "__main__":
    main()
