"""Laws of a chain: a transform, the sequence of its parts, and the parts of a flow."""

import pytest
import torch
from zoo import cnf, lipschitz_mlp, mlp, perturbed, residual_flow, rows_for, seeded

from cnf import Flow, Hutchinson, ODESolver, load, save
from cnf.bases import StandardNormal
from cnf.regularizers import kinetic_energy
from cnf.transforms import (
    ActNorm,
    Affine,
    Augment,
    Chain,
    ConditionalAffine,
    ContinuousTransform,
    Dequantize,
    FactorOut,
    Flatten,
    Permute,
    RussianRoulette,
)

GRID = ODESolver(method="rk4", steps=4)


def parts():
    return [
        perturbed(Affine(2)),
        perturbed(ConditionalAffine(2, 3)),
        ContinuousTransform(mlp(2, 3), solver=GRID),
    ]


def test_a_chain_in_a_flow_moves_points_as_its_parts_do():
    made = parts()
    flat, nested = Flow(made), Flow([Chain(made[:1]), Chain(made[1:])])
    x, context = rows_for(flat, 4)
    assert torch.equal(nested.to_base(x, context), flat.to_base(x, context))
    assert torch.equal(nested.to_data(x, context), flat.to_data(x, context))
    assert torch.equal(nested.log_prob(x, context), flat.log_prob(x, context))
    costs = [
        flow.to_base_with_costs(x, context, regularizers=[kinetic_energy])[2]
        for flow in (flat, nested)
    ]
    assert torch.equal(*costs)


def test_a_chain_is_the_sequence_of_its_parts():
    made = parts()
    chain = Chain(made)
    assert (len(chain), list(chain), chain.transforms) == (3, made, made)
    assert (chain[0], chain[-1]) == (made[0], made[2])
    assert list(reversed(chain)) == made[::-1]
    for part in (chain[1:], chain[:-1], chain[::2], chain[:0], chain[3:]):
        assert isinstance(part, Chain)
    assert list(chain[1:]) == made[1:]
    assert chain[:1].context_features == 0
    with pytest.raises(IndexError):
        chain[3]


def test_an_empty_part_of_a_chain_is_as_large_as_its_place():
    chain = Chain([Affine(2), Augment(2, 1), Affine(3)])
    assert [chain[i:i].features for i in range(4)] == [2, 2, 3, 3]
    assert Flow([], StandardNormal(4)).chain[::-1].features == 4
    x = torch.randn(5, 3)
    z, ladj = chain[3:].to_base_and_ladj(x)
    assert torch.equal(z, x)
    assert torch.equal(ladj, torch.zeros(5))


def test_a_flow_names_its_parts_as_a_list_does():
    expected = [f"transforms.0.{name}" for name in Affine(2).state_dict()]
    assert list(Flow([Affine(2)]).state_dict()) == expected
    assert list(FactorOut([Affine(2)], 3).state_dict()) == expected
    assert list(Chain([Affine(2)]).state_dict()) == [name[11:] for name in expected]


def test_a_flow_has_no_chain_of_another():
    """Its parts are the same, and what is done to the one flow's list is not done to the other."""
    flow = cnf()
    other = Flow(flow.chain, flow.base)
    assert other.transforms is not flow.transforms
    assert list(other.chain) == list(flow.chain)


def test_what_a_chain_says_of_itself_is_what_its_parts_say():
    image = Chain([Flatten((1, 2, 2)), Dequantize(4, 3), Augment(4, 2)])
    assert (image.event_shape, image.features, image.base_features) == ((1, 2, 2), 4, 6)
    assert (image.likelihood, image.is_bijective) == ("lower_bound", False)
    assert Chain([Flatten((1, 2, 2))]).support is None
    inside = Flow([Chain([Flatten((1, 2, 2))]), Dequantize(4, 3)])
    assert inside.support.check(torch.zeros(3, 1, 2, 2)).tolist() == [True] * 3
    assert Flow([image]).support.check(torch.full((3, 1, 2, 2), 0.5)).tolist() == [False] * 3
    estimate = Chain([image, residual_flow(lipschitz_mlp(6), log_det=RussianRoulette())])
    assert estimate.likelihoods == {"exact", "lower_bound", "estimate"}


def test_a_chain_starts_from_data_as_its_parts_do():
    x = 3 + 2 * torch.randn(50, 2)
    flat, nested = ([ActNorm(2), Permute([1, 0]), ActNorm(2)] for _ in range(2))
    Flow(flat).initialize(x, generator=seeded())
    flow = Flow([Affine(2), Chain(nested)])
    assert flow.chain[1].needs_initialization
    flow.initialize(x, generator=seeded())
    assert not flow.chain[1].needs_initialization
    for part, expected in zip(nested, flat, strict=True):
        torch.testing.assert_close(part.state_dict(), expected.state_dict())


def test_another_solver_or_divergence_reaches_what_is_inside():
    chain = Chain([Affine(2), Chain([ContinuousTransform(mlp())])])
    other = Flow([chain]).using(solver=GRID, divergence=Hutchinson())
    found = other.chain[0][1][0]
    assert (found.solver, found.divergence) == (GRID, Hutchinson())
    assert [id(p) for p in other.parameters()] == [id(p) for p in chain.parameters()]


def test_a_chain_is_saved_with_its_flow(tmp_path):
    flow = Flow([Chain(parts()), Chain([], 2)])
    x, context = rows_for(flow, 4)
    save(flow, tmp_path / "flow.safetensors")
    loaded = load(tmp_path / "flow.safetensors")
    assert [type(part) for part in loaded.chain] == [Chain, Chain]
    assert torch.equal(loaded.log_prob(x, context), flow.log_prob(x, context))


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Chain([]), ValueError, "at least one transform; got none"),
        (lambda: Chain(Affine(2)), TypeError, "put the single transform in brackets"),
        (lambda: Chain([mlp()]), TypeError, "must be cnf transforms; got MLPField"),
        (lambda: Chain([Affine(2)], 3), ValueError, "must be the 2 that the first .*; got 3"),
        (lambda: Chain([], 2.5), TypeError, "features must be an int"),
        (lambda: Chain([Affine(2), Affine(1)]), ValueError, "gives 2 and Affine takes 1"),
        (
            lambda: Chain([ConditionalAffine(2, 3), ConditionalAffine(2, 1)]),
            ValueError,
            r"agree on context_features; got \[1, 3\]",
        ),
    ],
)
def test_constructor_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()
