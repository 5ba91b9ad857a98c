"""The simulation of Gao, Yang & Kim (2023), section 4, panels A to D: bias, variance and coverage of soft calibration.

Run: python benchmarks/softcal_simulation.py [--reps 200] [--jobs 2]. Writes benchmarks/softcal_simulation.md.

Thirty clusters of 200; the target is the mean of the superpopulation. Published: Table 3 (500 replicates). Replication: an independent one with 200 replicates and its Monte Carlo error. The two estimators of other packages are left out. Weights of the squared loss (SQ) are truncated at 0, the package's default.
IPW is the Horvitz–Thompson mean; where all or nobody answered in a cluster, the fixed model's score is the share, 1 or 0. In panel B no weights are above 1 and meet the total of every cluster, since in half of the clusters all or nobody answered: the closest are taken (infeasible="closest"). "sample's mean": how often the interval
that counts only responding as chance covers the mean of all units. Panels B and D are not held against the replication: it has no B, and D's published bias of SQ did not reproduce, its message did."""

import argparse
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

import clusterweights as cw
from clusterweights.core import seeded_map
from clusterweights.simulate import cluster_missing_data

PANELS = {"A": (dict(level=0.01), 0.0), "B": (dict(level=0.01, selection=10.0), 0.0), "C": (dict(level=0.5), 0.0), "D": (dict(level=0.01, curved=True), 1.1875)}
PUBLISHED = {                                            # bias × 100 (its size), variance × 1000, coverage
    ("A", "simple"): (21.2, 0.23, 0.0), ("A", "IPW, fixed"): (0.02, 1.53, 94.6), ("A", "IPW, random"): (0.29, 1.40, 94.2), ("A", "hard, ME"): (0.10, 0.78, 92.6),
    ("A", "soft, SQ"): (0.16, 0.61, 93.8), ("A", "soft, ME"): (0.13, 0.73, 93.0), ("A", "bias-corrected"): (0.09, 0.74, 93.2),
    ("B", "simple"): (5.02, 0.35, 23.8), ("B", "IPW, fixed"): (0.28, 26.4, 88.6), ("B", "IPW, random"): (0.01, 22.3, 87.8), ("B", "hard, ME"): (0.73, 4.57, 94.2),
    ("B", "soft, SQ"): (0.29, 1.49, 94.4), ("B", "soft, ME"): (0.27, 1.69, 92.4), ("B", "bias-corrected"): (0.18, 2.16, 92.2),
    ("C", "simple"): (30.3, 2.74, 0.0), ("C", "IPW, fixed"): (0.49, 10.7, 95.0), ("C", "IPW, random"): (1.61, 10.2, 93.4), ("C", "hard, ME"): (0.64, 9.23, 94.2),
    ("C", "soft, SQ"): (1.26, 9.64, 94.0), ("C", "soft, ME"): (1.28, 9.84, 93.6), ("C", "bias-corrected"): (0.63, 9.21, 94.0),
    ("D", "simple"): (31.6, 1.50, 0.0), ("D", "IPW, fixed"): (0.10, 2.42, 94.0), ("D", "IPW, random"): (0.38, 2.24, 94.0), ("D", "hard, ME"): (0.92, 1.96, 92.6),
    ("D", "soft, SQ"): (8.75, 1.72, 0.0), ("D", "soft, ME"): (0.03, 1.69, 94.4), ("D", "bias-corrected"): (0.11, 1.71, 96.6)}
REPLICATION = {("A", "soft, SQ", "variance"): (0.65, 0.04), ("A", "soft, ME", "variance"): (0.68, 0.04), ("A", "simple", "bias"): (21.1, np.nan), ("C", "soft, SQ", "variance"): (8.75, 0.7),
               ("C", "soft, ME", "variance"): (8.75, 0.7), ("C", "bias-corrected", "variance"): (8.75, 0.7), ("C", "soft, SQ", "bias"): (1.6, 0.5), ("C", "simple", "bias"): (29.9, np.nan)}


def propensity_mean(data, answered, model):
    "Horvitz–Thompson mean and its standard error by clusters, with answering treated as treatment; clusters in which all or nobody answered keep their share."
    study = cw.Study(data.assign(answered=answered, y=data["outcome"].fillna(0.0)), treat="answered", cluster="cluster", covs=["x1", "x2"], outcome="y")
    scores = cw.propensity_scores(study, model).scores                # of the fixed model missing where all or nobody answered: the share, 1 or 0
    parts = np.where(study.treat, study.outcome / np.where(np.isnan(scores), 1.0, scores), 0.0)
    psi = np.add.reduceat(parts, study.starts[:-1])
    k = len(psi)
    return psi.sum() / study.n, np.sqrt(k / (k - 1) * ((psi - psi.mean()) ** 2).sum()) / study.n


def theorem_2(study, weights):
    "The variances of Theorem 2 as printed, over n: V1, and V1 + V2. By dense algebra, apart from the package's."
    own = study.treat
    w, y, lam = weights.in_order[own], study.outcome[own], min(weights.params["lam"], 1e10)
    fixed = np.column_stack([np.ones(own.sum()), study.x[own]])
    design = np.column_stack([fixed, study.cluster[own, None] == np.arange(study.n_clusters)])
    weighted = (design * (w - 1)[:, None]).T                      # w − 1 is the derivative of maximum entropy's weights
    b = np.linalg.solve(weighted @ design + lam * np.diag(np.r_[np.zeros(3), np.ones(study.n_clusters)]), weighted @ y)
    first, second = w**2 @ (y - design @ b) ** 2 / study.n**2, w @ (y - fixed @ b[:3]) ** 2 / study.n**2
    return {"soft, ME: Theorem 2, V1": first, "soft, ME: Theorem 2, V1 + V2": first + second}


def one(number, rng, panel):
    "All estimates of one data set, with standard errors."
    settings, truth = PANELS[panel]
    data = cluster_missing_data(rng, **settings)
    answered = data["outcome"].notna().astype(int)
    study, found = cw.Study.survey(data, outcome="outcome", cluster="cluster", covs=["x1", "x2"]), {}
    simple = data["outcome"].fillna(0.0)                     # the paper's: the sum of answers over the size of the sample
    found["simple"] = simple.mean(), simple.std() / np.sqrt(len(simple))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cw.ClusterWeightsWarning)
        for name, model in (("IPW, fixed", "fixed"), ("IPW, random", "random intercept")):
            try:
                found[name] = propensity_mean(data, answered, model)
            except cw.EstimationError:                        # all or nobody answered in nearly every cluster
                found[name] = np.nan, np.nan
        weights = {"hard, ME": cw.softcal_weights(study, lam=0, infeasible="closest"), "soft, SQ": cw.softcal_weights(study, loss="squared"), "soft, ME": cw.softcal_weights(study)}
        weights["soft, ME, adjusted"] = cw.softcal_weights(study, form="adjusted", infeasible="closest")
        weights["soft, entropy"] = cw.softcal_weights(study, loss="entropy")
        estimates = {name: cw.softcal_estimate(w) for name, w in weights.items()}
        estimates["bias-corrected"] = cw.softcal_estimate(weights["soft, ME"], bias_corrected=True)
        estimates["soft, ME: Corollary 1 as printed"] = cw.softcal_estimate(weights["soft, ME"], penalised=False)
    found |= {name: (e.estimate, e.std_error) for name, e in estimates.items()}
    sample = {"soft, ME": cw.softcal_estimate(weights["soft, ME"], vcov="sample"), "soft, SQ": cw.softcal_estimate(weights["soft, SQ"], vcov="sample"),
              "bias-corrected": cw.softcal_estimate(weights["soft, ME"], vcov="sample", bias_corrected=True)}
    mean = data["y"].mean()
    for name, variance in theorem_2(study, weights["soft, ME"]).items():
        found[name] = estimates["soft, ME"].estimate, np.sqrt(variance)
        sample[name] = cw.Estimate(*found[name])
    return [{"estimator": name, "error": e - truth, "covers": abs(e - truth) < 1.96 * s, "se": s, "gamma": min(np.max(weights["soft, ME"].params["lam"]), 1e99),
             "covers the sample's mean": abs(sample[name].estimate - mean) < 1.96 * sample[name].std_error if name in sample else np.nan} for name, (e, s) in found.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reps", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    rows, infinite, start = [], {}, time.perf_counter()
    for panel in PANELS:
        draws = pd.DataFrame([row for rows in seeded_map(partial(one, panel=panel), options.reps, 20261122, workers=options.jobs, progress=False) for row in rows])
        infinite[panel] = np.mean(draws.loc[draws["estimator"] == "soft, ME", "gamma"] > 1e10)
        for name, own in draws.groupby("estimator", sort=False):
            failed, own = own["error"].isna().sum(), own[own["error"].notna()]
            n, error = len(own), own["error"]
            bias, variance = 100 * error.mean(), 1000 * error.var()
            bias_error, variance_error = 100 * error.std() / np.sqrt(n), variance * np.sqrt(2 / (n - 1))
            published, apart = PUBLISHED.get((panel, name), (np.nan,) * 3), []
            for what, value, mc in (("bias", bias, bias_error), ("variance", variance, variance_error)):
                if (panel, name, what) in REPLICATION:
                    reference, its = REPLICATION[panel, name, what]
                    apart.append(abs(value - reference) / np.hypot(mc, 0.0 if np.isnan(its) else its))
            rows.append({"panel": panel, "estimator": name + f" ({failed} failed)" * bool(failed), "bias x100": bias, "(mc)": bias_error, "published": published[0], "var x1000": variance, "(mc) ": variance_error, "published ": published[1],
                         "coverage": 100 * own["covers"].mean(), "published  ": published[2], "mean se / sd": own["se"].mean() / error.std(), "sample's mean": 100 * own["covers the sample's mean"].mean(),
                         "errors from replication": max(apart, default=np.nan)})
    table = pd.DataFrame(rows)
    text = (f"# Soft calibration, section 4, {options.reps} replicates\n\n{__doc__.split(chr(10) * 2)[2]}\n\n```\n"
            + table.to_string(index=False, float_format=lambda v: f"{v:.2f}", na_rep="-") + "\n```\n\nNothing between clusters by REML, so that γ is infinite: "
            + ", ".join(f"{share:.0%} of panel {panel}" for panel, share in infinite.items()) + f".\n\n{time.perf_counter() - start:.0f} seconds on {options.jobs} processes.\n")
    print(text)
    Path(__file__).with_suffix(".md").write_text(text)
    worst = table.loc[~table["panel"].isin(["B", "D"]), "errors from replication"].max()
    print(f"largest distance from the replication in panels A and C: {worst:.1f} combined Monte Carlo errors")


if __name__ == "__main__":
    main()
