"""Does the agreement test keep its size, and does it find what it should? Hierarchical against Mundlak weights (global balance).

Run: python benchmarks/agreement.py [--reps 1000] [--draws 99] [--jobs 2]. Writes benchmarks/agreement.md.

Size: clusters differ in level, confounded with treatment, which both methods handle; effects are 0. Power: the outcome's slope on the first covariate differs between clusters and goes with
the slope of treatment, which no statistic of the cluster shows; Mundlak weights are then biased, hierarchical ones less so. Share of tests with p < .05."""

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

import clusterweights as cw


def pupils(rng, slopes, n_clusters=40, size=40):
    "Units in clusters whose level, and with `slopes` their slope, goes with both treatment and outcome."
    g = np.repeat(np.arange(n_clusters), size)
    level, slope = rng.normal(size=n_clusters), slopes * rng.normal(size=n_clusters)
    x = rng.normal(size=(len(g), 3)) + 0.3 * level[g, None]
    z = rng.random(len(g)) < 1 / (1 + np.exp(0.7 - 0.4 * x[:, 0] - 0.3 * x[:, 1] - 0.4 * level[g] - slope[g] * x[:, 0]))
    y = x @ [1.0, 0.5, 0.0] + level[g] + slope[g] * x[:, 0] + rng.normal(size=len(g))
    data = pd.DataFrame(x, columns=["x1", "x2", "x3"]).assign(cluster=g, treat=z.astype(int), y=y)
    return cw.Study(data, treat="treat", outcome="y", cluster="cluster", covs=["x1", "x2", "x3"])


def one(number, rng, slopes, draws):
    "Difference and p-value on one data set, NaN if a method has no weights."
    study = pupils(rng, slopes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cw.ClusterWeightsWarning)
        try:
            found = cw.agreement(cw.hierarchical_weights(study), cw.mundlak_weights(study), replicates=draws, seed=number, progress=False)
        except cw.ClusterWeightsError:
            return np.nan, np.nan
    return found.difference, found.p_value


def main():
    from functools import partial

    from clusterweights.core import seeded_map
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reps", type=int, default=1000, help="data sets for the size; for the power at most 200")
    parser.add_argument("--draws", type=int, default=99)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    begin, rows = time.perf_counter(), []
    for slopes in (0.0, 0.5):
        reps = options.reps if not slopes else min(options.reps, 200)            # power needs fewer
        found = np.array(seeded_map(partial(one, slopes=slopes, draws=options.draws), reps, 20261122, workers=options.jobs))
        done = found[np.isfinite(found[:, 1])]
        share = (done[:, 1] < 0.05).mean()
        rows.append({"slopes vary by": slopes, "data sets": reps, "mean difference": done[:, 0].mean(), "rejected at 5%": share, "MC error": np.sqrt(share * (1 - share) / len(done)), "without an answer": len(found) - len(done)})
    text = pd.DataFrame(rows).round(3).to_string(index=False)
    print(text)
    Path(__file__).with_suffix(".md").write_text(f"# The agreement test, {options.draws} bootstrap draws on each data set\n\n" + __doc__.split("\n\n", 2)[2]
                                                 + f"\n\n```\n{text}\n```\n\n{time.perf_counter() - begin:.0f} seconds on {options.jobs} processes.\n", encoding="utf-8")


if __name__ == "__main__":
    main()
