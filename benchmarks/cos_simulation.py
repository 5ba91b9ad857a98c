"""The simulations of Ben-Michael, Page & Keele (2024), section 5, on synthetic schools: bias by overlap, and what intervals cover.

Run: python benchmarks/cos_simulation.py [--reps 200] [--interval-reps 100] [--jobs 2]. Writes benchmarks/cos_simulation.md.

First table: 44 schools, overlap c from poor (1) to excellent (10); raw difference, COS weights for the treated, subset weights, each with icc and lam
from the data; bias and error in standard deviations of the outcome. Published for the original data, which are private: raw and both weightings in
this order at c = 1, nearly no bias of the weightings else.
Second table: 50 to 250 schools; intervals of the COS estimate for the treated. plug-in: residuals of a linear model of the controls, summed by
school, normal quantile; both arms: the same with the treated arm's term; CR2 of outcomes: the weighted sandwich, t quantile; default: CR2 of
residuals, t quantile. The effect is 0.3 for everybody; given the covariates, students of a school have nothing in common."""

import argparse
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

import clusterweights as cw
from clusterweights.core import seeded_map
from clusterweights.simulate import summer_school_data
from clusterweights.study import cluster_sums
from clusterweights.weights import predict_outcomes

TRUTH = 0.3
COVARIATES = ["reading", "math", "black", "hispanic", "female", "free_lunch", "ell", "novice", "attendance", "turnover", "reading_proficient",
              "math_proficient", "minority", "enrolment"]


def drawn(rng, schools, overlap):
    return cw.Study(summer_school_data(rng, n_schools=schools, overlap=overlap, tau=TRUTH), treat="treat", outcome="outcome", cluster="cluster",
                    covs=COVARIATES)


def difference(study, w):
    return np.average(study.outcome[study.treat], weights=w[study.treat]) - np.average(study.outcome[~study.treat], weights=w[~study.treat])


def biases(number, rng, overlap):
    "Errors of the three estimates on one data set; NaN where a method refuses."
    study, out = drawn(rng, 44, overlap), {}
    for name, make in {"raw": cw.unadjusted_weights, "COS": cw.cos_weights, "subset": partial(cw.cos_weights, estimand="ATO")}.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", cw.ClusterWeightsWarning)
            try:
                out[name] = difference(study, make(study).in_order) - TRUTH
            except cw.ClusterWeightsError:
                out[name] = np.nan
    return out


def plug_in(weights):
    "Standard errors from residuals of the controls, and of both arms."
    study, found, parts = weights.study, predict_outcomes(weights, weights.study.outcome), []
    for name, arm in (("controls", ~study.treat), ("treated", study.treat)):
        share = np.where(arm, weights.in_order, 0.0) / weights.in_order[arm].sum()
        parts.append((cluster_sums(share * (study.outcome - found[name].fitted), study.starts) ** 2).sum())
    return np.sqrt(parts[0]), np.sqrt(sum(parts))


def intervals(number, rng, schools, overlap):
    "For each kind of interval: error, standard error and half length."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cw.ClusterWeightsWarning)
        weights = cw.cos_weights(drawn(rng, schools, overlap))
        error = difference(weights.study, weights.in_order) - TRUTH
        pure, both = plug_in(weights)
        out = {"plug-in": (error, pure, 1.96 * pure), "plug-in, both arms": (error, both, 1.96 * both)}
        for name, model in (("CR2 of outcomes", "none"), ("default", None)):
            effect = weights.estimate(outcome_model=model)
            out[name] = (error, effect.std_error, (effect.conf_int()[1] - effect.conf_int()[0]) / 2)
    return out


def first_table(reps, jobs):
    rows = []
    for overlap in (1, 2.5, 7.5, 10):
        errors = pd.DataFrame(seeded_map(partial(biases, overlap=overlap), reps, 20240501, workers=jobs, progress=False))
        for name in errors:
            e = errors[name].dropna()
            rows.append({"c": overlap, "estimate": name, "bias": e.mean(), "MC error": e.std() / np.sqrt(len(e)), "RMSE": np.sqrt((e**2).mean()),
                         "refused": len(errors) - len(e)})
    return pd.DataFrame(rows)


def second_table(reps, jobs):
    rows = []
    for overlap in (1, 2.5, 10):
        for schools in (50, 100, 250):
            done = seeded_map(partial(intervals, schools=schools, overlap=overlap), reps, 20240502, workers=jobs, progress=False)
            for name in done[0]:
                error, se, half = np.array([d[name] for d in done]).T
                covered = np.abs(error) <= half
                rows.append({"c": overlap, "schools": schools, "interval": name, "sd of error": error.std(), "mean SE": se.mean(),
                             "mean length": 2 * half.mean(), "coverage": covered.mean(),
                             "MC error": np.sqrt(max(covered.mean() * (1 - covered.mean()), 1 / reps / 4) / reps)})
    return pd.DataFrame(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reps", type=int, default=200, help="of the first table")
    parser.add_argument("--interval-reps", type=int, default=100, help="of the second table")
    parser.add_argument("--jobs", type=int, default=2)
    options, begin = parser.parse_args(), time.perf_counter()
    tables = {f"Bias and error by overlap, 44 schools, {options.reps} replicates": first_table(options.reps, options.jobs).round(4),
              f"Intervals, {options.interval_reps} replicates": second_table(options.interval_reps, options.jobs).round(3)}
    text = "\n\n".join(f"## {title}\n\n```\n{table.to_string(index=False)}\n```" for title, table in tables.items())
    print(text)
    seconds, about = time.perf_counter() - begin, __doc__.split("\n\n", 2)[2]
    Path(__file__).with_suffix(".md").write_text(f"# Whole clusters treated: the simulations of section 5\n\n{about}\n\n{text}\n\n{seconds:.0f} seconds on "
                                                 f"{options.jobs} processes.\n", encoding="utf-8")


if __name__ == "__main__":
    main()
