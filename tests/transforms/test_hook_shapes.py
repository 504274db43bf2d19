"""What a hook returns is checked: rows must not be added to rows of another shape."""

import pytest
import torch

from cnf import CNF, Flow
from cnf.bases import Base
from cnf.objectives import Objective
from cnf.transforms import Transform


class KeepsAnAxis(Transform):
    """A slip: the ladj has an axis too many."""

    def _to_base(self, x, context, generator):
        return 2 * x, x.new_ones(*x.shape[:-1], 1)

    def _to_data(self, z, context, generator):
        return z / 2, z.new_ones(*z.shape[:-1], 1)


class KeepsAnAxisToo(Base):
    """The same slip of a base."""

    def _log_prob(self, z, context, generator):
        return z.sum(-1, keepdim=True)

    def _rsample(self, shape, context, generator):
        return torch.zeros(*shape, self.features)


class OfRows(Objective):
    """A loss for each row."""

    def _loss(self, x, context, weight, draws, generator):
        return x.sum(-1)


@pytest.mark.usefixtures("shapes_unchecked")
def test_a_ladj_of_another_shape_is_refused():
    flow = Flow([KeepsAnAxis(2)])
    for method in (flow.log_prob, flow.to_base_and_ladj, flow.to_data_and_ladj):
        with pytest.raises(ValueError, match="KeepsAnAxis must return a ladj for each row"):
            method(torch.randn(5, 2))


@pytest.mark.usefixtures("shapes_unchecked")
def test_a_log_density_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="KeepsAnAxisToo must return a log-density for each row"):
        Flow([], KeepsAnAxisToo(2)).log_prob(torch.randn(5, 2))


@pytest.mark.usefixtures("shapes_unchecked")
def test_a_loss_that_is_no_scalar_is_refused():
    with pytest.raises(ValueError, match=r"OfRows._loss must return a scalar; got shape \(5,\)"):
        OfRows(CNF(2))(torch.randn(5, 2))
