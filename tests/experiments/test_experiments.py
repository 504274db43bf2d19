"""Every experiment runs in its quick form and writes what it promises."""

import io
import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.distributions import MultivariateNormal

from cnf import History, load
from cnf.data.toy import toy_density
from cnf.metrics import bits_per_dim
from experiments import (
    ablation,
    accuracy,
    anode,
    compare,
    digits,
    digits_data,
    hybrid,
    recipe,
    stability,
    toy2d,
)

pytestmark = pytest.mark.usefixtures("quick_calibration")


@pytest.fixture(autouse=True)
def _single_precision():
    """As a user runs them."""
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def toy2d_run(tmp_path_factory):
    """The main job as a user starts it, in a process of its own: what it printed, its folder."""
    out = tmp_path_factory.mktemp("toy2d")
    command = [sys.executable, "-m", "experiments.toy2d", "--quick", "--no-progress"]
    settings = {"cwd": Path(__file__).parents[2], "capture_output": True, "text": True}
    done = subprocess.run(
        [*command, "--data", "rings", "--out", str(out)], check=True, timeout=120, **settings
    )
    assert done.stderr == ""
    return done.stdout, out / "quick" / "rings"


@pytest.mark.slow
def test_toy2d(toy2d_run):
    printed, folder = toy2d_run
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    metrics = toy2d.Metrics(**json.loads((folder / "metrics.json").read_text()))
    assert f"{metrics.kl_gap:.4f}" in printed
    history = History.load(folder / "history.csv")
    assert history.phase == [1] * 20 + [2] * 2
    held_out = toy_density("rings").sample(1000, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        nll = -load(folder / "model.safetensors").log_prob(held_out).mean()
    gaussian = MultivariateNormal(held_out.mean(0), held_out.T.cov())
    assert metrics.nll < -gaussian.log_prob(held_out).mean()
    assert abs(float(nll) - metrics.nll) < 8 * metrics.nll_standard_error
    assert metrics.kl_gap == pytest.approx(metrics.nll - toy_density("rings").entropy())
    assert metrics.likelihood == "exact"


@pytest.mark.slow
def test_recipe(tmp_path, capsys):
    runs = recipe.main(recipe.Settings(quick=True, out=tmp_path))
    assert [run["variant"] for run in runs] == list(recipe.VARIANTS)
    written = (tmp_path / "quick" / "table.md").read_text()
    assert written in capsys.readouterr().out
    by_name = {run["variant"]: run["gap"] for run in runs}
    assert f"| the recipe | {by_name['the recipe']:.3f} |" in written
    assert len(set(by_name.values())) > len(recipe.VARIANTS) // 2  # each does something else
    with pytest.raises(ValueError, match=r"variants must be among .*; got \['magic'\]"):
        recipe.Settings(variants=("magic",))


@pytest.mark.slow
def test_compare(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "STEPS_TRIED", 2)
    names = ("cnf", "glow", "maf", "planar", "residual")
    results = compare.main(compare.Settings(quick=True, out=tmp_path, flows=names))

    folder = tmp_path / "quick"
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "table.md").read_text() in capsys.readouterr().out
    assert json.loads((folder / "results.json").read_text())["results"] == list(
        map(asdict, results)
    )
    flows = {task: {r.flow for r in results if r.task == task} for task in ("8gaussians", "digits")}
    assert flows == {"8gaussians": {*names} - {"glow"}, "digits": {*names}}
    for result in results:
        assert math.isfinite(result.loss)
        assert result.round_trip < 0.1
        if result.task == "8gaussians":
            assert result.parameters < 5 * 500
    with pytest.raises(ValueError, match=r"flows must be among .*; got \['magic'\]"):
        compare.Settings(flows=("magic",))


@pytest.mark.slow
def test_accuracy(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cnf.diagnostics.checks._GRID", 21)
    (moons,) = accuracy.main(accuracy.Settings(quick=True, out=tmp_path))
    written = (tmp_path / "quick" / "table.md").read_text()
    assert capsys.readouterr().out.strip() in written
    assert f"| {moons.evaluations:.0f} | {moons.error_99:.1e} |" in written
    assert moons.error_99 <= moons.largest_error < 10 * moons.accuracy
    assert max(moons.round_trip, moons.neighbours) < 1e-3
    assert "tolerance" not in moons.failed
    file = tmp_path / "quick" / "moons.json"
    file.write_text(json.dumps({**asdict(moons), "evaluations": 123.0}))
    assert accuracy.main(accuracy.Settings(quick=True, out=tmp_path))[0].evaluations == 123.0


@pytest.mark.slow
def test_stability(tmp_path, capsys):
    densities, classifiers = stability.main(stability.Settings(quick=True, out=tmp_path))
    assert (tmp_path / "quick" / "table.md").read_text() in capsys.readouterr().out
    assert len({each.flow for each in densities}) == 7
    assert len({each.trained_by for each in classifiers}) == 4
    inverses = [(ring, 4.0) for each in densities for ring in each.rings]
    inverses += [(each.inverse, 2.0) for each in classifiers]
    for inverse, distance in inverses:  # new flows are near the identity, so stable everywhere
        assert inverse.round_trip < 0.01 * distance
        assert 0.2 < inverse.lipschitz < 5


def test_toy2d_from_the_command_line_refuses_what_it_does_not_know(run_program, capsys):
    with pytest.raises(SystemExit):
        run_program("experiments.toy2d", "--quick", "--data", "mooons")
    assert "pinwheel" in capsys.readouterr().err


@pytest.mark.slow
def test_anode(tmp_path, capsys):
    results = anode.main(anode.Settings(quick=True, out=tmp_path))

    assert (tmp_path / "quick" / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "quick" / "metrics.json").read_text()) == list(
        map(asdict, results)
    )
    found = {(result.task, result.augment): result for result in results}
    assert set(found) == {("swap", 0), ("swap", 1), ("annuli", 0), ("annuli", 1)}
    printed = capsys.readouterr().out
    assert all(f"{result.loss:.6g}" in printed for result in results)
    # The bound of an increasing map, up to the error of the solver.
    assert found["swap", 1].loss < 0.1 < 1 - 1e-3 < found["swap", 0].loss
    assert found["swap", 0].accuracy <= 0.5
    assert found["swap", 1].accuracy == 1
    assert all(found["annuli", augment].loss < math.log(2) for augment in (0, 1))


def test_the_annuli_are_a_ball_and_a_ring_of_equal_weight():
    x, target = anode.annuli(20_000, torch.Generator().manual_seed(0))
    radius, outside = x.norm(dim=-1), target[:, 0] > 0
    assert radius[~outside].max() <= 0.5
    assert (radius[outside] >= 1 - 1e-6).all()
    assert radius[outside].max() <= 1.5 + 1e-6
    assert abs(float(outside.double().mean()) - 0.5) < 4 * 0.5 / 20_000**0.5
    # Uniform on the disc and on the ring: the mean squared radius is the middle of its range.
    torch.testing.assert_close(radius[~outside].square().mean().item(), 0.125, rtol=0.03, atol=0)
    torch.testing.assert_close(radius[outside].square().mean().item(), 1.625, rtol=0.03, atol=0)
    assert x.mean(0).abs().max() < 4 / 20_000**0.5


def test_anode_refuses_counts_that_measure_nothing():
    with pytest.raises(ValueError, match="seeds must be at least 1; got 0"):
        anode.Settings(seeds=0)


@pytest.mark.slow
def test_ablation_goes_on_and_reports_what_it_measured(tmp_path, capsys):
    settings = ablation.Settings(quick=True, out=tmp_path)
    ((name, outcomes),) = ablation.main(settings).items()
    assert name == settings.data[0]
    assert len(outcomes) == 3 * 2
    folder = tmp_path / "quick"
    text = (folder / "table.md").read_text()
    assert text in capsys.readouterr().out
    _, held_out, truth = ablation.data_of(name, replace(settings, rows=200, held_out=50))
    gap = truth - torch.tensor(outcomes[0].log_prob, dtype=torch.float64)
    assert f"| recipe | none | {gap.mean():.3f} ± {gap.std() / 50**0.5:.3f} | - |" in text
    torch.testing.assert_close(truth, toy_density(name).log_prob(held_out.x), rtol=0, atol=0)
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")

    records = sorted((folder / name).iterdir())
    records[0].unlink()
    stamps = {path: path.stat().st_mtime_ns for path in records[2:]}
    again = ablation.main(settings)[name]
    assert [each.log_prob for each in again] == [each.log_prob for each in outcomes]
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_ablation_refuses_unknown_sets():
    with pytest.raises(ValueError, match=r"data must be among .* got \['mooons'\]"):
        ablation.Settings(data=("mooons",))


def any_digits(rows, *, seed=0):
    return np.random.default_rng(seed).integers(0, digits_data.LEVELS, (rows, 8, 8))


def digits_file(folder, **changes):
    arrays = {"x_train": any_digits(80), "x_val": any_digits(5), "x_test": any_digits(5), **changes}
    np.savez(folder / "digits.npz", **{k: v for k, v in arrays.items() if v is not None})
    return folder / "digits.npz"


@pytest.mark.slow
def test_digits(tmp_path, capsys):
    metrics = digits.main(digits.Settings(quick=True, out=tmp_path, progress=False))

    assert (tmp_path / "quick" / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "quick" / "metrics.json").read_text()) == asdict(metrics)
    assert str(metrics.bound) in capsys.readouterr().out
    history = History.load(tmp_path / "quick" / "history.csv")
    assert history.step == [1, 2, 3, 4]
    flow = load(tmp_path / "quick" / "model.safetensors")
    assert metrics.likelihood == flow.likelihood == "lower_bound"
    test = digits_data.read_scikit_learn().test[:16]
    with torch.no_grad():
        again, tighter = (
            bits_per_dim(
                flow.log_prob(
                    test, importance_samples=count, generator=torch.Generator().manual_seed(9)
                ),
                64,
            )
            for count in (1, metrics.importance_samples)
        )
    # The images are the same, so that only the noise of the pixels differs.
    assert abs(float(again.mean()) - metrics.bound.mean) < metrics.bound.standard_error
    difference = abs(float(tighter.mean()) - metrics.tighter_bound.mean)
    assert difference < metrics.tighter_bound.standard_error
    assert metrics.gaussian_of_logits.mean < metrics.bound.mean < metrics.gaussian_of_pixels.mean


@pytest.mark.slow
def test_digits_of_a_file_from_the_command_line(run_program, tmp_path, capsys):
    arguments = ["--quick", "--no-progress", "--out", tmp_path / "out", "--data"]
    file = digits_file(tmp_path)
    run_program("experiments.digits", *arguments, file)
    assert "lower_bound" in capsys.readouterr().out
    assert (tmp_path / "out" / "quick" / "figure.png").is_file()
    digits_file(tmp_path, x_test=None)
    with pytest.raises(SystemExit, match=r"^digits: [^\n]*x_test[^\n]*$"):
        run_program("experiments.digits", *arguments, file)


@pytest.mark.slow
def test_one_flow_classifies_digits_and_is_a_density_and_a_generator(tmp_path, capsys):
    metrics = hybrid.main(hybrid.Settings(quick=True, out=tmp_path, progress=False))

    folder = tmp_path / "quick"
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "metrics.json").read_text()) == asdict(metrics)
    assert metrics.accuracy > 0.5  # a chance is 0.1
    assert abs(metrics.bits.mean - metrics.bits_without_labels.mean) < 0.1
    assert str(metrics.bits) in capsys.readouterr().out
    test = digits_data.read_scikit_learn().test
    again = hybrid.bits_of(load(folder / "model.safetensors"), test, seed=9)
    assert again.mean == pytest.approx(metrics.bits.mean, abs=metrics.bits.standard_error)


def test_labels_belong_to_the_images(tmp_path):
    images, labels = digits_data.read_scikit_learn(), digits_data.read_labels(None)
    known = {tuple(x.tolist()): y for x, y in zip(*load_digits(return_X_y=True), strict=True)}
    for part, of in zip(images, labels, strict=True):
        assert [known[tuple(image.flatten().tolist())] for image in part] == of.tolist()
    arrays = {"y_train": [0, 9], "y_val": [1], "y_test": [2]}
    np.savez(tmp_path / "labels.npz", **{k: np.array(v, np.uint8) for k, v in arrays.items()})
    read = digits_data.read_labels(tmp_path / "labels.npz")
    assert [part.tolist() for part in read] == list(arrays.values())
    assert read.train.dtype == torch.int64


@pytest.mark.parametrize("labels", [[0, 10], [[1]], [0.5]], ids=str)
def test_other_labels_are_refused(tmp_path, labels):
    np.savez(tmp_path / "labels.npz", y_train=labels, y_val=[1], y_test=[2])
    with pytest.raises(ValueError, match="y_train must hold a label from 0 to 9 for each image"):
        digits_data.read_labels(tmp_path / "labels.npz")


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float64])
def test_digits_are_read_as_they_are(tmp_path, dtype):
    images = any_digits(80).astype(dtype)
    read = digits_data.read(digits_file(tmp_path, x_train=images))
    assert [tuple(part.shape) for part in read] == [(80, 1, 8, 8), (5, 1, 8, 8), (5, 1, 8, 8)]
    assert (read.train[:, 0].numpy() == images).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_val": None}, r"must be an .npz file with the arrays .*x_val"),
        ({"x_train": any_digits(80).reshape(80, 64)}, r"x_train .*got \(80, 64\)"),
        ({"x_train": any_digits(64)}, r"x_train .*at least 65 rows; got \(64, 8, 8\)"),
        ({"x_test": any_digits(1)}, r"x_test .*at least 2 rows"),
        ({"x_val": any_digits(5) + 1}, r"x_val must hold integers from 0 to 16"),
        ({"x_val": any_digits(5) - 1}, r"x_val must hold integers"),
        ({"x_val": any_digits(5) / 2}, r"x_val must hold integers"),
        ({"x_val": np.full((5, 8, 8), np.nan)}, r"x_val must hold integers"),
    ],
)
def test_other_digits_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        digits_data.read(digits_file(tmp_path, **changes))


def test_what_is_no_file_of_digits_is_refused(tmp_path):
    file = digits_file(tmp_path)
    one_array = io.BytesIO()
    np.save(one_array, any_digits(80))
    for content in (b"", b"garbage", file.read_bytes()[:5000], one_array.getvalue()):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"digits.npz' must be an .npz file"):
            digits_data.read(file)
    with pytest.raises(FileNotFoundError, match=r"absent\.npz"):
        digits_data.read(tmp_path / "absent.npz")


def test_the_digits_of_scikit_learn_are_parted_without_loss():
    parts = digits_data.read_scikit_learn()
    assert [len(part) for part in parts] == [1297, 200, 300]
    images = torch.cat(parts).flatten(1).numpy()
    everything = load_digits().data
    assert (np.unique(images, axis=0) == np.unique(everything, axis=0)).all()
    assert len(np.unique(everything, axis=0)) == len(images)


def test_without_scikit_learn_digits_say_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn, or name a file by"):
        digits_data.read_scikit_learn()


def test_the_gaussian_of_noisy_pixels_has_its_entropy():
    # In each image two values, one above the other, and no others: with unit noise, 32 pairs of
    # pixels of covariance [[a, c], [c, a]] each, where a = c + 1/12 and c is the variance of a
    # uniform integer.
    columns = np.random.default_rng(0).integers(0, digits_data.LEVELS, (60_000, 32))
    images = torch.as_tensor(columns.repeat(2, axis=-1), dtype=torch.float32).reshape(-1, 1, 8, 8)
    parts = digits_data.Digits(images[:30_000], images[:2], images[30_000:])
    pixels = digits.pixels_as_reals()[:2]
    log_prob = digits.gaussian_log_prob(pixels, parts, torch.Generator().manual_seed(0))
    c, noise = (digits_data.LEVELS**2 - 1) / 12, 1 / 12
    determinant = (c + noise) ** 2 - c**2
    entropy = 0.5 * math.log2((2 * math.pi * math.e) ** 2 * determinant) / 2
    assert digits.Bits.of(log_prob).mean == pytest.approx(entropy, abs=2e-3)


def test_a_mosaic_shows_the_first_images_row_by_row():
    images = torch.arange(1.0, 6).view(5, 1, 1, 1).expand(5, 1, 8, 8)
    picture = digits.mosaic(images, 2)
    assert picture.shape == (18, 18)
    assert picture[::9, ::9].tolist() == [[1, 2], [3, 4]]
    assert picture[7::9, 7::9].tolist() == [[1, 2], [3, 4]]
    assert (picture[8::9] == 0).all()
    assert (picture[:, 8::9] == 0).all()
