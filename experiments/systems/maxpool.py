"""Multi-scale flows of digits, by max pooling and by slicing.

After some coupling steps three quarters of the numbers are dropped, and modelled given the rest.
`Slice` keeps a quarter of the channels, with Gaussians for the others; `MaxPool2d` keeps the
largest number of each square, with Gaussians for the others' distances before a softplus. All else
is equal. The paper finds both nearly as good, with large flows of CIFAR-10.

Claim: both learn the digits; on so small a flow max pooling costs likelihood, because the place of
a maximum is a fair draw: log 4 for each square, 0.5 bits per dimension, if the image tells it.
References: Nielsen et al. (2020), SurVAE Flows, section 4.3. https://arxiv.org/abs/2007.02731
"""

import torch
from torch.distributions import SoftplusTransform

from benchmarks.timing import markdown
from cnf.adapters import FromTorch
from cnf.bases import ConditionalNormal
from cnf.plots import figure_grid, save_figure
from cnf.plots.figures import TITLE_SIZE
from cnf.transforms import ActNorm, MaxPool2d, Slice, Squeeze, Transform, TransformedBase
from experiments.digits_fit import HEADINGS, IMAGE, PIXELS, coupling_steps, digits, fit_digits
from experiments.systems.settings import Settings

KEPT = PIXELS // 4
HIDDEN = (32, 32)


def reductions() -> dict[str, list[Transform]]:
    """The two ways from an image of shape (4, 4, 4) to one of shape (4, 2, 2)."""
    others = PIXELS - KEPT
    normal = [ConditionalNormal(others, KEPT, hidden_features=(64,)) for _ in range(2)]
    distances = TransformedBase([FromTorch(SoftplusTransform(), others)], normal[0])
    return {
        "slicing": [Squeeze((4, 4, 4)), Slice(PIXELS, KEPT, dropped=normal[1])],
        "max pooling": [MaxPool2d((4, 4, 4), offsets=distances)],
    }


def show(settings: Settings) -> str:
    """Train both flows, and draw from them."""
    images = digits(settings.data)
    torch.manual_seed(settings.seed)
    rows, draws = [], {"data": images.test[:20]}
    for name, reduction in reductions().items():
        torch.manual_seed(settings.seed)
        body = [
            Squeeze(IMAGE),
            *coupling_steps((4, 4, 4), 4, HIDDEN),
            *reduction,
            *coupling_steps((4, 2, 2), 4, HIDDEN),
            ActNorm((4, 2, 2)),
        ]
        steps = settings.choose(1000, 4)
        fitted = fit_digits(body, images, steps=steps, seed=settings.seed)
        rows.append(fitted.row(name))
        generator = torch.Generator().manual_seed(settings.seed)
        draws[name] = fitted.flow.sample(20, generator=generator)
    figure, (axes,) = figure_grid(1, len(draws))
    for ax, (title, each) in zip(axes, draws.items(), strict=True):
        ax.imshow(each.reshape(4, 5, 8, 8).transpose(1, 2).reshape(32, 40), cmap="gray_r")
        ax.set_title(title, fontsize=TITLE_SIZE)
        ax.set_axis_off()
    save_figure(figure, settings.out / "maxpool.png")
    return markdown(HEADINGS, rows)
