"""Balanced k-means against an independent solver, an exact assignment and a random grouping."""

import numpy as np
import pytest
import torch
from k_means_constrained import KMeansConstrained
from scipy.optimize import linear_sum_assignment

from prunepath_vllm.conversion.clustering import balanced_assignment, balanced_kmeans


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inertia(features: torch.Tensor, clusters: torch.Tensor) -> float:
    """Sum of squared distances of the normalised vectors to their centroids."""
    x = (features / features.norm(dim=1, keepdim=True)).double()
    return sum(float((x[clusters == c] - x[clusters == c].mean(dim=0)).square().sum()) for c in clusters.unique())


@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0], ids=["planted", "blurred", "noise"])
def test_inertia_is_at_least_as_good_as_an_independent_solver(spread):
    rng = generator(1)
    directions = torch.randn(12, 48, generator=rng)
    features = directions.repeat_interleave(16, dim=0) + spread * torch.randn(192, 48, generator=rng)
    ours = inertia(features, balanced_kmeans(features, 12, generator=generator()))
    unit = torch.nn.functional.normalize(features, dim=1).numpy()
    theirs = KMeansConstrained(12, size_min=16, size_max=16, n_init=3, random_state=0).fit(unit).inertia_
    assert ours <= 1.01 * theirs + 1e-3


@pytest.mark.parametrize(
    ("n", "num_clusters", "width"), [(96, 3, 7), (256, 8, 64), (60, 60, 5), (64, 1, 8), (510, 2, 3)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_clusters_have_exactly_equal_sizes(n, num_clusters, width, dtype):
    features = torch.randn(n, width, generator=generator(2)).to(dtype)
    clusters = balanced_kmeans(features, num_clusters, generator=generator())
    assert clusters.bincount(minlength=num_clusters).tolist() == [n // num_clusters] * num_clusters


@pytest.mark.parametrize("value", [0.0, 1.0], ids=["zero", "identical"])
def test_degenerate_vectors_still_balance(value):
    clusters = balanced_kmeans(torch.full((64, 8), value), 4, generator=generator())
    assert clusters.bincount().tolist() == [16] * 4


def test_deterministic_for_a_seed_and_seeds_differ():
    features = torch.randn(128, 16, generator=generator(3))
    first, again, other = (balanced_kmeans(features, 8, generator=generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_scale_of_a_vector_does_not_matter():
    features = torch.randn(128, 16, generator=generator(4))
    scales = 2.0 ** torch.randint(-6, 7, (128, 1), generator=generator(5))
    first, scaled = (balanced_kmeans(x, 8, generator=generator()) for x in (features, features * scales))
    assert torch.equal(first, scaled)


@pytest.mark.parametrize("start", [0.0, 2.0], ids=["cold", "warm"])
def test_assignment_is_within_its_bound_of_the_optimum(start):
    rng = np.random.default_rng(0)
    value = rng.normal(size=(60, 5)).astype(np.float32)
    prices = (start * rng.random(5)).astype(np.float32)
    columns, _ = balanced_assignment(value, prices, 1e-3)
    assert np.bincount(columns).tolist() == [12] * 5
    rows, slots = linear_sum_assignment(np.repeat(value, 12, axis=1), maximize=True)
    best = np.repeat(value, 12, axis=1)[rows, slots].sum()
    assert best - 60 * 1e-3 - 1e-3 <= value[np.arange(60), columns].sum() <= best + 1e-3
