"""The simulation of Ben-Michael, Feller & Keele (2026), section 7: bias, error and coverage with a cluster that confounds.

Run: python benchmarks/framework_simulation.py [--reps 200] [--jobs 2]. Writes benchmarks/framework_simulation.md.

The reference biases are from an independent replication with 200 replicates (Monte Carlo error .004): features are the ten covariates,
standardised; lam is the residual variance of the outcome among controls, in the outcome's own units, as in the paper. "no share": without the share treated."""

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

import clusterweights as cw
from clusterweights.simulate import framework_data, monte_carlo, sample_att, simulated_study

REFERENCE = {"balancing": {0.0: -0.006, 0.25: 0.071, 0.5: 0.146}, "RI-IPW": {0.0: -0.041, 0.25: 0.020, 0.5: 0.039},
             "hierarchical": {0.0: -0.002, 0.25: -0.004, 0.5: -0.004}, "Mundlak GB": {0.0: -0.005, 0.25: -0.005, 0.5: -0.004},
             "Mundlak AvTO": {0.0: -0.004, 0.25: -0.006, 0.5: -0.007}, "Mundlak GB, no share": {0.0: -0.005, 0.25: 0.065, 0.5: 0.133}}
REFERENCE_ERROR = 0.004


def residual_variance(study):
    "Of the outcome on the covariates among controls."
    x, y = np.column_stack([np.ones((~study.treat).sum()), study.x[~study.treat]]), study.outcome[~study.treat]
    return float((y - x @ np.linalg.lstsq(x, y, rcond=None)[0]).var())


def balancing(data): return cw.balancing_weights(simulated_study(data)).estimate()


def hierarchical(data):
    study = simulated_study(data)
    return cw.hierarchical_weights(study, lam=residual_variance(study)).estimate()


def random_intercept(data): return cw.ipw_weights(simulated_study(data)).estimate()


def mundlak(data, **options):
    study = simulated_study(data)
    q = len(cw.cluster_statistics(study, options.get("statistics", ("means", "treated"))).names)
    return cw.mundlak_weights(study, lam=residual_variance(study) / q, **options).estimate()        # the paper prices each product at 1, not 1 / q


ESTIMATORS = {"balancing": balancing, "RI-IPW": random_intercept, "hierarchical": hierarchical, "Mundlak GB": mundlak, "Mundlak AvTO": partial(mundlak, variant="avto"),
              "Mundlak GB, no share": partial(mundlak, statistics="means")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reps", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    rows, start = [], time.perf_counter()
    for rho in (0.0, 0.25, 0.5):
        result = monte_carlo(partial(framework_data, rho_u=rho), ESTIMATORS, options.reps,
                             seed=20260207, truth=sample_att, workers=options.jobs)
        draws = result.draws
        for name, own in draws.groupby("estimator"):
            error = (own["estimate"] - own["truth"]).dropna()
            bias, se = error.mean(), error.std() / np.sqrt(len(error))
            steps = abs(bias - REFERENCE[name][rho]) / np.hypot(se, REFERENCE_ERROR)
            covered = ((own["conf_low"] <= own["truth"]) & (own["truth"] <= own["conf_high"]))[error.index].mean()
            rows.append({"rho": rho, "method": name, "bias": bias, "mc error": se, "reference": REFERENCE[name][rho], "combined errors apart": steps,
                         "sd": error.std(), "mean se": own["std_error"].mean(), "coverage": covered, "failures": len(own) - len(error)})
    table = pd.DataFrame(rows)
    text = table.round(4).to_string(index=False)
    print(text)
    Path(__file__).with_suffix(".md").write_text(
        f"# Simulation of section 7, {options.reps} replicates\n\n{__doc__.splitlines()[-2]}\n{__doc__.splitlines()[-1]}\n\n```\n{text}\n```\n\n"
        f"{time.perf_counter() - start:.0f} seconds on {options.jobs} processes.\n", encoding="utf-8")


if __name__ == "__main__":
    main()
