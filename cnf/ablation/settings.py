"""Settings of an ablation: the trainings, the penalties and their strengths."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

from cnf._checks import check_choice, check_count, check_number, check_widths, is_positive
from cnf.ablation.penalties import find_penalty
from cnf.objectives import Objective, OptimalTransport
from cnf.regularizers import CostRate
from cnf.training import Recipe, TrainingConfig

Training = Literal["recipe", "scratch", "transport"]

_MATCHING_STEPS_OF_A_LIKELIHOOD_STEP = 30
"""About as many steps of matching take as long as one of likelihood."""


@dataclass(frozen=True, kw_only=True)
class AblationSettings(Recipe):
    """Settings of an ablation.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If a setting is out of range, or `find_penalty` refuses a penalty.

    Example:
        >>> settings = AblationSettings(penalties=["kinetic"], strengths=[0.1, 1])
        >>> settings.variants
        [('', 0.0), ('kinetic', 0.1), ('kinetic', 1.0)]
    """

    penalties: Sequence[str] = ("kinetic", "jacobian-frobenius", "kinetic+jacobian-frobenius")
    """Penalties: kinetic, jacobian-frobenius, directional-derivative, total-derivative; a sum such
    as kinetic+jacobian-frobenius (RNODE's); or your own as module:name, a function, or a class
    without arguments, that maps a FieldEvaluation to the cost rate of each row."""
    strengths: Sequence[float] = (0.01, 0.1, 1.0)
    """Weights of each penalty beside the nats of a row."""
    trainings: Sequence[Training] = get_args(Training)
    """How flows are trained: "recipe" by flow matching, then by likelihood with the penalty;
    "transport" likewise, with optimal-transport pairing in matching; "scratch" by likelihood with
    the penalty alone, as RNODE, from a field at rest."""
    scratch_steps: int | None = None
    """Steps of the training from scratch; None for about as long as the recipe takes."""
    hidden_features: Sequence[int] | None = None
    """Widths of the hidden layers of the network; None for the default of `CNF`."""
    accuracy: float = 1e-3
    """Largest estimated error of the log-density of a row, in nats, at which evaluations are
    counted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("penalties", "strengths", "trainings"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence) or not value:
                raise ValueError(f"{name} must be one or more; got {value!r}.")
            if len(set(value)) < len(value):
                raise ValueError(f"{name} must differ; got {', '.join(map(str, value))}.")
        for training in self.trainings:
            check_choice("each of trainings", training, get_args(Training))
        for strength in self.strengths:
            check_number("each of strengths", strength, "positive and finite", is_positive)
        for penalty in self.penalties:
            parts_of(penalty)
        if 0 in (self.matching_steps, self.likelihood_steps):
            raise ValueError(
                "matching_steps and likelihood_steps must be at least 1, because penalties act in "
                'the likelihood phase after matching; got 0. Leave out the trainings "recipe" and '
                '"transport" for none of both.'
            )
        if self.scratch_steps is not None:
            check_count("scratch_steps", self.scratch_steps)
        if self.hidden_features is not None:
            check_widths("hidden_features", self.hidden_features)
        check_number("accuracy", self.accuracy, "positive and finite", is_positive)

    @property
    def variants(self) -> list[tuple[str, float]]:
        """Each penalty with each strength, after the training without penalties, named ""."""
        pairs = [(name, float(weight)) for name in self.penalties for weight in self.strengths]
        return [("", 0.0), *pairs]

    def configs(self, training: Training, rows: int, *, progress: bool) -> list[TrainingConfig]:
        """Return the phases of a training on so many rows; penalties act in the last one."""
        matching, likelihood = self.phases(rows, progress=progress)
        if training == "scratch":
            more = matching.steps // _MATCHING_STEPS_OF_A_LIKELIHOOD_STEP
            steps = self.scratch_steps or likelihood.steps + more
            rate = TrainingConfig.learning_rate
            return [replace(likelihood, steps=steps, learning_rate=rate)]
        if training == "transport":
            objective: Callable[..., Objective] = matching.objective
            paired = partial(objective, pairing=OptimalTransport())
            matching = replace(matching, objective=paired)
        return [matching, likelihood]

    def quick(self) -> "AblationSettings":
        """Return the settings with little of everything, to see that all works."""
        return replace(
            self,
            strengths=self.strengths[:1],
            matching_steps=3,
            likelihood_steps=1,
            scratch_steps=1,
            batch_size=32,
            hidden_features=(8, 8),
            accuracy=0.1,
        )


def parts_of(penalty: str) -> dict[str, CostRate]:
    """Return the penalties of a sum by name; "" has none."""
    return {name: find_penalty(name) for name in penalty.split("+")} if penalty else {}
