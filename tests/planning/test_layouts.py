"""Memory, communication and time of layouts, by sums that are done by hand."""

import dataclasses
import json

import pytest

from hf_vlm.cli.main import main
from hf_vlm.planning.hardware import GPUS, find_gpu
from hf_vlm.planning.layouts import Cluster, largest_batch, layouts_for, make_plan
from hf_vlm.planning.step import ExpertCost, StepCost

COST = StepCost(
    num_parameters=3_000_000_000,
    num_trained=2_000_000_000,
    num_active=2_000_000_000,
    num_layer_parameters=50_000_000,
    flops_per_image=1e12,
    activations_per_image=1e9,
    checkpointed_per_image=1e8,
    copies=4e9,
    moments=((0.0, 1e9), (3e9, 0.9e9), (6e9, 0.2e9)),
)
EXPERTS = ExpertCost(
    num_experts=16,
    num_parameters=2_400_000_000,
    num_trained=1_600_000_000,
    num_layer_parameters=40_000_000,
    routed_per_image=5e8,
)
SPARSE = dataclasses.replace(COST, experts=EXPERTS)
CLUSTER = Cluster(gpu=GPUS["h100"], num_gpus=32, gpus_per_node=8, network=50e9, mfu=0.5)


def memory(layout, **changes):
    plan = make_plan(COST, dataclasses.replace(CLUSTER, **changes), layout, 10, accumulates=True)
    return {name: round(value / 1e9, 6) for name, value in plan.memory.items() if name != "reserved"}


def test_ddp_holds_everything_on_every_gpu():
    held = {"weights": 12.0, "optimiser": 16.0, "copies": 4.0, "buckets": 8.0, "activations and gradients": 18.0}
    assert memory("ddp") == held
    assert memory("ddp", num_gpus=1) == {**held, "buckets": 0.0}


@pytest.mark.parametrize(("layout", "shards"), [("fsdp2", 32), ("hsdp", 8)])
def test_sharded_layouts_divide_all_but_the_layers_at_work(layout, shards):
    assert memory(layout) == {
        "weights": round(12 / shards, 6),
        "optimiser": round(16 / shards, 6),
        "gathered": 0.6,  # two layers of 50 M weights: bfloat16 weights and float32 gradients
        "activations and gradients": round(10 + 8 / shards, 6),
    }


def test_experts_stay_where_they_are_and_all_else_is_sharded():
    assert layouts_for(COST, CLUSTER) == ("ddp", "hsdp", "fsdp2")
    assert layouts_for(SPARSE, CLUSTER) == ("ddp", "hsdp", "fsdp2", "ep")
    plan = make_plan(SPARSE, CLUSTER, "ep", 10, accumulates=True)  # 16 of the 32 GPUs hold an expert each, twice
    trained = 0.4 / 32 + 1.6 / 16
    assert {name: round(value / 1e9, 6) for name, value in plan.memory.items()} == {
        "weights": round(4 * (0.6 / 32 + 2.4 / 16), 6),
        "optimiser": round(8 * trained, 6),
        "gathered": round(2 * 6 * 0.01, 6),  # two layers of 10 M other weights
        "copies": round(2 * 1.6 / 16, 6),
        "reserved": 2.0,
        "activations and gradients": round(10 + 4 * trained, 6),
    }
    dense = (2 * 2 * 0.6e9 + 4 * 0.4e9) * 31 / 32
    routed = 10 * 2 * 5e8 * 15 / 16
    replicas = 2 * 4 * 1.6e9 / 16 * 1 / 2
    assert plan.communication_seconds == pytest.approx((dense + routed + replicas) / 50e9)
    recomputed = make_plan(SPARSE, CLUSTER, "ep", 10, checkpointing=True)
    assert recomputed.communication_seconds - plan.communication_seconds == pytest.approx(routed / 2 / 50e9)
    with pytest.raises(ValueError, match="there is no 'ep' here, but ddp, hsdp, fsdp2"):
        make_plan(COST, CLUSTER, "ep", 10)


def test_the_slowest_link_carries_what_a_ring_sends():
    seconds = {
        layout: make_plan(COST, CLUSTER, layout, 10).communication_seconds for layout in layouts_for(COST, CLUSTER)
    }
    assert seconds["ddp"] == pytest.approx(2 * 8e9 * 31 / 32 / 50e9)
    assert seconds["fsdp2"] == pytest.approx((2 * 6e9 + 8e9) * 31 / 32 / 50e9)
    assert seconds["hsdp"] == pytest.approx((2 * 6e9 + 8e9) * 7 / 8 / 450e9 + 2 * 1e9 * 3 / 4 / 50e9)
    one_node = dataclasses.replace(CLUSTER, num_gpus=8)
    assert make_plan(COST, one_node, "ddp", 10).communication_seconds == pytest.approx(2 * 8e9 * 7 / 8 / 450e9)


def test_the_slower_of_computing_and_communication_decides():
    few, many = make_plan(COST, CLUSTER, "ddp", 1), make_plan(COST, CLUSTER, "ddp", 1000)
    assert few.step_seconds == few.communication_seconds
    assert many.step_seconds == many.compute_seconds == pytest.approx(1000 * 1e12 / (989.5e12 * 0.5))
    assert many.images_per_second == pytest.approx(32 * 989.5e12 * 0.5 / 1e12)
    checkpointed = make_plan(COST, CLUSTER, "ddp", 1000, checkpointing=True)
    assert checkpointed.compute_seconds == pytest.approx(many.compute_seconds * 4 / 3)


@pytest.mark.parametrize(("images", "passes"), [(1, 8.0), (5, 8.0), (8, 3 + 7.2), (40, 40.0)])
def test_gradients_come_while_activations_go(images, passes):
    plan = make_plan(COST, CLUSTER, "ddp", images)
    assert plan.memory["activations and gradients"] == passes * 1e9
    assert plan.memory_without_images == pytest.approx((12 + 16 + 4 + 8 + 8 + 2) * 1e9)  # and what is reserved


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_largest_batch_is_the_last_that_fits(checkpointing, accumulates):
    ways = {"checkpointing": checkpointing, "accumulates": accumulates}
    for layout in layouts_for(SPARSE, CLUSTER):
        size = largest_batch(SPARSE, CLUSTER, layout, **ways)
        assert make_plan(SPARSE, CLUSTER, layout, size, **ways).fits
        assert not make_plan(SPARSE, CLUSTER, layout, size + 1, **ways).fits
    small = dataclasses.replace(CLUSTER, gpu=GPUS["t4"], precision="fp16")
    assert largest_batch(COST, small, "ddp", checkpointing=checkpointing) == 0


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="did you mean 'h200'"):
        find_gpu("h20")
    with pytest.raises(ValueError, match="ddp, hsdp, fsdp2"):
        make_plan(COST, CLUSTER, "zero3", 1)
    with pytest.raises(ValueError, match="T4 has no products in bf16"):
        GPUS["t4"].peak("bf16")


NANO = ["mae/vit_nano_cpu.yaml", "--image_size", "32", "--max_steps", "100"]


def test_a_recipe_is_planned_by_one_command(tmp_path, capsys):
    picture = tmp_path / "memory.png"
    assert main(["plan", *NANO, "--gpus", "16", "--gpu", "a100", "--price", "2", "--save", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "16 x A100 in 2 nodes" in printed
    assert "Fastest that fits: " in printed
    assert "USD" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["plan", *NANO, "--gpus", "1", "--json", "--search"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["num_images"] == 100 * 32
    for one in plan["plans"]:
        assert one["fits"]
        assert one["batch_size"] <= one["largest_batch_size"] < 2 * one["batch_size"]
    assert main(["plan", *NANO, "--gpus", "1", "--json", "--optim", "adamw_torch_8bit"]) == 0
    eight_bits = json.loads(capsys.readouterr().out)["plans"][0]["memory"]["optimiser"]
    assert eight_bits / plan["plans"][0]["memory"]["optimiser"] == pytest.approx((2 + 8 / 256) / 8, rel=0.01)


def test_what_cannot_be_planned_is_said_before_anything_is_built(capsys):
    assert main(["plan", "mae/vit_small.yaml"]) == 2
    assert "give --images_to_see or --max_steps" in capsys.readouterr().err
    assert main(["plan", "detection/vit_nano_cpu.yaml", "--data", "x"]) == 2
    assert "plans are of pretraining" in capsys.readouterr().err
