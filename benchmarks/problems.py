"""The balancing problems that the solvers are timed on: simulated, and the same in every run.

Half of the covariates are normal and half are binary, all are standardised. Clusters have gamma distributed sizes."""

import numpy as np

from clusterweights.qp import BlockSums, Constraint, Problem, exact_means, exact_totals


def cluster_sizes(rng, n, n_clusters, spread):
    "Sizes ≥ 1 that add up to n. spread : their coefficient of variation."
    share = rng.gamma(1 / spread**2, size=n_clusters)
    return 1 + rng.multinomial(n - n_clusters, share / share.sum())


def covariates(rng, n, d):
    "(n, d), every other column binary. In place, since n may be in the millions."
    x = rng.normal(size=(n, d))
    for column in x[:, 1::2].T:
        np.greater(column, 0, out=column)
    return x


def standardise(x, mean, sd):
    "x becomes (x − mean) / sd in place."
    x -= mean
    x /= sd


def starts_of(sizes): return np.r_[0, np.cumsum(sizes)]


def hierarchical(n, n_clusters, d, tolerance=0.0, lam=1.0, seed=0):
    """Each cluster's imbalance small, global balance exact or within `tolerance` standard deviations, each cluster's total exact.

    n : number of controls. There are about 0.35 treated for each, at least one in every cluster."""
    rng = np.random.default_rng(seed)
    sizes = cluster_sizes(rng, n, n_clusters, 0.5)
    treated = np.maximum(1, rng.poisson(0.35 * sizes))
    x, starts = covariates(rng, n, d), starts_of(sizes)
    mean = np.add.reduceat(covariates(rng, treated.sum(), d), starts_of(treated)[:-1]) / treated[:, None]
    mean += 0.1 * rng.normal(size=d)                                           # the treated differ
    centre, sd = x.mean(axis=0), np.sqrt(np.array([column.var() for column in x.T]))
    standardise(x, centre, sd)
    standardise(mean, centre, sd)
    total = treated.astype(float)
    return Problem(BlockSums(x, starts, 1 / total), mean, np.repeat(lam / total**2, sizes),
                   (exact_means(x, mean, total, spread=np.ones(d), tolerance=tolerance), exact_totals(starts, total)))


def mundlak(n, n_clusters, d, n_cluster_covariates, average_to_one=False, lam=1.0, seed=0):
    """All products of d covariates with cluster covariates balanced approximately, and both balanced exactly, over everybody.

    Cluster covariates are the covariates' means, the share of treated, and others. average_to_one : one exact total for each
    cluster instead of one for all."""
    rng = np.random.default_rng(seed)
    sizes = cluster_sizes(rng, n, n_clusters, 0.5)
    treated = np.maximum(1, rng.poisson(0.35 * sizes))
    both = sizes + treated
    starts, cluster = starts_of(both), np.repeat(np.arange(n_clusters), both)
    z = np.arange(both.sum()) - starts[cluster] >= sizes[cluster]
    x = covariates(rng, len(z), d) + 0.1 * z[:, None]
    standardise(x, x.mean(axis=0), x.std(axis=0))
    means = np.add.reduceat(x, starts[:-1]) / both[:, None]
    s = np.column_stack([means, treated / both, rng.normal(size=(n_clusters, n_cluster_covariates - d - 1))])[cluster]
    standardise(s, s.mean(axis=0), s.std(axis=0))
    products = (x[:, :, None] * s[:, None, :]).reshape(len(z), -1)
    standardise(products, products.mean(axis=0), products.std(axis=0))
    exact, n1 = np.column_stack([s, x]), float(z.sum())
    everybody = np.array([0, n])
    return Problem(BlockSums(products[~z], everybody, np.array([1 / n1])), products[z].mean(axis=0)[None], np.full(n, lam / n1**2),
                   (Constraint(BlockSums(exact[~z], everybody, np.ones(1)), exact[z].sum(axis=0)[None], "global balance",
                               range(exact.shape[1]), unit=n1),
                    exact_totals(starts_of(sizes), treated.astype(float)) if average_to_one else exact_totals(everybody, np.array([n1]))))


def whole_clusters(n, n_clusters, d, icc, lam=1.2, seed=0):
    """About three in ten clusters treated as a whole; approximate balance over everybody, and a penalty on the total of each control cluster.

    n : all units, treated ones included. icc : the share of the noise that clusters have in common, 0 ≤ icc < 1."""
    rng = np.random.default_rng(seed)
    sizes = cluster_sizes(rng, n, n_clusters, 0.6)
    u = rng.normal(size=(n_clusters, d))
    treated = rng.random(n_clusters) < 1 / (1 + np.exp(1 - 0.3 * u[:, :5].sum(axis=1)))
    x = covariates(rng, n, d) + 0.5 * np.repeat(u, sizes, axis=0)
    standardise(x, x.mean(axis=0), x.std(axis=0))
    z = np.repeat(treated, sizes)
    n1, starts = float(z.sum()), starts_of(sizes[~treated])
    n0 = starts[-1]
    everybody = np.array([0, n0])
    return Problem(BlockSums(x[~z], everybody, np.array([1 / n1])), x[z].mean(axis=0)[None], np.full(n0, lam * (1 - icc) / n1**2),
                   (exact_totals(everybody, np.array([n1])),),
                   total_penalty=BlockSums(np.ones((n0, 1)), starts, np.full(len(starts) - 1, np.sqrt(lam * icc) / n1)))
