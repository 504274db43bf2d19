"""Continuous normalizing flow."""

from collections.abc import Iterable, Sequence
from typing import Any

from cnf._checks import check_count, check_flag, check_type
from cnf.bases import Base, GaussianMixtureBase, StandardNormal
from cnf.divergence import Divergence
from cnf.flows.flow import Flow
from cnf.flows.mixture_start import solver_of_a_mixture
from cnf.manifolds import Manifold, OnManifold
from cnf.ode import ODESolver
from cnf.transforms import Augment, Chain, ContinuousTransform, Standardize, Transform
from cnf.transforms.from_data.base import DataTransform
from cnf.vector_fields import MLPField, TangentField, VectorField
from cnf.vector_fields.conditioning import context_scalings

_FEW_FEATURES = 3
"""Most features for which a deep and narrow network is the default. One derivative for each feature
is cheap there; and their densities have sharp features, which a sinusoidal layer resolves."""


class CNF(Flow):
    """Continuous normalizing flow: a `Flow` whose transforms solve an ODE.

    A composition that adds nothing to `Flow`: `transforms`, a `Standardize`, an `Augment` if
    `augment` is positive, `blocks` times a `ContinuousTransform` with an `MLPField`, and `base`.

    Data and contexts come raw. `fit` sets the `Standardize`, and the scaling of the context in each
    field, once from the training rows, and they are saved with the flow; in a training loop of your
    own call `initialize` first. Until then they are the identity.

    `fit` without settings may replace the standard normal base by a `GaussianMixtureBase`, and the
    field by zero, where this is the better density; a state dict with such a base is loaded.

    Args:
        features: Number of entries of x.
        context_features: Size of the context; 0 for an unconditional density.
        hidden_features: Widths of the hidden layers. With one or two, the likelihood is exact at
            about the price of an evaluation, in any dimension. None for two of 128, or, where the
            field has at most three features, for four of 64, which learn more in less time and
            whose exact trace is cheap there.
        layer: Kind of the time-conditioned layers; see `MLPField`.
        activation: Activation, or one for each hidden layer; see `MLPField`. None for silu, after
            a sinusoidal first layer where the field has at most three features or `frequency` is
            given.
        frequency: Initial scale of a sinusoidal first layer; see `MLPField`.
        time_features: Number of sinusoidal features of time; see `MLPField`.
        divergence: How the divergence is computed; None for `Exact`.
        solver: How the ODE is solved; None for `ODESolver()`.
        blocks: Number of vector fields in a row.
        base: Distribution at t = 0; None for a standard normal, or `base_on` a manifold.
        transforms: Transforms between data and ODE, such as ``[Logit(2)]``.
        standardize: Whether data and context are scaled as above. `Standardize` is left out if
            `transforms` end with one, or with a `NormalScores` or `Whiten`.
        augment: Number of standard normal features that `Augment` adds to x. With any, the
            likelihood is a lower bound.
        skip: Whether each velocity has a multiple of x, which flow matching starts from; see
            `MLPField`. None for a skip, unless there are several blocks, which flow matching cannot
            train, or `layer` is "ignore"; none on a manifold.
        manifold: Manifold that the data are on, such as ``Sphere(3)`` for unit vectors or
            ``Torus(2)`` for two angles: the density is with respect to its volume, the field is a
            `TangentField`, and only Euclidean factors are standardised. Of `transforms`, those that
            map to the manifold are accepted, such as an `Unconstrain` of circles, and no `augment`.
            None for the manifold that `transforms` map to, or for real numbers.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range or the parts do not fit together.

    References:
        Chen et al. (2018), https://arxiv.org/abs/1806.07366; Grathwohl et al. (2019), FFJORD,
        https://arxiv.org/abs/1810.01367

    Example:
        >>> import torch
        >>> flow = CNF(2, context_features=3)
        >>> flow.log_prob(torch.zeros(5, 2), context=torch.zeros(5, 3)).shape
        torch.Size([5])
        >>> flow.sample(10, context=torch.zeros(5, 3)).shape
        torch.Size([10, 5, 2])
    """

    def __init__(  # noqa: PLR0913 - the settings of its parts, in one place
        self,
        features: int,
        context_features: int = 0,
        *,
        hidden_features: Sequence[int] | None = None,
        layer: str = "film",
        activation: str | Sequence[str] | None = None,
        frequency: float | None = None,
        time_features: int | None = None,
        divergence: Divergence | None = None,
        solver: ODESolver | None = None,
        blocks: int = 1,
        base: Base | None = None,
        transforms: Iterable[Transform] = (),
        standardize: bool = True,
        augment: int = 0,
        skip: bool | None = None,
        manifold: Manifold | None = None,
    ) -> None:
        check_count("blocks", blocks)
        before = Chain(transforms, check_count("features", features))
        parts = before.transforms
        manifold = _manifold_of(manifold, before, augment, skip)
        if manifold is not None:
            standardize, skip = standardize and any(manifold.euclidean_columns), False
        if check_flag("standardize", standardize) and not (
            parts and isinstance(parts[-1], DataTransform)
        ):
            parts.append(Standardize(before.base_features, manifold=manifold))
        if check_count("augment", augment, least=0):
            parts.append(Augment(parts[-1].base_features if parts else features, augment))
        size = parts[-1].base_features if parts else features
        if manifold is not None:
            size = manifold.embedded_features
        few = size <= _FEW_FEATURES
        if hidden_features is None:
            hidden_features = (64, 64, 64, 64) if few else (128, 128)
        if activation is None and not few and frequency is None:
            activation = "silu"
        fields: list[VectorField] = [
            MLPField(
                size,
                context_features,
                hidden_features=hidden_features,
                layer=layer,
                activation=activation,
                frequency=frequency,
                time_features=time_features,
                skip=blocks == 1 and layer != "ignore" if skip is None else skip,
            )
            for _ in range(blocks)
        ]
        if manifold is not None:
            fields = [TangentField(field, manifold) for field in fields]
        continuous = [
            ContinuousTransform(field, divergence=divergence, solver=solver) for field in fields
        ]
        super().__init__([*parts, *continuous], base)
        if not standardize and manifold is None:
            for scaling in context_scalings(self):
                scaling.keep_identity()

    def forget_mixture(self) -> None:
        """Return from a mixture that `fit` chose to a standard normal base; the field is zero."""
        ode = self.only_ode
        if (
            isinstance(self.base, GaussianMixtureBase)
            and ode is not None
            and ode.solver == solver_of_a_mixture()
        ):
            self.base = StandardNormal(self.base.features).to(self.base.means)
            ode.solver = ODESolver()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        mixed = f"{prefix}base.log_weights" in state_dict
        if isinstance(self.base, StandardNormal) and mixed:
            self.base = GaussianMixtureBase(self.base.features).to(self.base.loc)
        elif not mixed:
            self.forget_mixture()
        # A file saved before a CNF held a Standardize has one transform less.
        parts = list(enumerate(self.transforms))
        scalings = ((i, part) for i, part in parts if isinstance(part, Standardize))
        place, held = next(scalings, (0, None))
        names = [f"{prefix}transforms.{i}." for i, _ in parts]
        absent = not any(key.startswith(names[-1]) for key in state_dict)
        if held is not None and absent and f"{names[place]}mean" not in state_dict:
            for old, new in reversed(list(zip(names[place:-1], names[place + 1 :], strict=True))):
                for key in [key for key in state_dict if key.startswith(old)]:
                    state_dict[new + key[len(old) :]] = state_dict.pop(key)
            identity = Standardize(held.features)
            identity.keep_identity()
            for key, value in identity.state_dict().items():
                state_dict[names[place] + key] = value
        super()._load_from_state_dict(state_dict, prefix, *args)


def _manifold_of(
    manifold: Manifold | None, before: Chain, augment: int, skip: bool | None
) -> Manifold | None:
    """Return the manifold, or the one that transforms map to; refuse what does not go with it."""
    mapped = before.codomain.manifold if isinstance(before.codomain, OnManifold) else None
    found = mapped if manifold is None else manifold
    if found is None:
        return None
    check_type("manifold", found, Manifold, "use Sphere(3) or Torus(2)")
    if before.base_features != found.features:
        raise ValueError(
            f"features must be the {found.features} of {found}; got {before.base_features}."
        )
    if skip:
        raise ValueError(
            "skip must be None or False with a manifold, because no multiple of x is tangent; got "
            f"{skip}."
        )
    if augment or (len(before) and mapped != found):
        raise ValueError(
            "augment, and transforms that do not map to the manifold, must be left out with "
            f"{found}, because points would leave it; got augment={augment!r} and transforms to "
            f"{before.codomain}. Compose a Flow of transforms and a ContinuousTransform of a "
            "TangentField."
        )
    return found
