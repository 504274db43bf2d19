"""The mean of a loss over rows that count differently."""

from jaxtyping import Float
from torch import Tensor

from cnf._checks import check_events, refuse_rows


def weighted_mean(
    losses: Float[Tensor, " batch"], weight: Float[Tensor, " batch"] | None
) -> Float[Tensor, ""]:
    """The mean of ``weight * losses``; None stands for ones.

    Weights are relative to a mean of 1 over the data, not over the minibatch: so the mean over
    minibatches is that over the data, and a row of weight 2 counts like two rows.

    Raises:
        TypeError: If `weight` is not a tensor.
        ValueError: If it is not one finite number, at least 0, for each row, in the dtype and on
            the device of the losses.
    """
    if weight is None:
        return losses.mean()
    check_weight(weight, len(losses), like=losses)
    # A row that does not count may have no density.
    return (weight * losses.where(weight > 0, 0.0)).mean()


def check_weight(weight: Tensor, rows: int, *, like: Tensor) -> None:
    """Refuse what is not one finite number, at least 0, for each row.

    Raises:
        TypeError: If `weight` is not a tensor.
        ValueError: If it is not so, or of another dtype or device than `like`.
    """
    check_events("weight", weight, (), like=like)
    if weight.shape != (rows,):
        raise ValueError(
            f"weight must have one entry for each row, shape ({rows},); got {tuple(weight.shape)}."
        )
    refuse_rows("weight", weight < 0, "at least 0")
