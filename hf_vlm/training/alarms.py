"""An alarm for collapsing pretraining: signs in the log, what they mean and what to try."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

__all__ = ["SIGNS", "CollapseAlarm", "Sign"]

logger = logging.getLogger(__name__)

Entry = dict[str, float]

LEVEL_FROM = 0.25  # fraction of a run from which low values count: an untrained model has them too
MARKEDLY_WORSE = 1 / 4  # fraction of the distance at the last warning, below which there is another


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)


@dataclass(frozen=True, kw_only=True)
class Sign:
    """A metric of the log that approaches 0 in a collapse.

    Features of an untrained encoder may be nearly constant too, and those of near-identical images stay so in a
    healthy run. So a metric is compared with its highest value in the run, and with a fixed level only late in it.

    Args:
        name: Plain description of the problem.
        metric: Name of the metric in the log.
        advice: Remedies to try.
        distance: Function from the metric's value to its distance from collapse; the absolute value by default.
        fall: Fraction of the highest distance so far, below which the sign is reported.
        level: Distance below which it is reported late in a run.
        matters_from: Highest distance so far that makes a fall worth reporting.
        shown: Other metrics that are reported with it.
    """

    name: str
    metric: str
    advice: str
    distance: Callable[[float], float] = abs
    fall: float
    level: float = 0.0
    matters_from: float = 0.0
    shown: tuple[str, ...] = ()

    def find(self, history: list[Entry], *, progress: float) -> tuple[float, str] | None:
        """The distance from collapse and the values, where the last entry shows this sign; None where not."""
        entry = history[-1]
        if not _is_number(entry.get(self.metric)):
            return None
        distance = self.distance(entry[self.metric])
        values = [past[self.metric] for past in history if _is_number(past.get(self.metric))]
        highest = max(values, key=self.distance)
        has_fallen = distance < self.fall * self.distance(highest) and self.distance(highest) >= self.matters_from
        if not has_fallen and not (progress >= LEVEL_FROM and distance < self.level):
            return None
        shown = [f"{name} {entry[name]:.4g}" for name in (self.metric, *self.shown) if name in entry]
        return distance, f"{', '.join(shown)} (was {highest:.4g})" if has_fallen else ", ".join(shown)


SPREAD = (
    "Lower the learning rate or lengthen the warm-up; check that the method's repelling part (negatives, variance, "
    "centring) has its weight, and that batches are large enough for it; make the views differ more."
)

# Where the thresholds come from: runs of 75 to 2500 steps of encoders of 3 to 6 layers on built-in scenes, CIFAR-10,
# photographs of groceries, blood cells that look the same, and nuclei, at usual and at too high learning rates; and
# the same with losses that only pull views together. Each lies between the worst healthy run and the collapsed ones.
#   probe_feature_std       healthy >= 0.10 of the highest (MAE on blood cells; elsewhere >= 0.36), collapsed <= 0.044
#   probe_effective_rank    healthy >= 0.43 of the highest where that is 10 or more, collapsed <= 0.09; where images
#                           use few dimensions it falls in healthy runs too
#   feature_std             healthy >= 0.16 of the highest, collapsed <= 0.05 (SimCLR's projections, while the
#                           encoder's features stayed as they were); of near-identical images 0.04 in I-JEPA
#   loss                    healthy >= 0.05 of the highest, collapsed <= 0.0015; I-JEPA on blood cells came to 0.0032
#   teacher_marginal_entropy  healthy >= 0.64 of the highest, one-hot collapse <= 0.2 (a DINO without centring)
#   1 - teacher_entropy     healthy >= 0.068 of the highest (DINOv2, few prototypes), uniform collapse <= 0.008 (a DINO
#                           with a temperature of 0.3)
#   expert_load_entropy     healthy >= 0.6 of the highest and, from a quarter of the run, >= 0.19 (SimCLR, whose last
#                           router sees class tokens alone; elsewhere >= 0.4), collapsed 0 (SimCLR without the balance
#                           loss)
SIGNS: tuple[Sign, ...] = (
    Sign(
        name="the features are nearly the same for all images",
        metric="probe_feature_std",
        shown=("probe_mean_cosine", "probe_effective_rank"),
        fall=1 / 20,
        advice=SPREAD,
    ),
    Sign(
        name="the features use few dimensions",
        metric="probe_effective_rank",
        shown=("probe_feature_std",),
        distance=lambda rank: rank - 1,
        fall=1 / 5,
        matters_from=9.0,
        advice=SPREAD,
    ),
    Sign(
        name="what the method compares is nearly the same for all images",
        metric="feature_std",
        fall=1 / 10,
        level=0.02,
        advice=SPREAD,
    ),
    Sign(
        name="the loss has vanished, as if all images were the same",
        metric="loss",
        fall=1 / 200,
        advice=SPREAD,
    ),
    Sign(
        name="the teacher gives nearly all images the same prototype",
        metric="teacher_marginal_entropy",
        shown=("teacher_entropy",),
        fall=1 / 3,
        level=0.05,
        advice="Centre the teacher's output more, or raise its temperature; lower the learning rate; let the teacher "
        "follow more slowly (momentum nearer to 1).",
    ),
    Sign(
        name="the teacher prefers no prototype for any image",
        metric="teacher_entropy",
        shown=("teacher_marginal_entropy",),
        distance=lambda entropy: 1 - entropy,
        fall=1 / 40,
        level=5e-4,
        advice="Lower the teacher's temperature (0.04 is usual), or centre less; lower the learning rate.",
    ),
    Sign(
        name="a router sends nearly all tokens to few experts",
        metric="expert_load_entropy",
        shown=("expert_load_max", "expert_load_min"),
        fall=1 / 3,
        level=0.1,
        matters_from=0.6,
        advice="Raise router_aux_loss_coef or router_noise (1.0 is usual) in encoder_config; lower the learning rate.",
    ),
)


class CollapseAlarm(TrainerCallback):
    """Checks every log entry and warns when training collapses: once per sign, and again when it is much worse.

    With `stop` it ends training at the first sign: a checkpoint is saved, all earlier ones are kept, and `train()`
    raises a ValueError.

    Args:
        stop: Whether to stop.
        signs: What to look for.
    """

    def __init__(self, *, stop: bool = False, signs: Sequence[Sign] = SIGNS) -> None:
        self.stop = stop
        self.signs = signs
        self._reported: dict[str, float] = {}  # distance from collapse of each sign when it was last reported
        self._reason: str | None = None

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for sign in self.signs:
            found = sign.find(state.log_history, progress=state.global_step / max(state.max_steps, 1))
            if found is None or self._reason is not None:
                continue
            distance, values = found
            if distance < MARKEDLY_WORSE * self._reported.get(sign.name, math.inf):
                self._reported[sign.name] = distance
                message = f"Step {state.global_step}: {sign.name}: {values}. {sign.advice}"
                if self.stop:
                    self._reason = message
                elif state.is_world_process_zero:
                    logger.warning(message)
        self._stop(args, control)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._stop(args, control)  # for the probe before the first step, after which the Trainer resets `control`

    def _stop(self, args: Any, control: TrainerControl) -> None:
        if self._reason is not None:
            control.should_save = control.should_training_stop = True
            args.save_total_limit = None  # the checkpoints before the collapse are the ones to return to

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._reason is not None:
            raise ValueError(
                f"Training was stopped because it collapses. {self._reason} The checkpoint "
                f"is {args.output_dir}/checkpoint-{state.global_step}; to continue from it all the same: "
                "--resume_from_checkpoint last --on_collapse warn"
            )
