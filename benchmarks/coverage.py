"""How often 95% intervals cover: units treated within clusters (residualised), and whole clusters treated (CR2 and what else there is).

Run: python benchmarks/coverage.py [--reps 1000] [--cluster-reps 500] [--jobs 2]. Writes benchmarks/coverage.md.

Units: the design of Ben-Michael, Feller & Keele (2026), section 7, hierarchical weights; the truth is the effect on the treated of each sample.
Clusters: K schools of about 30 students, half of them treated or nearly so; two covariates of students and two of schools; school effects of standard deviation 0.4 and effects of treatment that
differ between schools by 0.2 around 0; balancing weights with tolerance="auto". The truth is 0, the mean effect over all schools. "overlap" multiplies the coefficients of the treatment model."""

import argparse
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

import clusterweights as cw
from clusterweights.simulate import framework_data, monte_carlo, sample_att, simulated_study


def hierarchical(data):
    study = simulated_study(data)
    x, y = np.column_stack([np.ones((~study.treat).sum()), study.x[~study.treat]]), study.outcome[~study.treat]
    lam = float((y - x @ np.linalg.lstsq(x, y, rcond=None)[0]).var())
    return cw.hierarchical_weights(study, lam=lam).estimate()


def school_data(rng, n_schools, separation):
    "Students of schools of which each is treated as a whole."
    rng = np.random.default_rng(rng)
    school = np.repeat(np.arange(n_schools), 10 + rng.poisson(20, size=n_schools))
    size, urban = rng.normal(size=n_schools), rng.normal(size=n_schools)
    score = 0.5 * size + 0.5 * urban
    treat = rng.random(n_schools) < 1 / (1 + np.exp(-separation * score))
    if treat.sum() < 4 or (~treat).sum() < 4:
        treat = np.argsort(np.argsort(-score - rng.logistic(size=n_schools))) < n_schools // 2
    ses, prior = (rng.normal(size=len(school)) + 0.4 * v[school] for v in (size, urban))
    own = 0.4 * rng.normal(size=n_schools) + treat * 0.2 * rng.normal(size=n_schools)
    y = 0.5 * ses + 0.3 * prior + (0.4 * size + 0.4 * urban + own)[school] + rng.normal(size=len(school))
    return pd.DataFrame({"school": school, "treat": treat[school].astype(int), "ses": ses, "prior": prior, "size": size[school], "urban": urban[school], "y": y})


def by_school(data, **options):
    study = cw.Study(data, treat="treat", outcome="y", cluster="school", covs=["ses", "prior", "size", "urban"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cw.ClusterWeightsWarning)
        return cw.balancing_weights(study, tolerance="auto").estimate(**options)


def normal_quantile(data):
    from dataclasses import replace
    return replace(by_school(data), df=np.inf)


CLUSTERED = {"auto": by_school, "auto, bias-corrected": partial(by_school, bias_corrected=True), "auto, normal quantile": normal_quantile,
             "CR2 of raw outcomes": partial(by_school, outcome_model="none"), "CR0": partial(by_school, vcov="CR0"), "residualised": partial(by_school, vcov="residualised")}


def coverage(draws):
    error = (draws["estimate"] - draws["truth"]).dropna()
    covered = ((draws["conf_low"] <= draws["truth"]) & (draws["truth"] <= draws["conf_high"]))[error.index]
    return {"coverage": covered.mean(), "MC error": np.sqrt(covered.mean() * (1 - covered.mean()) / len(covered)), "bias": error.mean(), "sd": error.std(),
            "mean se": draws["std_error"].mean(), "mean width": (draws["conf_high"] - draws["conf_low"]).mean(), "failures": len(draws) - len(error)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reps", type=int, default=1000, help="of the part on units")
    parser.add_argument("--cluster-reps", type=int, default=500, help="of the part on clusters")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    begin, tables = time.perf_counter(), {}
    rows = []
    for rho in (0.0, 0.25, 0.5):
        result = monte_carlo(partial(framework_data, rho_u=rho), {"hierarchical": hierarchical}, options.reps, seed=20261122, truth=sample_att, workers=options.jobs)
        rows.append({"rho": rho} | coverage(result.draws))
    tables["Units treated within clusters: hierarchical weights, residualised"] = pd.DataFrame(rows)
    rows = []
    for separation, schools in ((1.0, 30), (1.0, 50), (1.0, 100), (2.5, 30), (2.5, 50), (2.5, 100)):
        result = monte_carlo(partial(school_data, n_schools=schools, separation=separation), CLUSTERED, options.cluster_reps, seed=20261123, truth=lambda data: 0.0,
                             workers=options.jobs)
        rows += [{"overlap": separation, "schools": schools, "interval": name} | coverage(own) for name, own in result.draws.groupby("estimator", sort=False)]
    tables["Whole clusters treated: balancing weights"] = pd.DataFrame(rows)
    text = "\n\n".join(f"## {title}\n\n```\n{table.round(3).to_string(index=False)}\n```" for title, table in tables.items())
    print(text)
    Path(__file__).with_suffix(".md").write_text(f"# Coverage of 95% intervals, {options.reps} and {options.cluster_reps} replicates\n\n" + __doc__.split("\n\n", 2)[2] + f"\n\n{text}\n\n"
                                                 f"{time.perf_counter() - begin:.0f} seconds on {options.jobs} processes.\n", encoding="utf-8")


if __name__ == "__main__":
    main()
