"""Table and points of the picture of an ablation."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cnf.ablation.outcome import Outcome
from cnf.plots import Tradeoff


def markdown(outcomes: Sequence[Outcome], reference: Tensor | None = None) -> str:
    """Return the table of an ablation: a line for each training, each beside the one without.

    Args:
        outcomes: Outcomes at the same held-out rows.
        reference: Log-density of the truth at these rows, if it is known: nats are then the
            distance from the truth, else the negative log-likelihood.
    """
    good = [outcome for outcome in outcomes if outcome.failure is None]
    costs = list(dict.fromkeys(name for outcome in good for name in outcome.costs))
    heads = ["training", "penalty", "NLL" if reference is None else "gap", "more nats"]
    heads += ["evaluations", "ratio", "dopri5", *(f"∫ {name}" for name in costs), "CPU s"]
    plain = {outcome.run.training: outcome for outcome in good if not outcome.run.penalty}
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for outcome in good:
        run, beside = outcome.run, plain.get(outcome.run.training)
        penalty = f"{run.penalty} {run.strength:g}" if run.penalty else "none"
        more = ratio = "-"
        if beside is not None and run.penalty:
            more = _cell(_nats(outcome, None) - _nats(beside, None), sign="+")
            ratio = f"{outcome.evaluations / beside.evaluations:.2f}"
        cells = [run.training, penalty, _cell(_nats(outcome, reference)), more]
        cells += [f"{outcome.evaluations:.0f}", ratio, f"{outcome.adaptive_evaluations}"]
        known = outcome.costs  # of the penalties when it was trained
        cells += [f"{known[name]:.3g}" if name in known else "-" for name in costs]
        cells += [f"{outcome.seconds:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    failed = [outcome for outcome in outcomes if outcome.failure is not None]
    lines += [f"\n{outcome.run} failed: {outcome.failure}" for outcome in failed]
    return "\n".join(lines) + "\n"


def tradeoffs(
    outcomes: Sequence[Outcome], title: str, reference: Tensor | None = None
) -> list[Tradeoff]:
    """Return the points of `cnf.plots.plot_tradeoffs`, without failures; `title` names the data."""
    points = []
    for outcome in outcomes:
        if outcome.failure is None:
            nats = _nats(outcome, reference)
            error = float(nats.std() / math.sqrt(len(nats)))
            points.append(
                Tradeoff(
                    row=title,
                    column=outcome.run.training,
                    name=outcome.run.penalty,
                    strength=outcome.run.strength,
                    evaluations=outcome.evaluations,
                    nats=float(nats.mean()),
                    error=error,
                )
            )
    return points


def _nats(outcome: Outcome, reference: Tensor | None) -> Tensor:
    log_prob = torch.tensor(outcome.log_prob, dtype=torch.float64)
    return -log_prob if reference is None else reference.double() - log_prob


def _cell(nats: Tensor, sign: str = "") -> str:
    return f"{nats.mean():{sign}.3f} ± {nats.std() / math.sqrt(len(nats)):.3f}"
