"""Coupling layers: one half of the features is mapped, with parameters from the other half."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from cnf._checks import (
    check_choice,
    check_number,
    check_type,
    check_vector_or_image_shape,
    is_positive,
)
from cnf.transforms.base import Transform, WithLadj
from cnf.transforms.conditioners import ConvConditioner, MLPConditioner

_HALVES = ("first", "last")
_CHECKERBOARDS = ("even", "odd")


class Coupling(Transform):
    """Coupling layer: maps some features elementwise and keeps the others.

    A network, the `conditioner`, computes the parameters of the map from the kept features and the
    context; so both directions call it once. It is a module of the signature ``(x, context)`` that
    returns ``numbers * changed`` values for each row: the first parameter of each changed feature,
    then the second, and so on. With halves, its x is the kept features alone. With checkerboards
    its x is the whole image, with zeros for pixels that change, and it returns parameters for all
    pixels; the parameters of kept pixels are ignored. The context has the batch shape of x, and is
    None if `context_features` is 0; a network of your own gets it unscaled, as in a `ModuleField`.

    A subclass sets `numbers`, the number of parameters for each changed feature, and writes the map
    in the hooks `_changed_to_base` and `_changed_to_data`. Their arguments are the features that
    change and the parameters, a tensor of the same shape for each.

    Args:
        shape: Number of features of a vector, or shape ``(channels, height, width)`` of the image
            that x is, flattened in C order.
        context_features: Size of the context; 0 for none.
        conditioner: The network; None for an `MLPConditioner`, or a `ConvConditioner` of images,
            with which the new transform is the identity. A flow with a network of your own cannot
            be saved by `cnf.save`.
        mask: The kept features: the "first" or "last" half of the features, or of the channels of
            an image; or the pixels of an image whose row and column add up to an "even" or "odd"
            number, as on a checkerboard. Alternate them.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a size is out of range, `mask` is unknown or leaves nothing to keep or to
            change, or `conditioner` takes other features or another context.
    """

    numbers: ClassVar[int]

    def __init__(
        self,
        shape: int | Sequence[int],
        context_features: int = 0,
        *,
        conditioner: nn.Module | None = None,
        mask: str = "first",
    ) -> None:
        channels, height, width = check_vector_or_image_shape(shape)
        super().__init__(channels * height * width, context_features)
        self.shape: int | tuple[int, int, int] = (
            (channels, height, width) if isinstance(shape, Sequence) else channels
        )
        self.mask = mask
        kept = _kept_features((channels, height, width), mask)
        if kept.all() or not kept.any():
            raise ValueError(
                f"shape must leave something to keep and to change; with mask={mask!r}, "
                f"{int(kept.sum())} of the {self.features} features of {self.shape} are kept."
            )
        self.register_buffer("_given", kept.nonzero().squeeze(-1), persistent=False)
        self.register_buffer("_changed", (~kept).nonzero().squeeze(-1), persistent=False)
        self._given: Tensor
        self._changed: Tensor
        if conditioner is None:
            conditioner = self._default_conditioner()
        self._check_sizes(conditioner)
        self.conditioner = conditioner

    def extra_repr(self) -> str:
        """Shape of x, and the mask."""
        return f"shape={self.shape}, mask={self.mask!r}"

    @abstractmethod
    def _changed_to_base(self, x: Tensor, numbers: Sequence[Tensor]) -> WithLadj:
        """Hook: return z, and log(dz/dx) of each feature."""

    @abstractmethod
    def _changed_to_data(self, z: Tensor, numbers: Sequence[Tensor]) -> WithLadj:
        """Hook: return x, and log(dx/dz) of each feature."""

    def _to_base(self, x: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        numbers = self._numbers(x, context)
        z, ladj = self._changed_to_base(x[..., self._changed], numbers)
        return x.index_copy(-1, self._changed, z), ladj.sum(-1)

    def _to_data(self, z: Tensor, context: Tensor | None, generator: Generator | None) -> WithLadj:
        numbers = self._numbers(z, context)
        x, ladj = self._changed_to_data(z[..., self._changed], numbers)
        return z.index_copy(-1, self._changed, x), ladj.sum(-1)

    def _contributions(self, x: Tensor, context: Tensor | None) -> Tensor:
        changed = x[..., self._changed]
        ladj = self._changed_to_base(changed, self._numbers(x, context))[1]
        return torch.zeros_like(x).index_copy(-1, self._changed, ladj)

    @property
    def _sees_all(self) -> bool:
        """Whether the conditioner takes and returns whole images."""
        return self.mask in _CHECKERBOARDS

    def _numbers(self, x: Tensor, context: Tensor | None) -> Sequence[Tensor]:
        """Return the parameters of the maps: a tensor ``(*batch, changed)`` for each."""
        if context is not None:
            context = context.expand(*x.shape[:-1], self.context_features)
        seen = x.index_fill(-1, self._changed, 0) if self._sees_all else x[..., self._given]
        numbers: Tensor = self.conditioner(seen, context).to(x.dtype)  # autocast lowers the dtype
        each = self.features if self._sees_all else len(self._changed)
        if numbers.shape != (*x.shape[:-1], self.numbers * each):
            raise ValueError(
                f"conditioner must return {self.numbers * each} numbers for each row, "
                f"{self.numbers} for each of {each} features; it returned shape "
                f"{tuple(numbers.shape)} for x of shape {tuple(x.shape)}."
            )
        numbers = numbers.unflatten(-1, (self.numbers, each))
        return (numbers[..., self._changed] if self._sees_all else numbers).unbind(-2)

    def _default_conditioner(self) -> nn.Module:
        if isinstance(self.shape, int):
            outputs = self.numbers * len(self._changed)
            return MLPConditioner(len(self._given), outputs, self.context_features)
        channels, height, width = self.shape
        given = channels if self._sees_all else len(self._given) // (height * width)
        changed = channels if self._sees_all else channels - given
        shape = (given, height, width)
        return ConvConditioner(shape, self.numbers * changed, self.context_features)

    def _check_sizes(self, conditioner: nn.Module) -> None:
        check_type("conditioner", conditioner, nn.Module, "MLPConditioner(2, 4)")
        if not isinstance(conditioner, MLPConditioner | ConvConditioner):
            return
        features = self.features if self._sees_all else len(self._given)
        for name, size in (("features", features), ("context_features", self.context_features)):
            if getattr(conditioner, name) != size:
                raise ValueError(
                    f"conditioner must take {name}={size}, with mask={self.mask!r} of "
                    f"{self.features} features and context_features={self.context_features}; "
                    f"it takes {name}={getattr(conditioner, name)}."
                )


class AdditiveCoupling(Coupling):
    """Additive coupling layer: ``z = x - loc(kept)``.

    It preserves volume: the ladj is 0. It takes the arguments of `Coupling`; the conditioner
    returns one number, loc, for each changed feature.

    References:
        Dinh, Krueger & Bengio (2015), NICE. https://arxiv.org/abs/1410.8516

    Example:
        >>> AdditiveCoupling(5).to_base(torch.ones(4, 5)).shape
        torch.Size([4, 5])
    """

    numbers = 1

    def _changed_to_base(self, x: Tensor, numbers: Sequence[Tensor]) -> WithLadj:
        (loc,) = numbers
        return x - loc, torch.zeros_like(x)

    def _changed_to_data(self, z: Tensor, numbers: Sequence[Tensor]) -> WithLadj:
        (loc,) = numbers
        return z + loc, torch.zeros_like(z)


class AffineCoupling(Coupling):
    r"""Affine coupling layer.

    .. math::
        z = (x - \mathrm{loc}) \, e^{-s}, \qquad s = c \tanh(r / c)

    where the conditioner returns loc of all changed features, then r of all changed features.
    ``s`` is about r where r is small, so a layer whose conditioner returns 0 is the identity.

    The bound c keeps scales between ``exp(-c)`` and ``exp(c)``. A small one, such as
    ``log(2) / 2``, makes the inverse stable near the data and some way beyond: it allows the same
    ratio of scales as a sigmoid with values from 0.5 to 1 (Behrmann et al., 2021), which is not the
    identity at the start. No bound holds everywhere, as the derivative by a kept feature grows with
    the changed one; the slopes of an `AdditiveCoupling` do not.

    Args:
        shape: As in `Coupling`, which documents the first four.
        context_features: Size of the context; 0 for none.
        conditioner: The network; None for the default.
        mask: The kept features: "first", "last", "even" or "odd".
        bound: The bound c, positive and finite.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a size or `bound` is out of range, or as `Coupling` raises it.

    References:
        Dinh, Sohl-Dickstein & Bengio (2017), Density Estimation Using Real NVP.
        https://arxiv.org/abs/1605.08803
        Behrmann et al. (2021), Understanding and Mitigating Exploding Inverses in Invertible Neural
        Networks. https://arxiv.org/abs/2006.09347

    Example:
        >>> conditioner = MLPConditioner(2, 2 * 3, hidden_features=(32,))
        >>> AffineCoupling(5, conditioner=conditioner).to_base(torch.ones(4, 5)).shape
        torch.Size([4, 5])
    """

    numbers = 2

    def __init__(
        self,
        shape: int | Sequence[int],
        context_features: int = 0,
        *,
        conditioner: nn.Module | None = None,
        mask: str = "first",
        bound: float = 3.0,
    ) -> None:
        super().__init__(shape, context_features, conditioner=conditioner, mask=mask)
        self.bound = check_number("bound", bound, "positive and finite", is_positive)

    def _changed_to_base(self, x: Tensor, numbers: Sequence[Tensor]) -> WithLadj:
        loc, raw = numbers
        log_scale = self.bound * (raw / self.bound).tanh()
        return (x - loc) * (-log_scale).exp(), -log_scale

    def _changed_to_data(self, z: Tensor, numbers: Sequence[Tensor]) -> WithLadj:
        loc, raw = numbers
        log_scale = self.bound * (raw / self.bound).tanh()
        return loc + log_scale.exp() * z, log_scale


def _kept_features(shape: tuple[int, int, int], mask: str) -> Tensor:
    """Return the mask of the kept features, ``(features,)``."""
    check_choice("mask", mask, _HALVES + _CHECKERBOARDS)
    channels, height, width = shape
    if mask in _HALVES:
        kept = (torch.arange(channels) < channels // 2)[:, None, None]
    else:
        kept = (torch.arange(height)[:, None] + torch.arange(width)) % 2 == 0
    return (kept if mask in ("first", "even") else ~kept).expand(shape).flatten()
