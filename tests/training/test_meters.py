"""FLOPs against counts by hand, metrics against a clock of the test's own, and runs that counting must not change."""

import json
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.modeling_mae import MAEConfig, MAEForPreTraining
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.training import meters
from hf_vlm.training.callbacks import read_log
from hf_vlm.training.meters import FlopCounter, ThroughputMeter, listed_peak, measured_peak, peak_memory_gib, precision
from hf_vlm.training.run import finetune, pretrain


def arguments(**changes):
    values = {
        "device": torch.device("cpu"),
        "torch_compile": False,
        "bf16": False,
        "fp16": False,
        "train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "world_size": 1,
        "num_data_ranks": 1,
        "dataloader_num_workers": 0,
    }
    return SimpleNamespace(**{**values, **changes})


class WithLoss(nn.Module):
    """Gives a module an output with a loss, random numbers and a buffer."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, inputs):
        self.num_calls += 1
        return SimpleNamespace(loss=F.dropout(self.module(inputs)).square().sum())


@pytest.fixture
def clock(monkeypatch):
    """`clock(seconds)` lets time pass in the meters, where it stands still otherwise."""
    now = [100.0]
    monkeypatch.setattr(meters, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def sleep(seconds):
        now[0] += seconds

    return sleep


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_flops_of_an_encoder_are_those_counted_by_hand(attention, checkpointing):
    config = VLMViTConfig(
        image_size=32, patch_size=8, hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=40
    )
    model = VLMViTModel._from_config(config, attn_implementation=attention).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    with FlopCounter() as counter:
        model(torch.randn(5, 3, 32, 32)).last_hidden_state.square().mean().backward()

    batch, patches, tokens, dim, inner = 5, 16, 17, 24, 40
    embedding = 2 * batch * patches * (3 * 8 * 8) * dim
    linear = 2 * batch * tokens * dim * (3 * dim + dim + 2 * inner)  # queries, keys, values; projection; MLP
    scores_and_values = 2 * (2 * batch * tokens * tokens * dim)
    forward = embedding + 3 * (linear + scores_and_values)
    backward = 2 * forward - embedding  # gradients of weights and of inputs, but for those of the images
    assert counter.get_total_flops() == forward + backward
    assert not counter.problem


def test_figures_of_steps_with_gradient_accumulation(monkeypatch, clock):
    monkeypatch.setattr(meters, "peak_flops", lambda device, precision: 1e6)
    speedometer = ThroughputMeter(arguments(gradient_accumulation_steps=3, world_size=2, num_data_ranks=2))
    model = WithLoss(nn.Linear(50, 20, bias=False))
    num_counted = []
    count = FlopCounter._count_flops
    monkeypatch.setattr(FlopCounter, "_count_flops", lambda *args: num_counted.append(1) or count(*args))
    speedometer.count(model, {"inputs": torch.randn(8, 50)})
    num_operations = len(num_counted)
    speedometer.count(model, {"inputs": torch.randn(8, 50)})  # the next micro-batch
    assert len(num_counted) == num_operations > 0
    assert set(speedometer.metrics(1)) == {"peak_memory_gib"}

    clock(2.0)
    with speedometer.waiting():
        clock(0.5)
    metrics = speedometer.metrics(3)
    num_flops = 2 * (2 * 8 * 50 * 20)  # forward, and backward for the weight alone
    assert metrics["images_per_second"] == 2 * 3 * 8 * 2 / 2.5
    assert metrics["data_wait"] == 0.2
    assert metrics["mfu"] == pytest.approx(2 * 3 * num_flops / 2.5 / 1e6, abs=1e-4)
    clock(1.0)
    assert speedometer.metrics(4)["mfu"] == pytest.approx(3 * num_flops / 1e6, abs=1e-4)


def test_what_is_no_training_does_not_count_in_the_figures(clock):
    speedometer = ThroughputMeter(arguments())
    with speedometer.paused():
        clock(3.0)
    speedometer.metrics(1)
    clock(1.0)
    with speedometer.paused():
        clock(60.0)
    clock(1.0)
    assert speedometer.metrics(3)["images_per_second"] == 2 * 8 / 2


@pytest.mark.parametrize("views_on", ["workers", "device"])
def test_figures_of_a_run_agree_with_torchs_own_count(make_recipe, tmp_path, monkeypatch, views_on):
    monkeypatch.setattr(meters, "peak_flops", lambda device, precision: 1e6)
    shape = {"max_steps": 2, "gradient_accumulation_steps": 2, "attn_implementation": "eager"}
    recipe = make_recipe("mae", views_on=views_on, save_strategy="steps", save_steps=2, **shape)
    pretrain(recipe)
    first, second = (entry for entry in read_log(tmp_path / "mae" / "log.jsonl") if "loss" in entry)
    assert "mfu" not in first
    assert 0 < first["peak_memory_gib"] <= second["peak_memory_gib"]
    assert 0 <= second["data_wait"] < 1

    encoder = {**recipe["encoder_config"], "image_size": 32}
    model = MAEForPreTraining._from_config(
        MAEConfig(backbone_config=encoder, **recipe["model_config"]), attn_implementation="eager"
    )
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(4, 1, 3, 32, 32)).loss.backward()
    flops_an_image = second["mfu"] * 1e6 / second["images_per_second"]
    assert flops_an_image == pytest.approx(counter.get_total_flops() / 4, rel=1e-3)
    state = json.loads((tmp_path / "mae" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["total_flos"] == 4 * counter.get_total_flops()  # two steps of two batches


@pytest.mark.parametrize(("method", "bf16"), [("mae", False), ("mae", True), ("detection", False)])
def test_counting_changes_no_bit_of_a_run(make_recipe, tmp_path, monkeypatch, method, bf16):
    train = finetune if method == "detection" else pretrain
    recipe = make_recipe(method, max_steps=3, bf16=bf16)
    train(recipe | {"output_dir": str(tmp_path / "counted")})
    monkeypatch.setattr(ThroughputMeter, "count", lambda self, model, inputs: None)
    train(recipe | {"output_dir": str(tmp_path / "uncounted")})
    weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("counted", "uncounted"))
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("counted", "uncounted")]
    assert [entry.get("loss") for entry in logs[0]] == [entry.get("loss") for entry in logs[1]]
    assert ["mfu" in entry for entry in logs[0] if "loss" in entry] == [False, True, True]
    assert not any("mfu" in entry for entry in logs[1])


@torch.library.custom_op("hf_vlm_test::double", mutates_args=())
def double(values: torch.Tensor) -> torch.Tensor:
    return values * 2


def raise_error(*args, **kwargs):
    raise IndexError("of the formula")


def test_counting_leaves_the_model_as_it_was():
    model = WithLoss(nn.Linear(5, 5))
    state = torch.get_rng_state()
    with torch.no_grad():
        ThroughputMeter(arguments()).count(model, {"inputs": None})  # evaluation is not counted
    ThroughputMeter(arguments()).count(model, {"inputs": torch.ones(3, 5)})
    assert torch.equal(torch.get_rng_state(), state)
    assert model.num_calls == 0
    assert model.module.weight.grad is None


class Double(nn.Linear):
    def forward(self, inputs):
        return super().forward(double(inputs))


class Broken(nn.Linear):
    def forward(self, inputs):
        raise KeyError("of the model")


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Double(5, 5), "there is no formula for the FLOPs of hf_vlm_test::double"),
        (nn.LayerNorm(5), "no matrix product was seen"),
        (Broken(5, 5), "counting failed: KeyError"),
    ],
)
def test_what_cannot_be_counted_is_said_once_and_not_logged(caplog, clock, module, words):
    speedometer = ThroughputMeter(arguments())
    for _ in range(2):
        speedometer.count(WithLoss(module), {"inputs": torch.randn(2, 5)})
    assert caplog.text.count(f"mfu is not logged: {words}") == caplog.text.count("not logged") == 1
    speedometer.metrics(1)
    clock(1.0)
    assert "mfu" not in speedometer.metrics(2)


def test_a_formula_that_fails_does_not_stop_the_step():
    counter = FlopCounter()
    counter.flop_registry[torch.ops.aten.mm] = raise_error
    with counter:
        product = torch.ones(2, 3) @ torch.ones(3, 2)
    assert product.tolist() == [[3, 3], [3, 3]]
    assert "aten::mm cannot be counted: IndexError" in counter.problem


@pytest.mark.parametrize(
    ("name", "kind", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "tf32", 156),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "fp16", 989.5),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA A10G", "fp32", 35),
        ("Tesla T4", "fp16", 65),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("AMD Instinct MI300X", "bf16", 1307.4),
        ("Tesla T4", "bf16", None),  # it has no such unit
        ("NVIDIA A10", "bf16", None),
        ("NVIDIA GH200 480GB", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("", "fp32", None),
    ],
)
def test_peaks_by_name(name, kind, tflops):
    assert listed_peak(name, kind) == (None if tflops is None else tflops * 1e12)


@pytest.mark.parametrize(
    ("durations", "best"),
    [
        ([0.3, 0.2, 0.01, 0.02, 0.02, 0.02], 0.01),
        ([0.6, 0.5], 0.5),  # more than a second in all: no third product
    ],
)
def test_the_peak_of_another_device_is_measured(monkeypatch, durations, best):
    ticks = (tick for index, seconds in enumerate(durations) for tick in (10.0 * index, 10.0 * index + seconds))
    monkeypatch.setattr(meters, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    state = torch.get_rng_state()
    found = measured_peak.__wrapped__(torch.device("cpu"), torch.float32)  # not what was measured before
    assert found == pytest.approx(2 * 1024**3 / best)
    assert next(ticks, None) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_precision_of_the_products():
    assert precision(arguments(), torch.float32) == "fp32"
    assert precision(arguments(bf16=True), torch.float32) == "bf16"
    assert precision(arguments(fp16=True), torch.float32) == "fp16"
    assert precision(arguments(), torch.bfloat16) == "bf16"
    torch.set_float32_matmul_precision("high")
    try:
        assert precision(arguments(device=torch.device("cuda")), torch.float32) == "tf32"
        assert precision(arguments(), torch.float32) == "fp32"  # the switch is of CUDA
    finally:
        torch.set_float32_matmul_precision("highest")


def test_peak_memory_is_that_of_the_process(monkeypatch):
    resident = psutil.Process().memory_info().rss / 2**30
    assert resident - 0.01 < peak_memory_gib(torch.device("cpu")) < psutil.virtual_memory().total / 2**30
    monkeypatch.setattr("resource.getrusage", lambda who: SimpleNamespace(ru_maxrss=3 * 2**20))
    for platform, gib in (("linux", 3), ("darwin", 3 / 1024)):  # KiB and bytes
        monkeypatch.setattr("sys.platform", platform)
        assert peak_memory_gib(torch.device("cpu")) == gib
