"""The alarm rings where training collapses, and not where it does not."""

import pytest
from tiny import slow_but

from hf_vlm.models.modeling_simclr import SimCLRForPreTraining
from hf_vlm.training.alarms import SIGNS, CollapseAlarm
from hf_vlm.training.callbacks import read_log
from hf_vlm.training.checkpoints import last_checkpoint
from hf_vlm.training.run import pretrain

ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
SINCOS = ENCODER | {"position_embedding_type": "sincos"}
LONGER = {
    "max_steps": 80,
    "per_device_train_batch_size": 8,
    "learning_rate": 3e-3,
    "warmup_steps": 0.1,
    "probe_steps": 10,
    "encoder_config": SINCOS,
}


@pytest.fixture
def pull_together(monkeypatch):
    """Leaves SimCLR nothing but the distance of the views' patch tokens."""
    stock = SimCLRForPreTraining.forward

    def forward(self, pixel_values, **kwargs):
        output = stock(self, pixel_values, **kwargs)
        tokens = self.backbone(pixel_values.transpose(0, 1).flatten(0, 1)).last_hidden_state
        first, second = tokens.chunk(2)
        output.loss = (first - second).square().mean()
        return output

    monkeypatch.setattr(SimCLRForPreTraining, "forward", forward)


def alarms(caplog):
    return [record.getMessage() for record in caplog.records if record.name == CollapseAlarm.__module__]


@pytest.mark.slow
def test_projections_that_collapse_raise_the_alarm_once_a_sign(make_recipe, caplog):
    recipe = make_recipe("lejepa", **LONGER | {"probe_steps": 0})
    recipe["model_config"] = {**recipe.get("model_config", {}), "sigreg_weight": 0.0}  # all that keeps them apart
    pretrain(recipe)
    messages = alarms(caplog)
    told = [message for message in messages if "what the method compares is nearly the same" in message]
    assert "feature_std 0.0" in told[0]
    assert "negatives" in told[0]
    assert 1 <= len(told) <= 3


def test_a_loss_that_vanishes_raises_the_alarm(make_recipe, pull_together, caplog):
    """Which is the sign where batch norm, at the end of the head, keeps even a collapse's projections apart."""
    pretrain(make_recipe("simclr", **LONGER | {"probe_steps": 0}))
    assert any("the loss has vanished" in message for message in alarms(caplog))


@pytest.mark.slow
def test_features_that_collapse_raise_the_alarm_by_the_probes(make_recipe, pull_together, caplog):
    pretrain(make_recipe("simclr", **LONGER))
    message = next(message for message in alarms(caplog) if "the features are nearly the same" in message)
    assert "probe_feature_std 0.0" in message
    assert "probe_mean_cosine 0.99" in message or "probe_mean_cosine 1" in message


@pytest.mark.parametrize(
    "method",
    slow_but(["simclr", "mae", "dinov2", "ijepa", "lejepa"], "simclr"),
)
@pytest.mark.parametrize("encoder", [SINCOS, pytest.param(ENCODER, marks=pytest.mark.slow)], ids=["sincos", "learned"])
def test_healthy_runs_raise_none(make_recipe, caplog, method, encoder):
    # SIGReg grows with the batch: of eight images it is too weak, and LeJEPA does collapse.
    batch = {"per_device_train_batch_size": 32 if method == "lejepa" else 8}
    pretrain(make_recipe(method, **LONGER | batch | {"encoder_config": encoder, "on_collapse": "stop"}))
    assert alarms(caplog) == []


def test_stop_saves_a_checkpoint_and_keeps_the_earlier_ones(make_recipe, tmp_path, pull_together, caplog):
    recipe = make_recipe("simclr", **LONGER, save_strategy="steps", save_steps=5, save_total_limit=1)
    with pytest.raises(ValueError, match="Training was stopped because it collapses") as stopped:
        pretrain(recipe | {"on_collapse": "stop"})
    checkpoint = last_checkpoint(tmp_path / "simclr")
    step = int(checkpoint.rpartition("-")[2])
    assert f"Step {step}: the " in str(stopped.value)
    assert f"The checkpoint is {checkpoint};" in str(stopped.value)
    assert step < 80
    assert max(entry["step"] for entry in read_log(tmp_path / "simclr" / "log.jsonl")) == step
    others = [path.name for path in (tmp_path / "simclr").glob("checkpoint-*") if str(path) != checkpoint]
    assert len(others) == 1  # the limit held until then
    assert alarms(caplog) == []
    summary = pretrain(recipe | {"on_collapse": "ignore", "resume_from_checkpoint": "last"})
    assert summary["num_steps"] == 80


def findings(figure, values, *, num_steps=100, **others):
    """Names of the signs at each of the values, which come in turn in a run of so many entries."""
    history, found = [], []
    for step, value in enumerate(values):
        history.append({"step": step, figure: value, **others})
        found.append([sign.name for sign in SIGNS if sign.find(history, progress=step / num_steps)])
    return found


@pytest.mark.parametrize(
    ("figure", "values", "words"),
    [
        ("probe_feature_std", [0.4, 0.6, 0.1, 0.031, 0.029], "nearly the same for all images"),
        ("probe_effective_rank", [6, 30, 20, 8, 6], "use few dimensions"),
        ("feature_std", [0.6, 0.3, 0.1, 0.061, 0.059], "what the method compares"),
        ("teacher_marginal_entropy", [0.9, 0.7, 0.5, 0.31, 0.29], "the same prototype"),
        ("teacher_entropy", [0.9, 0.95, 0.985, 0.997, 0.998], "no prototype"),
        ("loss", [0.7, 1.0, 0.1, 0.006, 0.0049], "vanished"),
        ("expert_load_entropy", [0.5, 0.95, 0.7, 0.33, 0.3], "few experts"),
    ],
)
def test_a_fall_is_told_when_it_is_deep(figure, values, words):
    found = findings(figure, values)
    assert found[:4] == [[], [], [], []]
    assert len(found[4]) == 1
    assert words in found[4][0]


@pytest.mark.parametrize(
    ("figure", "values"),
    [
        ("probe_feature_std", [0.04, 0.01, 0.005, 0.05]),  # images that are all alike
        ("probe_effective_rank", [2.7, 1.3, 1.1, 1.4]),
        ("feature_std", [0.01, 0.02, 0.1, 0.5]),  # a head of a fresh model
        ("teacher_entropy", [0.9999, 0.9997, 0.99, 0.9]),
        ("teacher_entropy", [0.8, 0.3, 0.05, 0.01]),  # sharp, which is no fault
        ("teacher_marginal_entropy", [0.04, 0.1, 0.5, 0.6]),
        ("loss", [0.5, -0.2, -1.0, 0.2]),
        ("expert_load_entropy", [0.5, 0.0, 0.2, 0.9]),  # class tokens of a fresh model
    ],
)
def test_what_is_low_at_the_start_is_no_sign(figure, values):
    assert findings(figure, values) == [[]] * len(values)


@pytest.mark.parametrize(
    ("figure", "value"), [("feature_std", 0.015), ("teacher_entropy", 0.9998), ("teacher_marginal_entropy", 0.03)]
)
def test_what_stays_low_is_a_sign_from_a_quarter_of_the_run_on(figure, value):
    found = findings(figure, [value] * 5, num_steps=12)
    assert found[:3] == [[], [], []]
    assert all(len(names) == 1 for names in found[3:])


class State:
    global_step, max_steps, is_world_process_zero = 0, 100, True

    def __init__(self):
        self.log_history = []


def test_it_is_told_again_when_it_got_markedly_worse(caplog):
    alarm, state = CollapseAlarm(), State()
    for step, value in enumerate([0.8, 0.03, 0.02, 0.04, 0.007, 0.006, 0.0]):
        state.global_step = step
        state.log_history.append({"step": step, "feature_std": value})
        alarm.on_log(None, state, None)
    told = [message.split(":")[0] for message in alarms(caplog)]
    assert told == ["Step 1", "Step 4", "Step 6"]
    assert "feature_std 0.007 (was 0.8)" in alarms(caplog)[1]


def test_other_figures_that_help_to_judge_are_shown():
    history = [{"teacher_marginal_entropy": 0.9}, {"teacher_marginal_entropy": 0.01, "teacher_entropy": 0.002}]
    sign = next(sign for sign in SIGNS if sign.metric == "teacher_marginal_entropy")
    values = sign.find(history, progress=0.1)[1]
    assert values == "teacher_marginal_entropy 0.01, teacher_entropy 0.002 (was 0.9)"
