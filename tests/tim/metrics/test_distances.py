"""Distances equal torch-fidelity's on the same features, and the dense formulas; they have the properties of distances."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tim.metrics.features import features
from tim.metrics import kernels
from tim.metrics.distances import (
    METRICS,
    frechet_distance,
    kernel_distance,
    precision_recall,
    rbf_distance,
    sliced_wasserstein,
)

SHAPES = [(40, 40, 16), (30, 50, 64), (120, 90, 8), (64, 64, 64)]
COUNTS = st.tuples(st.integers(5, 24), st.integers(5, 24), st.integers(2, 12), st.integers(0, 10**6))


@pytest.mark.parametrize(("n", "m", "width"), SHAPES)
def test_frechet_is_that_of_torch_fidelity(n: int, m: int, width: int) -> None:
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    real, generated = features(n, width, seed=0), features(m, width, seed=1, shift=0.3, scale=1.2)
    statistics = [fid.fid_features_to_statistics(each) for each in (real, generated)]
    expected = fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(real.float(), generated.float()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("n", "m", "size"), [(60, 60, 60), (60, 45, 20), (45, 60, 45)])
def test_kernel_distance_is_that_of_torch_fidelity(n: int, m: int, size: int) -> None:
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    real, generated = features(n, 32, seed=0), features(m, 32, seed=1, shift=0.3)
    options = {"kid_subsets": 7, "kid_subset_size": size, "verbose": False}
    expected = kid.kid_features_to_metric(generated, real, **options)["kernel_inception_distance_mean"]
    assert kernel_distance(real, generated, subsets=7, subset_size=size) == pytest.approx(expected, rel=1e-9)


def test_gaussian_kernel_distance_is_that_of_torch_fidelity() -> None:
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    real, generated = (torch.nn.functional.normalize(features(40, 32, seed=seed, shift=seed / 4), dim=1) for seed in (0, 1))
    pairs = [kid.kernel_rbf(a.numpy(), b.numpy(), kid_kernel_rbf_sigma=10) for a, b in ((real, real), (real, generated), (generated,) * 2)]
    assert rbf_distance(3 * real, generated) == pytest.approx(1000 * kid.mmd2(*pairs, mmd_est="biased"), rel=1e-6)


@pytest.mark.parametrize(("n", "m", "width"), SHAPES)
def test_precision_and_recall_are_those_of_torch_fidelity(n: int, m: int, width: int) -> None:
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    real, generated = features(n, width, seed=0), features(m, width, seed=1, scale=0.8)
    found = prc.prc_features_to_metric(generated, real, verbose=False)
    precision, recall = precision_recall(real, generated)
    assert (precision, recall) == pytest.approx((found["precision"], found["recall"]), abs=1e-6)
    assert 0 < precision < 1 or width == 64
    assert METRICS["precision"].compute(real, generated) == precision
    assert METRICS["recall"].compute(real, generated) == recall


def test_sliced_wasserstein_of_normal_distributions() -> None:
    """On a line the squared distance of N(a, s²) and N(b, t²) is (a − b)² + (s − t)²."""
    width = 8
    real, generated = features(2000, width, seed=0), 1.5 * features(2000, width, seed=1) + 0.4
    shift = 0.4**2  # over directions, the mean of (0.4 Σ u)²
    assert sliced_wasserstein(real, generated) == pytest.approx(3 * width * (shift + 0.5**2), rel=0.05)


def test_sliced_wasserstein_of_unequal_counts_is_that_of_repeated_images() -> None:
    real, generated = features(6, 4, seed=0), features(9, 4, seed=1, shift=0.5)
    expected = sliced_wasserstein(real.repeat_interleave(3, dim=0), generated.repeat_interleave(2, dim=0))
    assert sliced_wasserstein(real, generated) == pytest.approx(expected, rel=1e-12)


@given(counts=COUNTS)
@settings(max_examples=25, deadline=None)
def test_frechet_is_the_dense_formula(counts: tuple[int, int, int, int]) -> None:
    n, m, width, seed = counts
    real, generated = features(n, width, seed=seed), features(m, width, seed=seed + 1, shift=0.5, scale=0.7)
    covariances = [torch.cov(each.T).view(width, width) for each in (real, generated)]
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    expected = (real.mean(0) - generated.mean(0)).square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * cross
    assert frechet_distance(real, generated) == pytest.approx(float(expected), rel=1e-5, abs=1e-6)


@given(counts=COUNTS, name=st.sampled_from(sorted(METRICS)))
@settings(max_examples=60, deadline=None)
def test_properties_of_distances(counts: tuple[int, int, int, int], name: str) -> None:
    n, m, width, seed = counts
    metric = METRICS[name]
    real, generated = features(n, width, seed=seed), features(m, width, seed=seed + 1, shift=0.5)
    value = metric.compute(real, generated)
    assert math.isfinite(value)
    shuffled = real[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
    assert metric.compute(shuffled, generated) == pytest.approx(value, rel=1e-6, abs=1e-7)
    assert metric.subsets(real, generated)(torch.arange(n), torch.arange(m)) == pytest.approx(value, rel=1e-5, abs=1e-6)
    if metric.better == "lower":
        assert metric.compute(generated, real) == pytest.approx(value, rel=1e-6, abs=1e-7)
        assert metric.compute(real, real) <= 1e-6, "0, or less where the estimate is unbiased"


@given(counts=COUNTS)
@settings(max_examples=20, deadline=None)
def test_rotations_and_scales(counts: tuple[int, int, int, int]) -> None:
    n, m, width, seed = counts
    real, generated = features(n, width, seed=seed), features(m, width, seed=seed + 1, shift=0.5)
    rotation = torch.linalg.qr(features(width, width, seed=seed + 2)).Q
    for name in ("frechet", "kernel", "rbf"):
        value = METRICS[name].compute(real, generated)
        assert METRICS[name].compute(real @ rotation, generated @ rotation) == pytest.approx(value, rel=1e-5, abs=1e-6)
    for name, power in (("frechet", 2), ("sliced", 2), ("rbf", 0)):
        value = METRICS[name].compute(real, generated)
        assert METRICS[name].compute(3 * real, 3 * generated) == pytest.approx(3**power * value, rel=1e-5, abs=1e-5)
    moved = METRICS["frechet"].compute(real + 7, generated + 7)
    assert moved == pytest.approx(METRICS["frechet"].compute(real, generated), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", sorted(METRICS))
def test_equal_and_degenerate_sets(name: str) -> None:
    metric, real = METRICS[name], features(20, 6, seed=0)
    equal = metric.compute(real, real.clone())
    if math.isfinite(metric.bounds[0]):
        assert equal == pytest.approx(1.0 if metric.better == "higher" else 0.0, abs=1e-5)
    else:
        assert equal < 0  # unbiased: the pairs across the sets have images with themselves, those within have not
    for first, second in (
        (torch.ones(8, 6), torch.ones(8, 6)),
        (torch.zeros(8, 6), torch.zeros(5, 6)),
        (real[:1].repeat(8, 1), real),
        (real.repeat(2, 1), real),
    ):
        assert math.isfinite(metric.compute(first, second))


@pytest.mark.parametrize("name", sorted(METRICS))
def test_features_of_any_precision(name: str) -> None:
    real, generated = features(20, 6, seed=0), features(16, 6, seed=1, shift=0.5)
    exact = METRICS[name].compute(real, generated)
    assert METRICS[name].compute(real.float(), generated.float()) == pytest.approx(exact, rel=1e-5, abs=1e-6)
    assert METRICS[name].compute(real.half(), generated.half()) == pytest.approx(exact, rel=0.05, abs=0.01)


def test_kernel_values_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    real, generated = features(33, 7, seed=0), features(21, 7, seed=1, shift=0.2)
    whole = [compute(real, generated) for compute in (kernel_distance, rbf_distance)]
    monkeypatch.setattr(kernels, "_BLOCK", 8)
    assert [compute(real, generated) for compute in (kernel_distance, rbf_distance)] == pytest.approx(whole, rel=1e-9)


def test_frechet_of_many_images_is_computed_in_blocks() -> None:
    real, generated = features(100, 5, seed=0), features(57, 5, seed=1, shift=0.4)  # a block is 20 images
    wide = [torch.nn.functional.pad(each, (0, 200)) for each in (real, generated)]  # as many images as this fit into one
    assert frechet_distance(real, generated) == pytest.approx(frechet_distance(wide[0], wide[1]), rel=1e-6)


@pytest.mark.parametrize("compute", [frechet_distance, kernel_distance, rbf_distance, sliced_wasserstein, precision_recall])
def test_what_cannot_be_compared_is_named(compute: Callable[[Tensor, Tensor], object]) -> None:
    good = features(8, 4, seed=0)
    for real, generated, said in (
        (good[:1], good, "real features: a distance needs at least"),
        (good, good[:, :3], "real images have 4 features, generated ones 3"),
        (good, good * float("nan"), "generated features: some are not finite"),
        (good[0], good, r"real features: expected floats \(images, width\)"),
        (good.long(), good, r"real features: expected floats \(images, width\)"),
    ):
        with pytest.raises(ValueError, match=said):
            compute(real, generated)


def test_names_say_which_features_they_are_of() -> None:
    kinds = {name: METRICS[name].features for name in METRICS}
    assert kinds.pop("cmmd") == "clip"
    assert kinds.pop("fdd") == "dinov2"
    assert [kinds.pop(name) for name in ("fid", "kid", "mind")] == ["inception"] * 3
    assert set(kinds.values()) == {None}
    assert METRICS["fid"].least == 2048
