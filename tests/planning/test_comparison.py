"""A plan beside a run: what the run has recorded, by numbers that are known."""

import json

import pytest
from tiny import build

from hf_vlm.cli.main import main
from hf_vlm.planning.comparison import compare, read_run
from hf_vlm.planning.hardware import GPUS
from hf_vlm.planning.layouts import Cluster, make_plan
from hf_vlm.planning.recipe import RecipePlan
from hf_vlm.planning.step import StepCost

RECORD = {"method": "mae", "device": "NVIDIA H100 80GB HBM3", "num_processes": 4, "batch_size": 40}
RECORD |= {"num_images_seen": 4000, "seconds": 80.0}
COST = StepCost(
    num_parameters=1000,
    num_trained=900,
    num_active=1000,
    num_layer_parameters=100,
    flops_per_image=1e12,
    activations_per_image=1e9,
    checkpointed_per_image=1e8,
    copies=0.0,
    moments=((0.0, 1e9),),
)


def write_run(folder, record, log=()):
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    return folder


def planned(gpu="h100", num_gpus=4, method="mae"):
    cluster = Cluster(gpu=GPUS[gpu], num_gpus=num_gpus, mfu=0.5)
    one = make_plan(COST, cluster, "ddp", 10)
    return RecipePlan(method=method, cost=COST, plans=(one,), largest=(50,), num_images=8000), one


def test_a_run_is_compared_with_its_plan_by_ratios(tmp_path):
    log = [{"loss": 1.0, "peak_memory_gib": 7.0}]
    log += [{"images_per_second": rate, "mfu": rate / 5000, "peak_memory_gib": 8.0} for rate in (1000, 900, 1500)]
    run = read_run(write_run(tmp_path, RECORD, [*log, {"total_flos": 4.4e15}]))
    plan, one = planned()
    found = compare(plan, one, run)
    assert found["GFLOP per image"] == (1000, pytest.approx(1100))
    assert found["images"] == (8000, 4000)
    assert found["images per step"] == (40, 40)
    assert found["images/s"] == (pytest.approx(4 * 989.5e12 * 0.5 / 1e12), 1000)
    assert found["MFU"] == (pytest.approx(0.5), pytest.approx(0.2))
    assert found["seconds"] == (pytest.approx(8000 / (4 * 989.5 * 0.5)), 80)
    assert found["memory GB"] == (pytest.approx(one.total_memory / 1e9), pytest.approx(8 * 2**30 / 1e9))
    assert found["parameters"] == (1000, None)


def test_buffers_are_no_parameters(tmp_path):
    model = build("ijepa")
    assert "progress" in model.state_dict()
    model.save_pretrained(write_run(tmp_path, RECORD | {"method": "ijepa"}))
    assert read_run(tmp_path).num_parameters == sum(weight.numel() for weight in model.parameters())


def test_what_cannot_be_compared_is_an_error(tmp_path, capsys):
    run = read_run(write_run(tmp_path, RECORD))
    for options, message in (
        ({"method": "simclr"}, "The run is of mae, but the plan of simclr"),
        ({"gpu": "h200"}, "4 x NVIDIA H100 80GB HBM3, but the plan is for 4 x H200"),
        ({"num_gpus": 8}, "give --gpus and --gpu"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(*planned(**options), run)
    assert main(["plan", "mae/vit_nano_cpu.yaml", "--max_steps", "2", "--against", str(tmp_path / "none")]) == 2
    assert "none holds no run.json, the record of a run" in capsys.readouterr().err
    write_run(tmp_path, {"origins": []})
    with pytest.raises(ValueError, match="does not record method, device"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json cannot be read"):
        read_run(tmp_path)


@pytest.mark.slow
def test_parameters_and_flops_are_those_of_a_run(tmp_path, capsys):
    folder = tmp_path / "run"
    words = ["--data", "scenes", "--num_train_examples", "64", "--image_size", "32", "--max_steps", "4"]
    words += ["--logging_steps", "1", "--probe_steps", "0", "--output_dir", str(folder)]
    assert main(["pretrain", "mae/vit_nano_cpu.yaml", *words]) == 0
    command = ["plan", str(folder / "recipe.yaml"), "--gpus", "1", "--against", str(folder)]
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for name in ("parameters", "images"):
        assert found[name]["plan"] == found[name]["run"] > 0
    assert found["GFLOP per image"]["run"] == pytest.approx(found["GFLOP per image"]["plan"], rel=1e-6)
    assert main(command) == 0
    assert "of which neither speed nor memory is planned" in capsys.readouterr().out
