"""SIGTERM and SIGINT end a run after its step, with a checkpoint; a second one ends it at once."""

import os
import signal
import time

import pytest
from safetensors.torch import load_file
from torch import equal
from transformers import TrainerCallback

from hf_vlm.cli.main import main
from hf_vlm.training import signals
from hf_vlm.training.run import finetune, pretrain
from hf_vlm.training.signals import StoppedBySignal, StopSignals
from hf_vlm.training.trainer import VisionTrainer


class SendAt(TrainerCallback):
    def __init__(self, step, number):
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.fixture
def send_at(monkeypatch):
    """`send_at(step, number)`: the next run gets a signal in the step after that one; None for no signal."""
    sent = []
    original = VisionTrainer.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if sent[-1] is not None:
            self.add_callback(SendAt(*sent[-1]))

    monkeypatch.setattr(VisionTrainer, "__init__", init)
    return lambda *signal_at: sent.append(signal_at if signal_at[0] is not None else None)


@pytest.mark.parametrize(
    ("method", "train", "number", "status"),
    [("mae", pretrain, signal.SIGTERM, 143), ("detection", finetune, signal.SIGINT, 130)],
)
def test_stopped_and_resumed_equals_uninterrupted(
    make_recipe, tmp_path, send_at, caplog, method, train, number, status
):
    recipe = make_recipe(method, probe_steps=0, resume_from_checkpoint="auto")
    send_at(None)
    train(recipe | {"output_dir": str(tmp_path / "whole")})
    handlers = [signal.getsignal(each) for each in signals.SIGNALS]
    send_at(3, number)
    with pytest.raises(StoppedBySignal) as stopped:
        train(recipe)  # which saves no checkpoints otherwise
    assert stopped.value.code == status
    checkpoint = tmp_path / method / "checkpoint-4"
    assert f"Stopped by {number.name} at step 4 of 8. {checkpoint} is saved; --resume_from" in caplog.text
    assert sorted(path.name for path in (tmp_path / method).iterdir() if path.suffix or path.is_dir()) == [
        *(".partial",) * (tmp_path / method / ".partial").is_dir(),
        "checkpoint-4",
        "log.jsonl",
    ]
    assert [signal.getsignal(each) for each in signals.SIGNALS] == handlers
    send_at(None)
    assert train(recipe)["num_steps"] == 8
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", method))
    assert all(equal(expected[name], found[name]) for name in expected)


def test_the_command_ends_with_the_signals_status(monkeypatch, capsys):
    def stopped(recipe, source, **kwargs):
        raise StoppedBySignal(signal.SIGTERM)

    monkeypatch.setattr("hf_vlm.training.run.pretrain", stopped)
    with pytest.raises(SystemExit) as ended:
        main(["pretrain", "mae/vit_nano_cpu.yaml"])
    assert ended.value.code == 143
    assert "The encoder is in" not in capsys.readouterr().out


def test_a_second_signal_ends_the_run_at_once_and_a_burst_is_one(monkeypatch):
    sent, now = [], [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        now[0] = 1.0
        os.kill(os.getpid(), signal.SIGTERM)  # passed on by a launcher
        monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((number, signal.getsignal(number))))
        assert sent == []
        now[0] = 3.0
        stop._receive(signal.SIGTERM, None)
        assert sent == [(signal.SIGTERM, signal.SIG_DFL)]
        stop.stopped_by = signal.SIGINT


def test_a_signal_after_the_last_step_acts_as_usual():
    given = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background may ignore it
    try:
        with pytest.raises(KeyboardInterrupt), StopSignals():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, given)
