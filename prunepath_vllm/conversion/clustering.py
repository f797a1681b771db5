"""Balanced k-means: neurons into experts of exactly equal size."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ITERATIONS = 30
FIRST_EPSILON, LAST_EPSILON = 1.0, 0.3
"""Bid increments of the auction, in standard deviations of the similarities. Finer ones cost rounds and, measured on
SmolLM2-135M, win nothing that the next iteration does not."""


def balanced_kmeans(features: Tensor, num_clusters: int, *, generator: torch.Generator) -> Tensor:
    """Group vectors into clusters of exactly equal size around their mean directions.

    Vectors are L2-normalised, so minimising the distance to the centroids is the same as maximising the cosines within
    clusters: on activation profiles this is also a balanced partition of the co-activation graph.

    Each iteration compares every vector with the centroids *without its own share* (its own weight, 1 / cluster size,
    is most of the cosine in high dimensions and pins plain k-means to where it starts), then solves the assignment
    by auction with prices kept from the iteration before. The best iteration is returned.

    Args:
        features: [n, d], any float dtype, on the device to compute on; n a multiple of `num_clusters`.
        num_clusters: number of clusters.
        generator: CPU generator for the start; equal states give equal results.

    Returns:
        int64 [n] on the CPU: the cluster of each vector.
    """
    x = F.normalize(features.float(), dim=1)
    n = x.shape[0]
    size = n // num_clusters
    clusters = torch.empty(n, dtype=torch.int64)
    clusters[torch.randperm(n, generator=generator)] = torch.arange(n) // size
    if size == 1 or num_clusters == 1:
        return clusters
    clusters = clusters.to(x.device)
    sums = _sum_by_cluster(x, clusters, num_clusters)
    prices = np.zeros(num_clusters, dtype=np.float32)
    best, best_cohesion = clusters, _cohesion(sums)
    for epsilon in np.geomspace(FIRST_EPSILON, LAST_EPSILON, ITERATIONS):
        similarity = x @ sums.T / size
        own = similarity.gather(1, clusters[:, None])
        similarity.scatter_(1, clusters[:, None], (own * size - 1) / (size - 1))
        step = max(float(epsilon * similarity.std()), 1e-6)  # identical vectors have no spread
        assigned, prices = balanced_assignment(similarity.cpu().numpy(), prices, step)
        clusters = torch.from_numpy(assigned).to(x.device)
        sums = _sum_by_cluster(x, clusters, num_clusters)
        cohesion = _cohesion(sums)
        if cohesion > best_cohesion:
            best, best_cohesion = clusters, cohesion
    return best.cpu()


def balanced_assignment(value: np.ndarray, prices: np.ndarray, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """Assign n rows to E columns, n / E rows each, maximising the total value: Bertsekas' auction.

    Every unassigned row bids for the column it likes best at current prices, as much more as its second choice would
    let it; a column keeps its n / E highest bidders, and its price becomes the lowest of their bids. The total is
    within n * `epsilon` of the optimum, whatever the prices at the start.

    Args:
        value: float32 [n, E], E > 1.
        prices: float32 [E], zeros or the prices of a similar problem.
        epsilon: smallest raise, > 0.

    Returns:
        int64 [n], the column of each row; float32 [E], the prices, lowest 0.
    """
    n, num_columns = value.shape
    capacity = n // num_columns
    column = np.full(n, -1)  # -1 also indexes the spare last entry of `contested`
    bid = np.zeros(n, dtype=np.float32)
    prices = prices.copy()
    while (free := np.flatnonzero(column < 0)).size:
        net = value[free] - prices
        rows, first = np.arange(free.size), net.argmax(axis=1)
        top = net[rows, first]
        net[rows, first] = -np.inf
        column[free] = first
        bid[free] = prices[first] + (top - net.max(axis=1) + epsilon)

        contested = np.zeros(num_columns + 1, dtype=bool)
        contested[first] = True
        bidders = np.flatnonzero(contested[column])
        bidders = bidders[np.lexsort((-bid[bidders], column[bidders]))]
        counts = np.bincount(column[bidders], minlength=num_columns)
        starts = counts.cumsum() - counts
        rank = np.arange(bidders.size) - starts[column[bidders]]
        column[bidders[rank >= capacity]] = -1
        full = np.flatnonzero(counts >= capacity)
        prices[full] = bid[bidders[starts[full] + capacity - 1]]
    return column, prices - prices.min()


def _sum_by_cluster(x: Tensor, clusters: Tensor, num_clusters: int) -> Tensor:
    # Members in order, then one reduction: unlike index_add_ on CUDA, deterministic.
    members = clusters.argsort(stable=True).view(num_clusters, -1)
    return torch.stack([x[rows].sum(dim=0) for rows in members])


def _cohesion(sums: Tensor) -> float:
    """Sum of cosines within clusters; k-means' inertia is n - cohesion / cluster size."""
    return float(sums.double().square().sum())
