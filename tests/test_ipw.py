"""Propensity scores and their weights: against other software, definitions, and in bad company."""

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from numpy.testing import assert_allclose
from sklearn.linear_model import LogisticRegression

import clusterweights as cw
from clusterweights.datasets import late_entry_study
from clusterweights.ipw import fit_each, fit_levels, score_weights
from clusterweights.mixed import fit_logistic_mixed, independent_columns
from clusterweights.study import cluster_sums

LATE = late_entry_study()


def students(k=15, m=24, seed=0, **changes):
    rng = np.random.default_rng(seed)
    school = np.repeat(np.arange(k), m)
    frame = pd.DataFrame({"school": school, "age": rng.normal(size=k * m), "poor": (rng.random(k * m) < 0.4).astype(int), "stands_for": rng.uniform(0.5, 2, size=k * m)})
    frame["late"] = (rng.random(k * m) < 1 / (1 + np.exp(0.5 - 0.7 * frame["age"] - rng.normal(size=k)[school]))).astype(int)
    frame["score"] = frame["age"] + rng.normal(size=k * m)
    return cw.Study(frame, **({"treat": "late", "outcome": "score", "cluster": "school", "covs": ["age", "poor"]} | changes))


STUDY = students()


@pytest.mark.parametrize(("estimand", "treated", "controls"), [("ATT", 1, 0.25 / 0.75), ("ATC", 3, 1), ("ATE", 4, 1 / 0.75), ("ATO", 0.75, 0.25)])
def test_weights_from_scores(estimand, treated, controls):
    assert_allclose(score_weights(np.array([0.25, 0.25]), np.array([True, False]), np.array([2.0, 1.0]), estimand), [2 * treated, controls])


def test_no_clusters_is_logistic_regression_with_sampling_weights():
    weighted = students(sampling_weights="stands_for")
    for study in (STUDY, weighted):
        fit = sm.GLM(study.treat, sm.add_constant(study.x), family=sm.families.Binomial(), freq_weights=study.sampling_weights).fit(tol=1e-12)
        assert_allclose(cw.propensity_scores(study, "none").scores, fit.fittedvalues, atol=1e-8)
    assert not np.allclose(cw.propensity_scores(weighted, "none").scores, cw.propensity_scores(STUDY, "none").scores)


def test_fixed_effects_are_dummies():
    dummies = (STUDY.cluster[:, None] == np.arange(15)).astype(float)
    assert_allclose(cw.propensity_scores(STUDY, "fixed").scores, sm.Logit(STUDY.treat, np.column_stack([STUDY.x, dummies])).fit(disp=0, tol=1e-12).predict(), atol=1e-7)


def test_random_effects_are_those_of_the_mixed_model():
    fit = fit_logistic_mixed(STUDY.x, STUDY.treat, STUDY.starts)
    assert_allclose(cw.propensity_scores(STUDY).scores, fit.fitted, atol=1e-12)
    assert cw.propensity_scores(STUDY).fit.sd[0] > 0.3
    slopes = cw.propensity_scores(STUDY, "random coefficients", slopes=["age"]).fit
    assert slopes.random == ("(intercept)", "age") and slopes.off_boundary


def test_a_large_penalty_leaves_one_level_for_all():
    assert_allclose(cw.propensity_scores(STUDY, "fixed", penalty=1e7).scores, cw.propensity_scores(STUDY, "none").scores, atol=1e-5)
    one_slope = cw.propensity_scores(STUDY, "stratified", penalty=1e7).scores
    assert_allclose(one_slope, np.repeat(cluster_sums(STUDY.treat.astype(float), STUDY.starts) / 24, 24), atol=1e-5)


def with_one_armed(**options):
    frame = pd.DataFrame({"school": np.repeat([1, 2, 3, 4], 30), "x": np.random.default_rng(1).normal(size=120)})
    frame["late"] = np.where(frame["school"] == 3, 1, np.where(frame["school"] == 4, 0, (np.random.default_rng(2).random(120) < 0.5).astype(int)))
    frame["score"] = frame["x"]
    return cw.Study(frame, treat="late", outcome="score", cluster="school", covs="x")


def test_clusters_with_one_arm():
    study = with_one_armed()
    with pytest.warns(cw.DroppedUnitsWarning, match=r"no controls in cluster \(30 units\)"):
        fixed = cw.ipw_weights(study, "fixed")
    assert set(fixed.to_frame().query("not kept")["reason"]) == {"no controls in cluster", "no treated in cluster"}
    assert fixed.target.units == study.treat.sum() - 30
    assert cw.ipw_weights(study).target.units == study.treat.sum() == cw.ipw_weights(study, "fixed", penalty=1.0).target.units
    with pytest.warns(cw.DroppedUnitsWarning):
        by_cluster = cw.ipw_weights(study, normalize="cluster")
    assert by_cluster.target.units == fixed.target.units
    sums = cluster_sums(by_cluster.in_order * ~study.treat, study.starts)
    assert_allclose(sums, study.n_treated * [1, 1, 0, 0])


@pytest.mark.parametrize("estimand", ["ATT", "ATC", "ATE", "ATO"])
@pytest.mark.filterwarnings("ignore::clusterweights.core.OverlapWarning")
@pytest.mark.parametrize("normalize", ["overall", "cluster", None])
def test_what_weights_add_up_to(estimand, normalize):
    study = students(sampling_weights="stands_for")
    w, s, z = cw.ipw_weights(study, "none", estimand=estimand, normalize=normalize).in_order, study.sampling_weights, study.treat
    if normalize is None:
        e = cw.propensity_scores(study, "none").scores
        assert_allclose(w, score_weights(e, z, s, estimand))
        return
    starts = study.starts if normalize == "cluster" else np.array([0, study.n])
    for arm in (z, ~z):
        own = cluster_sums(w * arm, starts)
        if estimand == "ATO":
            assert_allclose(own.sum(), s[arm].sum())
            if normalize == "cluster":
                assert_allclose(own / own.sum(), cluster_sums(w * ~arm, starts) / w[~arm].sum())
        else:
            goal = {"ATT": z, "ATC": ~z, "ATE": np.ones(study.n, bool)}[estimand]
            assert_allclose(own, cluster_sums(s * goal, starts))


@pytest.mark.parametrize(("estimand", "lost"), [("ATT", lambda e, z: e > 0.7), ("ATC", lambda e, z: e < 0.3), ("ATE", lambda e, z: (e > 0.7) | (e < 0.3))])
@pytest.mark.filterwarnings("ignore::clusterweights.core.DroppedUnitsWarning")
def test_trimming(estimand, lost):
    e = cw.propensity_scores(STUDY, "none").scores
    w = cw.ipw_weights(STUDY, "none", estimand=estimand, trim=0.3)
    assert ((w.reason != "") == lost(e, STUDY.treat)).all() and (w.reason != "").any()
    assert (w.in_order[w.reason != ""] == 0).all()


def test_the_estimate_of_raw_weights_is_the_same():
    a, b = cw.ipw_weights(STUDY), cw.ipw_weights(STUDY, normalize=None)
    assert_allclose(a.estimate().estimate, b.estimate().estimate, rtol=1e-12)
    assert_allclose(a.estimate().std_error, b.estimate().std_error, rtol=1e-12)


def test_a_classifier_predicts_units_it_has_not_seen():
    class Memory:
        def fit(self, x, z):
            self.seen = {tuple(row) for row in x}
            return self

        def predict_proba(self, x):
            assert not self.seen & {tuple(row) for row in x}
            return np.full((len(x), 2), 0.5)
    assert (cw.propensity_scores(STUDY, Memory()).scores == 0.5).all()
    w = cw.ipw_weights(STUDY, LogisticRegression())
    assert w.label == "IPW, LogisticRegression" and w.balance().table["SMD, weighted"].abs().max() < 0.2


def test_labels_and_outcome_models_follow_the_model():
    assert cw.ipw_weights(STUDY, "none").label == "IPW, no clusters"
    assert cw.ipw_weights(STUDY, np.full(STUDY.n, 0.4)).label == "IPW, given scores"
    assert "The outcome model knows: covariates." in cw.ipw_weights(STUDY, "none").estimate().explain()
    assert "covariates and clusters" in cw.ipw_weights(STUDY).estimate().explain()


def test_weights_are_fitted_again_on_another_study():
    part = STUDY.restrict(STUDY.cluster < 10)
    w = cw.ipw_weights(STUDY, "none").refit(part)
    assert_allclose(w.in_order, cw.ipw_weights(part, "none").in_order)
    with pytest.raises(cw.InputError, match="one number for each row|one value for each"):
        cw.ipw_weights(STUDY, np.full(STUDY.n, 0.4)).refit(students(k=4))


def test_a_comparison_of_models():
    c = cw.compare(STUDY, [("ipw", {"model": "none"}), ("ipw", {"model": "fixed"}), "ipw", "balancing"])
    assert list(c.table["label"]) == ["IPW, no clusters", "IPW, fixed", "IPW, random intercept", "Balancing, no clusters"]
    assert list(c.weights) == ["ipw none", "ipw fixed", "ipw", "balancing"]
    with pytest.raises(cw.InputError, match="for all methods and for 'ipw' by itself"):
        cw.compare(STUDY, [("ipw", {"trim": 0.1})], trim=0.2)


def test_what_fails_in_a_comparison_stays_in_it():
    frame = pd.DataFrame({"school": np.repeat([1, 2, 3], 20), "x": np.tile(np.arange(20.0), 3), "score": np.random.default_rng(0).normal(size=60)})
    study = cw.Study(frame.assign(late=(frame["x"] > 9).astype(int)), treat="late", outcome="score", cluster="school", covs="x")
    c = cw.compare(study, ["unadjusted", "ipw"])
    assert c.table.loc["ipw", "status"] == "not estimable" and "Separation: 'x'" in str(c.errors["ipw"])


def test_independent_columns():
    x = np.random.default_rng(0).normal(size=(50, 3))
    assert list(independent_columns(np.column_stack([x[:, 0], np.ones(50), x[:, 1], 2 * x[:, 0] - x[:, 1] + 3, x[:, 2]]))) == [0, 2, 4]


@pytest.mark.parametrize(("options", "message"), [
    ({"model": "randm intercept"}, "Did you mean 'random intercept'"), ({"normalize": "all"}, "Unknown normalize"), ({"trim": 0.7}, "trim=0.7"), ({"truncate": 0}, "truncate=0"),
    ({"model": "none", "penalty": 1.0}, "has no penalty"), ({"model": "fixed", "penalty": -1.0}, "0 or more"), ({"model": "none", "nodes": 5}, "has no nodes"),
    ({"model": np.full(5, 0.5)}, "one value for each of the 360 rows"), ({"model": np.full(360, 1.0)}, "strictly between 0 and 1")])
def test_what_is_refused(options, message):
    with pytest.raises(cw.InputError, match=message):
        cw.ipw_weights(STUDY, **options)


def test_trimmed_units_know_their_side():
    with pytest.warns(cw.DroppedUnitsWarning):
        w = cw.ipw_weights(STUDY, "none", estimand="ATE", trim=0.3)
    e = cw.propensity_scores(STUDY, "none").scores
    assert set(w.reason[e > 0.7]) == {"propensity score above 0.7"} and set(w.reason[e < 0.3]) == {"propensity score below 0.3"}


def test_refusals_say_what_to_do():
    with pytest.raises(cw.InputError, match=r"LogisticRegression is a class: give one made from it, LogisticRegression\(\)"):
        cw.propensity_scores(STUDY, LogisticRegression)
    first = np.flatnonzero(STUDY.treat)[0]
    with pytest.raises(cw.EstimationError, match="with 1 treated and .* one such part lacks an arm"):
        cw.propensity_scores(STUDY.restrict(~STUDY.treat | (np.arange(STUDY.n) == first)), LogisticRegression())
    only = pd.DataFrame({"school": np.repeat(range(5), 8), "late": np.tile([0, 1], 20), "x": np.repeat([1.0, 2, 4, 3, 5], 8)})
    with pytest.raises(cw.InputError, match="No covariate varies within clusters"):
        cw.propensity_scores(cw.Study(only, treat="late", cluster="school", covs="x"), "random coefficients")


def test_surveys_are_refused():
    frame = pd.DataFrame({"school": [1, 1, 2, 2], "x": [1.0, 2, 3, 4], "y": [1.0, np.nan, 2, 3]})
    with pytest.raises(cw.InputError, match="for a survey use"):
        cw.ipw_weights(cw.Study.survey(frame, outcome="y", cluster="school", covs="x"))


def test_scales_do_not_matter():
    z, starts = STUDY.treat, STUDY.starts
    for fit in (fit_levels, fit_each):
        assert_allclose(fit(STUDY.x * [1e6, 1e-6] + [1e7, 0], z, starts), fit(STUDY.x, z, starts), atol=1e-7)


def test_sampling_weights_count_in_random_effects():
    weighted = students(sampling_weights="stands_for")
    fit = fit_logistic_mixed(weighted.x, weighted.treat, weighted.starts, weights=weighted.sampling_weights)
    assert_allclose(cw.propensity_scores(weighted).scores, fit.fitted, atol=1e-10)
    assert np.abs(cw.propensity_scores(weighted).scores - cw.propensity_scores(STUDY).scores).max() > 1e-3
