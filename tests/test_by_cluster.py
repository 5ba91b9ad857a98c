"""Effects by cluster: what they add up to, their pooling, their intervals."""

import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
from helpers import PUPILS, schools
from numpy.testing import assert_allclose
from statsmodels.stats.meta_analysis import combine_effects

from clusterweights import (ClusterWeightsWarning, EstimationError, InputError, Study, balancing_weights, cluster_effects, hierarchical_weights, ipw_weights,
                            unadjusted_weights)
from clusterweights.by_cluster import effect_kurtosis, pool_effects, robust_critical_value, robust_half, worst_miss

pytestmark = pytest.mark.filterwarnings("ignore::clusterweights.core.ClusterWeightsWarning")
DATA = schools(n_schools=9, size=18, seed=4).assign(people=lambda d: 1 + np.arange(len(d)) // 2 % 3)
ROLES = {"treat": "late", "cluster": "school", "covs": ["age", "income"], "outcome": "score"}


def study(data=DATA, **changes):
    return Study(data, **(ROLES | changes))


# --- what they add up to ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("estimand", ["ATT", "ATC", "ATE"])
@pytest.mark.parametrize("people", [None, "people"])
@pytest.mark.parametrize("options", [{}, {"cluster_weight": "clusters"}])
def test_average_is_the_estimate(estimand, people, options, corrected):
    w = hierarchical_weights(study(sampling_weights=people), 1.0, estimand=estimand, **options)
    found = cluster_effects(w, bias_corrected=corrected)
    assert found.matched
    assert_allclose(found.average, found.estimate, atol=1e-12, rtol=0)
    assert_allclose(found.estimate, w.estimate().estimate, atol=1e-8 if corrected else 1e-12, rtol=0)
    assert_allclose(found.table["share"].sum(), 1, rtol=1e-12)


@pytest.mark.parametrize("estimand", ["ATT", "ATC", "ATE"])
def test_correction_takes_out_linear_imbalance(estimand):
    effect = np.linspace(-1, 1, 9)
    noise = 1e-4 * np.random.default_rng(0).normal(size=len(DATA))
    data = DATA.assign(score=3 * DATA["age"] - DATA["income"] + 2 * DATA["school"] + DATA["late"] * effect[DATA["school"]] + noise)
    w = hierarchical_weights(study(data), 1.0, estimand=estimand)
    raw, corrected = (cluster_effects(w, bias_corrected=v).table["effect"] - effect for v in (False, True))
    assert np.abs(raw).max() > 0.05 and np.abs(corrected).max() < 2e-3


def test_average_of_other_weights():
    w = ipw_weights(study(), normalize="cluster")
    assert cluster_effects(w, bias_corrected=False).matched
    assert_allclose(cluster_effects(w, bias_corrected=False).average, w.estimate().estimate, atol=1e-12)
    corrected = cluster_effects(w, bias_corrected=True)
    assert_allclose(corrected.average, corrected.estimate, atol=1e-12)
    assert abs(corrected.estimate - w.estimate().estimate) > 0.01
    across = cluster_effects(balancing_weights(study()))
    assert not across.matched and abs(across.average - across.estimate) > 1e-3
    assert "each cluster: part of" in " ".join(across.summary().notes)


def test_effect_and_error_by_hand():
    w = hierarchical_weights(study(sampling_weights="people"), 1.0)
    frame, found = w.to_frame().assign(score=DATA["score"]), cluster_effects(w, bias_corrected=False)
    g = frame[frame["cluster"] == 3]
    one, zero = g[g["treated"].astype(bool)], g[~g["treated"].astype(bool)]
    assert_allclose(found.table.loc[3, "effect"], np.average(one["score"], weights=one["weight"]) - np.average(zero["score"], weights=zero["weight"]), rtol=1e-12)
    assert found.table["ess_treated"].max() < found.table["treated"].min()
    inverse = sum((v["weight"] ** 2).sum() / v["weight"].sum() ** 2 for v in (one, zero))
    assert_allclose(found.table.loc[3, "std_error"], np.sqrt(found.variance * inverse), rtol=1e-12)


def test_clusters_without_an_arm():
    extra = pd.DataFrame({"school": [90] * 4 + [91] * 5, "late": [1] * 4 + [0] * 5, "age": np.linspace(-1, 1, 9), "income": np.linspace(0, 1, 9), "score": np.arange(9.0), "people": 1})
    data = pd.concat([DATA, extra], ignore_index=True)
    within, across = cluster_effects(hierarchical_weights(study(data), 1.0)), cluster_effects(balancing_weights(study(data)))
    assert within.table.loc[90, "reason"] == "no controls: its target units are left out of the estimate" and within.without_effect == 0
    assert across.table.loc[90, "reason"] == "no controls: counts in the estimate only"
    assert_allclose(across.without_effect, 4 / data["late"].sum())
    for found in (within, across):
        assert found.table.loc[91, "reason"] == "no treated: no target units" and found.table.loc[[90, 91], "effect"].isna().all()
        assert len(found.tidy()) == 9 and found.table.loc[91, "share"] == 0
    notes = " ".join(across.summary().notes)
    assert "9 clusters of 11" in notes and "1 cluster with no controls: counts in the estimate only (6.9% of the target)." in notes
    assert_allclose(within.average, hierarchical_weights(study(data), 1.0).estimate().estimate, atol=1e-12)


def test_single_treated_units_have_an_error():
    data = pd.DataFrame({"school": np.repeat(np.arange(6), 8), "late": np.tile([1] + [0] * 7, 6), "age": np.random.default_rng(0).normal(size=48)})
    data["score"] = data["age"] + np.random.default_rng(1).normal(size=48)
    found = cluster_effects(hierarchical_weights(Study(data, treat="late", cluster="school", covs="age", outcome="score"), 5.0))
    assert (found.table["std_error"] > 0).all() and (found.table["ess_treated"] == 1).all()


def test_order_units_and_labels_do_not_matter():
    base = cluster_effects(hierarchical_weights(study(), 1.0))
    mixed = DATA.sample(frac=1, random_state=1).assign(school=lambda d: d["school"].map(lambda k: f"s{9 - k}"))
    other = cluster_effects(hierarchical_weights(study(mixed.assign(score=3 - 10 * mixed["score"])), 1.0))
    assert_allclose(other.table["effect"].to_numpy()[::-1], -10 * base.table["effect"], rtol=1e-6)
    assert_allclose([other.tau, other.pooled.q, other.kurtosis], [10 * base.tau, base.pooled.q, base.kurtosis], rtol=1e-5)
    assert_allclose(other.tidy()["conf_low"].to_numpy()[::-1], -10 * base.tidy()["conf_high"], rtol=1e-5)


def test_given_outcome_and_pickle():
    w = hierarchical_weights(study(), 1.0)
    found = cluster_effects(w, DATA["score"] + 2 * DATA["late"])
    assert_allclose(found.table["effect"], cluster_effects(w).table["effect"] + 2, rtol=1e-10)
    again = pickle.loads(pickle.dumps(found))
    pd.testing.assert_frame_equal(again.tidy(), found.tidy())
    assert "Effects by cluster" in repr(found) and "<table" in found._repr_html_()


# --- pooling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_reml_is_the_highest_point(seed):
    rng = np.random.default_rng(seed)
    k = int(rng.integers(5, 40))
    v, x = rng.lognormal(size=k) * 0.3, rng.normal(size=(k, seed % 3))
    effects = rng.normal(size=k) * rng.choice([0.1, 0.7]) + np.sqrt(v) * rng.normal(size=k)
    m = np.column_stack([np.ones(k), x])
    found = pool_effects(effects, v, x)
    contrasts = np.linalg.svd(m.T)[2][m.shape[1]:]

    def loglik(t):
        c = contrasts @ np.diag(v + t) @ contrasts.T
        r = contrasts @ effects
        return -0.5 * (np.linalg.slogdet(c)[1] + r @ np.linalg.solve(c, r))
    others = np.r_[0, np.geomspace(1e-4, 30, 400)]
    assert loglik(found.tau2) >= max(map(loglik, others)) - 1e-9
    total = np.diag(v + found.tau2)
    assert_allclose(found.coef, np.linalg.solve(m.T @ np.linalg.solve(total, m), m.T @ np.linalg.solve(total, effects)), rtol=1e-8, atol=1e-12)
    shrunken = found.fitted + found.used / (found.used + v) * (effects - found.fitted)
    assert_allclose(found.shrunken, shrunken, rtol=1e-12)


def test_q_against_statsmodels():
    rng = np.random.default_rng(2)
    v = rng.uniform(0.1, 1, 12)
    effects = rng.normal(size=12)
    found, other = pool_effects(effects, v), combine_effects(effects, v, method_re="chi2")
    assert_allclose([found.q, found.df], [other.q, other.df], rtol=1e-12)


def test_noise_by_simulation():
    rng = np.random.default_rng(3)
    v, tau2 = rng.uniform(0.05, 0.8, 10), 0.2
    w, p = 1 / (v + tau2), None
    u, e = rng.normal(size=(2, 100_000, 10)) * np.sqrt([np.full(10, tau2), v])[:, None]
    mean, s = (w * (u + e)).sum(axis=1) / w.sum(), tau2 / (tau2 + v)
    errors = mean[:, None] + s * (u + e - mean[:, None]) - u
    p = pool_effects(rng.normal(size=10), v)
    fields = vars(p) | {"tau2": tau2, "floor": 0.0, "line": np.full(10, 1 / w.sum()), "own": w / w.sum()}
    p = type(p)(**fields)
    assert_allclose(p.error, errors.std(axis=0), rtol=0.02)
    assert_allclose(p.noise, (errors + (1 - s) * u).std(axis=0), rtol=0.02)


def test_coefficients_find_a_line():
    rng = np.random.default_rng(6)
    data = schools(n_schools=40, size=24, seed=6)
    size = pd.DataFrame({"size": rng.normal(size=40)})
    data["score"] += data["late"] * (1 + 0.8 * data["school"].map(size["size"]))
    found = cluster_effects(hierarchical_weights(study(data), 1.0), covs=size)
    row = found.coefficients().set_index("term").loc["size"]
    assert abs(row["estimate"] - 0.8) < 3 * row["std_error"] and row["p_value"] < 1e-4 and row["df"] == 38
    assert found.tau < cluster_effects(hierarchical_weights(study(data), 1.0)).tau


# --- intervals ----------------------------------------------------------------------------------------------------


def test_critical_values():
    assert_allclose(robust_critical_value([4.0, 4.0], [3.0, np.inf]), [4.6195, 7.2164], atol=5e-4)      # Armstrong, Kolesár & Plagborg-Møller's own software
    m2 = np.array([0.01, 0.3, 2.0, 30.0, 500.0])
    for kurtosis in (1.0, 2.0, 3.0, 30.0, np.inf):
        for level in (0.5, 0.9, 0.95, 0.99):
            chi = robust_critical_value(m2, kurtosis, level)
            assert_allclose(worst_miss(m2, kurtosis, chi), 1 - level, rtol=1e-6)
    values = [robust_critical_value(m2, k) for k in (1, 2, 3, 30, np.inf)]
    assert (np.diff(values, axis=0) > -1e-6).all() and (np.diff(values, axis=1) > 0).all()


def test_no_distribution_misses_more_often():
    from scipy.stats import norm
    rng = np.random.default_rng(1)
    for _ in range(300):
        t, p = rng.exponential(size=4) ** 2 * 3, rng.dirichlet(np.ones(4))
        chi, m2 = rng.uniform(1.5, 5), p @ t
        b = np.sqrt(t)
        assert p @ (norm.cdf(-chi - b) + norm.cdf(-chi + b)) <= worst_miss(m2, p @ t**2 / m2**2, chi) + 1e-9


def test_standard_errors_of_the_mean_are_never_below_those_of_known_spread():
    w = hierarchical_weights(study(), 1.0)
    found = cluster_effects(w, study().to_rows(np.random.default_rng(1).normal(size=study().n)))
    p = found.pooled
    ratio = ((p.effects - p.fitted) ** 2 / (p.variances + p.tau2)).sum() / p.df
    assert p.tau2 == 0 and ratio < 0.9                                          # less spread than noise alone would make
    assert_allclose(found.coefficients()["std_error"], (1 / p.variances).sum() ** -0.5)


def test_units_of_covariates_do_not_matter():
    rng = np.random.default_rng(5)
    x, V = rng.normal(size=(25, 2)), rng.uniform(0.1, 0.4, 25)
    effects = 1 + x @ [0.5, -0.2] + rng.normal(size=25) * np.sqrt(V)
    a, b = pool_effects(effects, V, x), pool_effects(effects, V, 1e6 + 1e-2 * x)
    assert_allclose(a.shrunken, b.shrunken, rtol=1e-7)
    assert_allclose(a.coef[1:], 1e-2 * b.coef[1:], rtol=1e-6)
    full = np.column_stack([np.ones(25), x])                                             # generalised least squares, written out
    cov = np.linalg.inv(full.T @ (full / (V + a.tau2)[:, None]))
    assert_allclose(a.cov, cov, rtol=1e-9)
    assert_allclose(a.coef, cov @ full.T @ (effects / (V + a.tau2)), rtol=1e-9)


@pytest.mark.parametrize(("effects", "variances", "covariates", "message"), [
    ([1, 2, np.nan, 4], np.ones(4), None, "must be finite"), ([1, 2, 3, 4], [1, 1, 0, 1], None, "variances positive"),
    ([1, 2, 3, 4], np.ones(3), None, "do not fit together"), ([1, 2, 3, 4, 5], np.ones(5), np.arange(5), "do not fit together"),
    (list("abcd"), np.ones(4), None, "must be numbers")])
def test_effects_that_are_no_numbers_are_refused(effects, variances, covariates, message):
    with pytest.raises(InputError, match=message):
        pool_effects(effects, variances, covariates)


def test_critical_values_out_of_range_are_refused():
    for m2, kurtosis, level, message in ((0.0, 3, 0.95, "m2 must"), (np.nan, 3, 0.95, "m2 must"), (1.0, 0.5, 0.95, "m2 must"), (1.0, 3, 95, "level=95")):
        with pytest.raises(InputError, match=message):
            robust_critical_value(m2, kurtosis, level)


def test_kinds_and_levels():
    found = cluster_effects(hierarchical_weights(study(), 1.0), kurtosis=3)
    width = {kind: (t["conf_high"] - t["conf_low"]).to_numpy() for kind in ("robust", "normal", "raw") for t in [found.tidy(kind=kind)]}
    assert (width["normal"] < width["raw"]).all()
    assert_allclose(width["robust"], 2 * robust_half(found.pooled, 3), rtol=1e-12)
    assert (found.tidy(0.99)["conf_high"] > found.tidy()["conf_high"]).all()
    assert (cluster_effects(hierarchical_weights(study(), 1.0), kurtosis=np.inf).tidy()["conf_high"] >= found.tidy()["conf_high"] - 1e-9).all()
    assert effect_kurtosis(np.zeros(5), np.ones(5), 1.0) > 1


# --- refusals -----------------------------------------------------------------------------------------------------


def test_refusals():
    w = hierarchical_weights(study(), 1.0)
    for options, words in (({"kurtosis": 0.5}, "from 1"), ({"covs": "wealth"}, "no column"), ({"covs": pd.DataFrame({"x": ["a"] * 9})}, "numbers"),
                           ({"covs": pd.DataFrame({"x": [1.0]}, index=[0])}, "lacks"), ({"outcome": "points"}, "no outcome"), ({"covs": []}, "covs is empty"),
                           ({"covs": pd.Series(np.arange(9.0))}, "or a data frame"), ({"covs": np.arange(9.0)}, "or a data frame")):
        with pytest.raises(InputError, match=words):
            cluster_effects(w, **options)
    with pytest.raises(InputError, match="takes Weights, not Study"):
        cluster_effects(study())
    assert cluster_effects(w, covs=("age", "income")).names == ("age", "income")
    with pytest.raises(EstimationError, match="constant or collinear"):
        cluster_effects(w, covs=pd.DataFrame({"x": np.ones(9)}))
    with pytest.raises(EstimationError, match="at least 3 clusters"):
        cluster_effects(unadjusted_weights(Study(PUPILS, treat="late", outcome="score", cluster="school", covs="age")))
    with pytest.raises(InputError, match="Unknown kind"):
        cluster_effects(w).tidy(kind="bayes")
    with pytest.raises(InputError, match="between 0 and 1"):
        cluster_effects(w).tidy(95)
    survey = Study.survey(DATA.assign(score=DATA["score"].where(DATA["age"] > -1)), outcome="score", cluster="school", covs=["income"])
    with pytest.raises(InputError, match="a survey has one arm"):
        cluster_effects(hierarchical_weights(survey, 1.0))
    with pytest.raises(InputError, match="outside"):
        cluster_effects(balancing_weights(study(), estimand="ATE", target={"age": 0.0, "income": 0.5}))


def test_plot_shows_every_cluster():
    import matplotlib
    matplotlib.use("Agg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ClusterWeightsWarning)
        found = cluster_effects(hierarchical_weights(study(), 1.0))
    ax = found.plot()
    order = found.tidy().sort_values("estimate")["term"]
    assert [t.get_text() for t in ax.get_yticklabels()] == [str(t) for t in order]
    assert_allclose(ax.lines[0].get_xdata(), found.table.loc[order, "effect"])
