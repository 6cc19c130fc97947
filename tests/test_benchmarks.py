"""A benchmark takes the path that users take."""

import importlib.util
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def setting():
    """torch's own, at its default during the test."""
    setting = torch.backends.mkldnn.matmul
    before, setting.fp32_precision = setting.fp32_precision, "none"
    yield setting
    setting.fp32_precision = before


@pytest.mark.parametrize("chosen", [True, False])
def test_matrix_products_as_trained_are_those_that_the_trial_chooses(setting, monkeypatch, chosen):
    spec = importlib.util.spec_from_file_location("machine", BENCHMARKS / "machine.py")
    machine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(machine)
    monkeypatch.setattr(machine, "enable_fast_matmul", lambda: chosen)
    for as_trained in (True, False):
        machine.set_products(as_trained=as_trained)
        assert setting.fp32_precision == ("bf16" if chosen and as_trained else "none")
    assert ("oneDNN" in machine.describe(torch.device("cpu"))) == chosen
    assert machine.processor(torch.device("cpu"))


def test_no_benchmark_sets_the_products_itself():
    assert [path.name for path in BENCHMARKS.rglob("*.py") if "fp32_precision" in path.read_text()] == ["machine.py"]
