"""Soft calibration: parity with survey::calibrate, optimality against a dense solver, invariance, failures that name what fails."""

import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose
from scipy.optimize import root

import clusterweights as cw
from clusterweights.core import EstimationError, InfeasibleError, InputError
from clusterweights.simulate import cluster_missing_data
from clusterweights.softcal import LOSSES, logit_loss, solve_softcal
from clusterweights.study import cluster_sums

REFERENCE = Path(__file__).parent / "reference" / "calibrate"
LIMITS = {"logit": (0.2, 8.0)}


@pytest.mark.parametrize("run, options", [("linear", {"loss": "squared"}), ("raking", {"loss": "entropy"}), ("logit", {"loss": "logit", "bounds": (0.4, 2.5)}),
                                          ("linear_bounded", {"loss": "squared", "bounds": (0.5, 1.6)}), ("logit_tight", {"loss": "logit", "bounds": (0.5, 1.7)})])
@pytest.mark.parametrize("how", ["one cluster, hard", "clusters ignored"])
def test_weights_of_survey_calibrate(run, options, how):
    data, weights = pd.read_csv(REFERENCE / "data.csv"), pd.read_csv(REFERENCE / "weights.csv")[run]
    totals = json.loads((REFERENCE / "expected.json").read_text())["population_totals"]
    size, names = totals["(Intercept)"], ["ses", "female", "minority", "sector"]
    one, lam = np.array([0, len(data)]), 0.0 if how == "one cluster, hard" else np.inf
    found = solve_softcal(data[names].to_numpy(float), one, np.array([totals[c] for c in names]) / size, size, np.array([size]), lam, base=data["basew"].to_numpy(), **options)
    assert_allclose(found.weights, weights, rtol=1e-10)
    assert_allclose(np.average(data["mathach"], weights=found.weights), json.loads((REFERENCE / "expected.json").read_text())["runs"][run]["svymean_mathach"], rtol=1e-10)


def problem(seed, k=7, d=3):
    rng = np.random.default_rng(seed)
    n_g = rng.integers(3, 9, k)
    n, starts = n_g.sum(), np.r_[0, np.cumsum(n_g)]
    x = rng.normal(size=(n, d))
    base, q, relative = rng.uniform(0.5, 1.5, n), rng.uniform(0.7, 1.4, n), rng.uniform(0.5, 2, k)
    inside = 2.2 + 0.3 * np.tanh(x[:, 0]) + rng.uniform(0, 0.4, n)          # a target that weights of all losses can reach
    sizes = cluster_sums(base * inside, starts)
    total = sizes.sum()
    return dict(x=x, starts=starts, target_mean=base * inside @ x / total, target_total=total, sizes=sizes, base=base, precision=q, relative_variance=relative)


@pytest.mark.parametrize("loss", [*LOSSES, "logit"])
@pytest.mark.parametrize("lam", [1e-8, 0.3, 40.0])
def test_the_optimality_conditions_solved_densely(loss, lam):
    p = problem(1)
    ours = solve_softcal(**p, lam=lam, loss=loss, bounds=LIMITS.get(loss, (-np.inf, np.inf)))
    rule = logit_loss(*LIMITS[loss]) if loss in LIMITS else LOSSES[loss]
    z = np.repeat(np.eye(7), np.diff(p["starts"]), axis=0)
    design = np.column_stack([np.ones(len(z)), p["x"] - p["target_mean"], z])
    goal, ridge = np.r_[p["target_total"], np.zeros(3), p["sizes"]], np.r_[np.zeros(4), lam / p["relative_variance"]]

    def conditions(c): return design.T @ (p["base"] * rule.weight(p["precision"] * (design @ c))) - goal + ridge * c

    def derivative(c): return (design.T * (p["base"] * p["precision"] * rule.curvature(rule.weight(p["precision"] * (design @ c))))) @ design + np.diag(ridge)
    start = np.r_[ours.multipliers[0][0] + ours.multipliers[0][1:] @ p["target_mean"], ours.multipliers[0][1:], ours.multipliers[1]] * 0.99
    other = root(conditions, start, jac=derivative, tol=1e-13)
    assert_allclose(p["base"] * rule.weight(p["precision"] * (design @ other.x)), ours.weights, rtol=1e-7)
    assert ours.certificate.ok and np.abs(conditions(np.r_[start[0] / 0.99, start[1:] / 0.99])).max() < 1e-8 * p["target_total"]


@pytest.mark.parametrize("loss", [*LOSSES, "logit"])
def test_demands_are_met_in_both_forms(loss):
    p, limits = problem(2), LIMITS.get(loss, (-np.inf, np.inf))
    squared = solve_softcal(**p, lam=5.0, loss="squared")
    adjusted = solve_softcal(**p, lam=5.0, loss=loss, form="adjusted", bounds=limits)
    hard = solve_softcal(**p, lam=0.0, loss=loss, bounds=limits)
    near = solve_softcal(**p, lam=1e-9, loss=loss, bounds=limits)
    for found, goal in ((adjusted, cluster_sums(squared.weights, p["starts"])), (hard, p["sizes"])):
        assert_allclose(cluster_sums(found.weights, p["starts"]), goal, rtol=1e-8)
        assert_allclose(found.weights @ p["x"], p["target_total"] * p["target_mean"], atol=1e-8 * p["target_total"])
    assert_allclose(near.weights, hard.weights, rtol=1e-6)


def test_hard_calibration_with_covariates_of_clusters():
    p = problem(3)
    p["x"] = np.column_stack([p["x"], np.repeat(np.arange(7.0), np.diff(p["starts"]))])
    p["target_mean"] = np.r_[p["target_mean"], p["sizes"] @ np.arange(7) / p["target_total"]]
    assert solve_softcal(**p, lam=0.0).certificate.ok and solve_softcal(**p, lam=3.0).certificate.ok
    p["target_mean"][-1] += 0.5                                             # now cluster totals contradict it
    with pytest.raises(InfeasibleError, match="town.*together with the total of each cluster"):
        solve_softcal(**p, lam=0.0, names=["a", "b", "c", "town"])
    assert solve_softcal(**p, lam=3.0).certificate.ok


def test_bounds_hold_and_bind():
    p = problem(4)
    free = solve_softcal(**p, lam=2.0, loss="squared").weights / p["base"]
    cap = float(np.sort(free)[-5])
    found = solve_softcal(**p, lam=2.0, loss="squared", bounds=(0.0, cap)).weights / p["base"]
    assert found.max() <= cap * (1 + 1e-12) and np.isclose(found, cap).sum() >= 4 and free.max() > cap
    for loss in ("entropy", "empirical likelihood", "maximum entropy"):
        assert solve_softcal(**p, lam=2.0, loss=loss, bounds=(1.2, cap)).certificate.ok


def test_proposition_1():
    data = cluster_missing_data(5)
    s = cw.Study.survey(data, outcome="outcome", cluster="cluster", covs=["x1", "x2"])
    starts, own = np.r_[0, np.cumsum(s.n_treated)], s.treat
    full = np.column_stack([np.ones(s.n), s.x, (s.cluster[:, None] == np.arange(s.n_clusters))])
    for lam in 10.0 ** np.arange(-2, 5):
        w = solve_softcal(s.x[own], starts, s.x.mean(0), s.n, np.diff(s.starts), lam, loss="squared").weights
        blup = full.sum(0) @ np.linalg.solve(full[own].T @ full[own] + lam * np.diag(np.r_[np.zeros(3), np.ones(s.n_clusters)]), full[own].T @ s.outcome[own])
        assert abs(w @ s.outcome[own] - blup) <= 1e-12 * s.n


@pytest.mark.parametrize("options, error, words", [
    ({"lam": -1.0}, InputError, "0 or more"), ({"loss": "entropi"}, InputError, "Did you mean 'entropy'"), ({"form": "x"}, InputError, "penalised"), ({"loss": "logit"}, InputError, "two finite bounds"),
    ({"bounds": (3, 1)}, InputError, "the lower first"), ({"loss": "maximum entropy", "bounds": (0, 0.9)}, InputError, "leave nothing"),
    ({"bounds": (0, 1.5)}, InfeasibleError, "add up to"), ({"bounds": (0, 1.5), "lam": 0.0}, InfeasibleError, "clusters cannot be reached"),
    ({"target_mean": np.array([0.0, 9.0, 0.0])}, InfeasibleError, "income")])
def test_what_is_refused(options, error, words):
    with pytest.raises(error, match=words):
        solve_softcal(**(problem(1) | {"lam": 1.0, "names": ["age", "income", "town"]} | options))


def test_clusters_without_respondents():
    data = cluster_missing_data(6)
    data.loc[data["cluster"].isin([3, 9]), "outcome"] = np.nan
    s = cw.Study.survey(data, outcome="outcome", cluster="cluster", covs=["x1", "x2"])
    for form in ("penalised", "adjusted"):
        w = cw.softcal_weights(s, form=form)
        assert_allclose(w.in_order.sum(), s.n, rtol=1e-10)
        assert_allclose(w.in_order @ s.x, s.x.sum(0), atol=1e-7)
    with pytest.raises(InfeasibleError, match="2 clusters .3 and 9") as caught:
        cw.softcal_weights(s, lam=0)
    assert caught.value.clusters == [3, 9]
    assert cw.softcal_estimate(cw.softcal_weights(s), bias_corrected=True).std_error > 0


def survey(seed=7, **changes):
    data = cluster_missing_data(seed, level=0.5)
    return cw.Study.survey(data.assign(people=1 + (data["x1"] > 0)), **({"outcome": "outcome", "cluster": "cluster", "covs": ["x1", "x2"]} | changes))


@pytest.mark.parametrize("loss", ["squared", "entropy", "empirical likelihood"])
def test_the_unit_of_weights_does_not_matter(loss):
    "Base weights that stand for a country give the same weights, times a factor."
    p, lam = problem(8), 4.0
    times = 1000.0
    big = p | {"base": times * p["base"], "sizes": times * p["sizes"], "target_total": times * p["target_total"]}
    assert_allclose(solve_softcal(**big, lam=times * lam, loss=loss).weights, times * solve_softcal(**p, lam=lam, loss=loss).weights, rtol=1e-9)


def test_scaling_base_weights_keeps_what_lam_means():
    "By the squared loss, with weights that stay positive: base weights as they are give the same as base weights scaled to the target's total."
    s = survey(sampling_weights="people", covs="x1")
    own = s.treat
    w = cw.softcal_weights(s, lam=7.0, loss="squared", bounds=(0, np.inf))
    assert w.in_order[own].min() > 0
    base, target = s.sampling_weights[own], s.sampling_weights
    raw = solve_softcal(s.x[own], np.r_[0, np.cumsum(s.n_treated)], target @ s.x / s.n, s.n, cluster_sums(target, s.starts), 7.0, loss="squared", base=base)
    assert_allclose(w.in_order[own], raw.weights, rtol=1e-9)


def test_variance_among_the_units_at_hand_by_hand():
    s = survey()
    own = s.treat
    w = cw.softcal_weights(s, lam=30.0, loss="squared")
    from clusterweights.mixed import fit_linear_mixed
    y, starts = s.outcome[own], np.r_[0, np.cumsum(s.n_treated)]
    design = np.column_stack([np.ones(own.sum()), s.x[own], s.cluster[own, None] == np.arange(30)])
    eta = y - design @ np.linalg.solve(design.T @ design + np.diag(np.r_[np.zeros(3), np.full(30, 30.0)]), design.T @ y)
    miss = cluster_sums(w.in_order, s.starts) - np.diff(s.starts)
    v = w.in_order[own]
    expected = (v * (v - 1)) @ eta**2 + fit_linear_mixed(s.x[own], y, starts).between * miss @ miss
    assert_allclose(cw.softcal_estimate(w, vcov="sample").std_error, np.sqrt(expected) / s.n, rtol=1e-8)


def test_bootstrap_and_compare_know_the_method():
    s = survey()
    table = cw.compare(s, ["unadjusted", "softcal"]).table
    assert_allclose(table.loc["softcal", "estimate"], cw.softcal_weights(s).estimate().estimate)
    w = cw.softcal_weights(s)
    drawn = w.bootstrap(replicates=60, progress=False)
    assert 0.6 < drawn.summary().frame["std_error"].iloc[0] / cw.softcal_estimate(w).std_error < 1.5
    assert set(w.params) == {"lam", "estimand", "loss", "form", "bounds", "cluster_weight"}
    np.testing.assert_array_equal(w.refit(s).weights, w.weights)


def test_lam_and_its_choice():
    s = survey()
    own = s.treat
    from clusterweights.mixed import fit_linear_mixed
    fit = fit_linear_mixed(s.x[own], s.outcome[own], np.r_[0, np.cumsum(s.n_treated)])
    w = cw.softcal_weights(s)
    assert_allclose(w.params["lam"], fit.within / fit.between, rtol=1e-10)
    assert w.refit(survey(8)).params["lam"] == w.params["lam"]
    curve = cw.cross_fitted_lam(s, n_folds=4)
    assert len(curve.table) == 11 and curve.best["respondents"] == curve.table.loc[curve.table["mse"].idxmin(), "lam"]
    assert cw.softcal_weights(s, lam="cross-fitted").params["lam"] == cw.cross_fitted_lam(s).best["respondents"]
    shifted = cw.Study.survey(cluster_missing_data(7).assign(outcome=lambda f: f["outcome"] + 500), outcome="outcome", cluster="cluster", covs=["x1", "x2"])
    assert_allclose(cw.cross_fitted_lam(shifted, n_folds=4).table["mse"], curve.table["mse"], rtol=1e-5)
    other = cw.cross_fitted_lam(s, n_folds=4, seed=1)
    assert np.abs(other.table["mse"] - curve.table["mse"]).max() > 1e-8
    assert curve.plot().get_xscale() == "log"
    for lam in ("best", True, -1):
        with pytest.raises(InputError, match="cross-fitted"):
            cw.softcal_weights(s, lam=lam)
    with pytest.raises(InputError, match="n_folds"):
        cw.cross_fitted_lam(s, n_folds=1)
    flat = cluster_missing_data(1, level=0.0)
    level = (flat["outcome"] - flat["x1"] - flat["x2"]).groupby(flat["cluster"]).transform("mean")
    flat = cw.Study.survey(flat.assign(outcome=flat["outcome"] - level), outcome="outcome", cluster="cluster", covs=["x1", "x2"])
    w = cw.softcal_weights(flat)
    assert np.isinf(w.params["lam"]) and cw.softcal_estimate(w, penalised=False).std_error > 0     # nothing between clusters


def test_estimates():
    s = survey(sampling_weights="people")
    w = cw.softcal_weights(s)
    plain, corrected = cw.softcal_estimate(w), cw.softcal_estimate(w, bias_corrected=True)
    assert_allclose(plain.estimate, w.estimate().estimate, rtol=1e-12)
    total = cw.softcal_estimate(cw.softcal_weights(s, estimand="total"))
    assert_allclose(total.estimate, plain.estimate * s.n * s.weight_scale, rtol=1e-10)
    assert_allclose(cw.softcal_estimate(w, fraction=0.36).std_error, 0.8 * plain.std_error, rtol=1e-12)
    assert cw.softcal_estimate(w, vcov="sample").std_error < plain.std_error
    assert cw.softcal_estimate(w, penalised=False).std_error != plain.std_error
    assert corrected.estimate != plain.estimate and "imbalance of clusters" in corrected.explain()
    tight = cw.softcal_weights(s, lam=1e-7)
    assert_allclose(cw.softcal_estimate(tight, bias_corrected=True).estimate, cw.softcal_estimate(tight).estimate, atol=1e-6)     # nothing left to correct
    with pytest.raises(InputError, match="have .estimate"):
        cw.softcal_estimate(cw.balancing_weights(s))
    with pytest.raises(InputError, match="Unknown vcov"):
        cw.softcal_estimate(w, vcov="CR2")
    with pytest.raises(InputError, match="share"):
        cw.softcal_estimate(w, fraction=1)


@pytest.mark.parametrize("estimand", ["ATT", "ATC", "ATE"])
def test_effects(estimand):
    late = cw.Study(pd.DataFrame({"x": np.random.default_rng(1).normal(size=600), "g": np.repeat(np.arange(20), 30)}).assign(
        z=lambda f: (np.random.default_rng(2).random(600) < 1 / (1 + np.exp(-f["x"]))).astype(int), y=lambda f: f["x"] + f["z"] + np.sin(f["g"]) + np.random.default_rng(3).normal(size=600)),
        treat="z", cluster="g", covs="x", outcome="y")
    w = cw.softcal_weights(late, estimand=estimand)
    effect = cw.softcal_estimate(w)
    assert abs(effect.estimate - 1) < 4 * effect.std_error and effect.df == 19
    assert_allclose(effect.estimate, w.estimate().estimate, rtol=1e-10)
    if estimand != "ATE":
        with pytest.raises(InputError, match="odds"):
            cw.softcal_weights(late, estimand=estimand, loss="maximum entropy")
    else:
        assert cw.softcal_weights(late, estimand="ATE", loss="maximum entropy").in_order.min() > 1
        assert set(w.params["lam"]) == {"controls", "treated"}
    with pytest.raises(InputError, match="for surveys"):
        cw.softcal_estimate(w, vcov="sample")


def test_totals_have_no_clusters():
    s = survey(totals={"N": 1e4, "x1": 0.0, "x2": 0.0})
    with pytest.raises(EstimationError, match="sizes of clusters"):
        cw.softcal_weights(s)


def test_many_clusters_are_fast_and_small():
    rng = np.random.default_rng(0)
    k, per, d = 20_000, 10, 10
    x, level = rng.normal(size=(k * per, d)), np.repeat(rng.normal(size=k), per)
    wanted = 1 + np.exp(0.3 * level + x @ np.full(d, 0.1))
    starts = np.arange(0, k * per + 1, per)
    sizes = cluster_sums(wanted, starts) * rng.uniform(0.9, 1.1, k)
    times = []
    for lam in (0.5, 4.0, 25.0):
        begin = time.perf_counter()
        found = solve_softcal(x, starts, wanted @ x / wanted.sum(), wanted.sum(), sizes, lam, loss="maximum entropy")
        times.append(time.perf_counter() - begin)
        assert found.certificate.ok
    assert min(times) < 3.0                                   # far below what any K × K matrix would take
