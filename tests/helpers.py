"""Data, reference computations and the browser that several test files share."""

import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import statsmodels.api as sm

from clusterweights import Study
from clusterweights.qp import BlockSums, Constraint, Problem

# Schools a and d have both arms; b has no late pupil, c has no other.
PUPILS = pd.DataFrame({
    "school": list("aaaabbbcccddddd"),
    "late": [1, 0, 0, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1],
    "age": [6, 7, 5, 8, 6, 9, 5, 6, 7, 7, 6, 8, 5.0, 7, 7],
    "score": [3, 4, 2, 6, 1, 5, 2, 3, 4, 5, 3, 6, 2.0, 4, 5],
})


def pupils(data=PUPILS, **changes):
    return Study(data, **({"treat": "late", "outcome": "score", "cluster": "school", "covs": "age"} | changes))


def schools(n_schools=5, size=12, seed=0):
    "Random pupils; every school has both arms, with overlap in age and income."
    rng = np.random.default_rng(seed)
    school = np.repeat(np.arange(n_schools), size)
    late = np.tile([1, 0, 0], n_schools * size // 3)
    age = rng.normal(size=len(school)) + 0.5 * late
    income = rng.normal(size=len(school)) + 0.3 * school
    score = age + school + rng.normal(size=len(school))
    return pd.DataFrame({"school": school, "late": late, "age": age, "income": income, "score": score})


def four(upper=np.inf, lower=0.0, ridge=None, extra=()):
    "Four units with ridge 1 whose weights add up to 10: each gets 2.5, the multiplier is -2.5, the optimum 12.5."
    whole, ones = np.array([0, 4]), np.ones((4, 1))
    total = Constraint(BlockSums(ones, whole, np.ones(1)), np.array([[10.0]]), "total", ["all"])
    nothing, ridge = BlockSums(0 * ones, whole, np.ones(1)), np.ones(4) if ridge is None else ridge
    return Problem(nothing, np.zeros((1, 1)), ridge, (*extra, total), lower, upper)


def anova_components(y, x, cluster):
    "Variances between and within clusters of least-squares residuals, the latter from statsmodels; balanced or not."
    r = sm.OLS(y, sm.add_constant(x)).fit().resid
    sizes, n = np.bincount(cluster), len(y)
    k = len(sizes)
    within = sm.OLS(r, (cluster[:, None] == np.arange(k)).astype(float)).fit().mse_resid
    means = np.bincount(cluster, r) / sizes
    between = ((sizes * (means - r.mean()) ** 2).sum() / (k - 1) - within) / ((n - (sizes**2).sum() / n) / (k - 1))
    return between, within


def left_out_by_refitting(y, x, cluster=None, kappa=np.inf):
    "y minus its prediction from the other units: least squares, with cluster levels under a ridge of kappa if it is finite."
    fixed = np.column_stack([np.ones(len(y)), x])
    design, penalty = fixed, fixed[:0]
    if np.isfinite(kappa):
        k, d = cluster.max() + 1, fixed.shape[1]
        design = np.column_stack([fixed, cluster[:, None] == np.arange(k)])
        penalty = np.column_stack([np.zeros((k, d)), np.sqrt(kappa) * np.eye(k)])
    out = []
    for i in range(len(y)):
        others = np.arange(len(y)) != i
        a, b = np.vstack([design[others], penalty]), np.r_[y[others], np.zeros(len(penalty))]
        out.append(y[i] - design[i] @ np.linalg.lstsq(a, b, rcond=None)[0])
    return np.array(out)


def residuals_by_refitting(frame, cluster=False):
    "Left-out residuals of data like `schools()`, on age and income, arm by arm; with cluster levels if asked for."
    out = np.zeros(len(frame))
    for arm in (0, 1):
        rows = np.flatnonzero(frame["late"] == arm)
        part = frame.iloc[rows]
        y, x, school = part["score"].to_numpy(), part[["age", "income"]].to_numpy(), part["school"].to_numpy()
        kappa = np.inf
        if cluster:
            between, within = anova_components(y, x, school)
            kappa = within / between if between > 0 else np.inf
        out[rows] = left_out_by_refitting(y, x, school, kappa)
    return out


def browser():
    "A browser of the Chromium family on this machine, or None."
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge"):
        if found := shutil.which(name):
            return found
    programs = [Path(os.environ[name]) for name in ("PROGRAMFILES", "PROGRAMFILES(X86)", "LOCALAPPDATA") if name in os.environ]
    places = [folder / end for folder in programs for end in ("Google/Chrome/Application/chrome.exe", "Microsoft/Edge/Application/msedge.exe")]
    places += [Path(f"/Applications/{name}.app/Contents/MacOS/{name}") for name in ("Google Chrome", "Chromium", "Microsoft Edge")]
    return next((str(place) for place in places if place.exists()), None)
