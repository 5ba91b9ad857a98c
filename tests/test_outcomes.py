"""Outcome models and bias correction: against scikit-learn, statsmodels and definitions, alone and through `Weights.estimate`."""

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from numpy.testing import assert_allclose
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.tree import DecisionTreeRegressor

from clusterweights import InputError, OutcomeModel, Study, balancing_weights, hierarchical_weights, unadjusted_weights
from clusterweights.inference import fit_linear
from clusterweights.outcomes import outcome_features, predict_outcome
from clusterweights.weights import predict_outcomes


def students(seed=0, k=12, m=20):
    rng = np.random.default_rng(seed)
    school = np.repeat(np.arange(k), m)
    frame = pd.DataFrame({"school": school, "age": rng.normal(size=k * m) + 0.5 * rng.normal(size=k)[school], "poor": rng.random(k * m) < 0.4,
                          "stands_for": rng.uniform(0.5, 2, size=k * m)}).astype({"poor": int})
    frame["late"] = (rng.random(k * m) < 1 / (1 + np.exp(0.3 - frame["age"]))).astype(int)
    frame["score"] = frame["age"] + frame["age"] ** 2 - frame["poor"] + rng.normal(size=k)[school] + rng.normal(size=k * m)
    return frame


ROLES = dict(treat="late", outcome="score", cluster="school", covs=["age", "poor"])
FRAME = students()
STUDY = Study(FRAME, **ROLES)


@pytest.mark.parametrize("estimand", ["ATT", "ATC", "ATE", "ATO"])
def test_what_is_balanced_is_not_corrected(estimand):
    w = balancing_weights(STUDY, estimand=estimand)
    plain, corrected = w.estimate(), w.estimate(bias_corrected=True)
    assert_allclose(corrected.estimate, plain.estimate, atol=1e-10)
    assert corrected.std_error == plain.std_error and corrected.vcov.endswith("; corrected for remaining imbalance")


def test_hierarchical_weights_are_corrected_within_clusters_only():
    w = hierarchical_weights(STUDY, lam=1.0)
    assert_allclose(w.estimate(outcome_model="covariates", bias_corrected=True).estimate, w.estimate().estimate, atol=1e-10)     # exact global balance
    assert_allclose(w.estimate(bias_corrected=True).estimate, w.estimate().estimate, atol=1e-10)                                 # and each cluster's total
    tilted = OutcomeModel("covariates", DecisionTreeRegressor(max_depth=4, random_state=0))
    assert abs(w.estimate(outcome_model=tilted, bias_corrected=True).estimate - w.estimate().estimate) > 1e-3


@pytest.mark.parametrize("estimand", ["ATT", "ATC", "ATE"])
def test_correcting_unadjusted_means_is_regression(estimand):
    x, y, z = sm.add_constant(STUDY.x), STUDY.outcome, STUDY.treat
    m1, m0 = (sm.OLS(y[arm], x[arm]).fit().predict(x) for arm in (z, ~z))
    target = {"ATT": z, "ATC": ~z, "ATE": np.ones(len(z), bool)}[estimand]
    expected = {"ATT": (y - m0)[z].mean(), "ATC": (m1 - y)[~z].mean(), "ATE": (m1 - m0)[target].mean()}[estimand]
    found = unadjusted_weights(STUDY, estimand=estimand).estimate(outcome_model="covariates", bias_corrected=True)
    assert_allclose(found.estimate, expected, rtol=1e-10)
    assert_allclose(found.mean_treated - found.mean_control, expected, rtol=1e-10)


def test_correction_by_cross_fitting_from_its_definition():
    w, learner = balancing_weights(STUDY, tolerance=0.3), DecisionTreeRegressor(max_depth=3, random_state=0)
    model = OutcomeModel("covariates", learner, folds=4, seed=2)
    found = predict_outcomes(w, STUDY.outcome, model)["controls"]
    z, y = STUDY.treat, STUDY.outcome
    expected = y[z].mean() - found.fitted[z].mean() - np.average((y - found.fitted)[~z], weights=w.in_order[~z])
    assert_allclose(w.estimate(outcome_model=model, bias_corrected=True).estimate, expected, rtol=1e-12)


def test_a_survey_is_corrected_too():
    answers = FRAME.assign(score=FRAME["score"].where(FRAME["age"] < 1))
    survey = Study.survey(answers, outcome="score", cluster="school", covs=["age", "poor"], sampling_weights="stands_for")
    w, s = unadjusted_weights(survey), survey.sampling_weights
    r = survey.treat
    fit = sm.WLS(survey.outcome[r], sm.add_constant(survey.x[r]), s[r]).fit().predict(sm.add_constant(survey.x))
    expected = np.average(fit, weights=s)                   # residuals of weighted least squares average to 0
    mean = w.estimate(outcome_model="covariates", bias_corrected=True)
    assert_allclose(mean.estimate, expected, rtol=1e-10)
    total = unadjusted_weights(survey, estimand="total").estimate(outcome_model="covariates", bias_corrected=True)
    assert_allclose(total.estimate, expected * FRAME["stands_for"].sum(), rtol=1e-9)
    assert w.estimate(vcov="CR2").df < 11 and w.estimate(vcov="CR2").std_error > 0
    with pytest.raises(InputError, match="is for effects"):
        w.estimate(vcov="population")


def test_the_clustered_error_of_a_survey_mean_is_that_of_an_intercept():
    answers = FRAME.assign(score=FRAME["score"].where(FRAME["age"] < 1))
    survey = Study.survey(answers, outcome="score", cluster="school", covs=["age"])
    r = survey.treat
    expected = sm.OLS(survey.outcome[r], np.ones(r.sum())).fit(cov_type="cluster", cov_kwds={"groups": survey.cluster[r], "use_correction": False}).bse[0]
    assert_allclose(unadjusted_weights(survey).estimate(vcov="CR0").std_error, expected, rtol=1e-10)


def test_sampling_weights_weigh_in_the_fit():
    study = Study(FRAME, **ROLES, sampling_weights="stands_for")
    w = unadjusted_weights(study)
    rows = ~study.treat
    fit = sm.WLS(study.outcome[rows], sm.add_constant(study.x[rows]), study.sampling_weights[rows]).fit()
    assert_allclose(predict_outcomes(w, study.outcome, "covariates")["controls"].fitted, fit.predict(sm.add_constant(study.x)), rtol=1e-9)
    tree = OutcomeModel("covariates", DecisionTreeRegressor(max_depth=2, random_state=0))
    assert not np.allclose(predict_outcomes(w, study.outcome, tree)["controls"].fitted, predict_outcomes(unadjusted_weights(STUDY), STUDY.outcome, tree)["controls"].fitted)


@pytest.mark.parametrize("knows", ["covariates", "covariates and clusters", "covariates and cluster means", "covariates, cluster means and clusters"])
def test_what_a_model_knows_from_an_explicit_regression(knows):
    w = unadjusted_weights(STUDY)
    found = predict_outcomes(w, STUDY.outcome, knows)["treated"]
    columns = STUDY.x
    if "cluster means" in knows:
        means = pd.DataFrame(np.column_stack([STUDY.x, STUDY.treat])).groupby(STUDY.cluster).transform("mean").to_numpy()
        columns = np.column_stack([columns, means])
    rows = np.flatnonzero(STUDY.treat)
    if knows.endswith("clusters"):
        starts = np.searchsorted(STUDY.cluster[rows], np.arange(13))
        direct = fit_linear(columns[rows], STUDY.outcome[rows], starts)
        assert_allclose(found.fitted, direct.predict(columns, STUDY.cluster), rtol=1e-10)
    else:
        design = sm.add_constant(columns)
        fit = sm.OLS(STUDY.outcome[rows], design[rows]).fit()
        assert_allclose(found.fitted, fit.predict(design), rtol=1e-8)
        assert_allclose((STUDY.outcome - found.left_out)[rows], fit.get_influence().resid_press, rtol=1e-7)


def test_a_cluster_without_units_of_the_arm_has_level_0():
    arm = (STUDY.cluster != 3) & ~STUDY.treat
    found = predict_outcome(STUDY.x, STUDY.outcome, arm, STUDY.starts, OutcomeModel("covariates and clusters"))
    rows = np.flatnonzero(arm)
    present, block = np.unique(STUDY.cluster[rows], return_inverse=True)
    fit = fit_linear(STUDY.x[rows], STUDY.outcome[rows], np.searchsorted(block, np.arange(len(present) + 1)))
    assert_allclose(found.fitted[STUDY.cluster == 3], fit.predict(STUDY.x[STUDY.cluster == 3]), rtol=1e-12)
    assert_allclose(found.fitted[STUDY.cluster == 7], fit.predict(STUDY.x[STUDY.cluster == 7]) + fit.levels[list(present).index(7)], rtol=1e-12)


def test_ridge_is_that_of_scikit_learn():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(50, 4)) * [1, 10, 0.1, 1], rng.normal(size=50)
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    fit = fit_linear(x, y, ridge=0.3)
    assert_allclose(fit.slopes * x.std(axis=0), Ridge(alpha=15).fit(z, y).coef_, rtol=1e-9)
    assert_allclose(fit.fitted, Ridge(alpha=15).fit(z, y).predict(z), rtol=1e-9)


def test_cluster_folds_leave_whole_clusters_out():
    class Recorder(LinearRegression):
        seen = []

        def fit(self, x, y):
            Recorder.seen.append(set(x[:, 0].astype(int)))
            return super().fit(x, y)
    x = np.column_stack([STUDY.cluster, STUDY.x]).astype(float)
    predict_outcome(x, STUDY.outcome, ~STUDY.treat, STUDY.starts, OutcomeModel("covariates", Recorder(), folds=4))
    assert len(Recorder.seen) == 4 and all(len(s) == 9 for s in Recorder.seen)
    Recorder.seen.clear()
    predict_outcome(x, STUDY.outcome, ~STUDY.treat, STUDY.starts, OutcomeModel("covariates and clusters", Recorder(), folds=4))
    assert all(len(s) == 12 for s in Recorder.seen)


@pytest.mark.parametrize("option", [dict(folds=2), dict(seed=1), dict(learner=DecisionTreeRegressor(max_depth=1)), dict(knows="covariates and clusters")])
def test_every_option_changes_the_prediction(option):
    tree = dict(knows="covariates", learner=DecisionTreeRegressor(max_depth=3, random_state=0))
    w = balancing_weights(STUDY, tolerance=0.3)
    base, other = (w.estimate(outcome_model=OutcomeModel(**o), bias_corrected=True).estimate for o in (tree, tree | option))
    assert base != other


def test_a_learner_can_be_given_bare():
    w = balancing_weights(STUDY, tolerance=0.3)
    tree = DecisionTreeRegressor(max_depth=3, random_state=0)
    assert w.estimate(outcome_model=tree).std_error == w.estimate(outcome_model=OutcomeModel(learner=tree)).std_error
    assert w.estimate(outcome_model=tree).std_error != w.estimate().std_error


def test_cluster_means_count_kept_units_only():
    kept = np.arange(STUDY.n) % 2 == 0
    columns = outcome_features(STUDY.x, STUDY.treat, 1.0 * kept, STUDY.starts, "covariates and cluster means")
    mine = (STUDY.cluster == 4) & kept
    assert_allclose(columns[mine][0, 2:], [*STUDY.x[mine].mean(axis=0), STUDY.treat[mine].mean()], rtol=1e-12)


def test_a_target_from_outside_cannot_be_corrected():
    w = balancing_weights(STUDY, estimand="ATE", target={"age": 0.1, "poor": 0.4})
    with pytest.raises(InputError, match="comes from outside"):
        w.estimate(bias_corrected=True)


def test_an_outcome_model_that_would_play_no_part_is_refused():
    survey = Study.survey(FRAME.assign(score=FRAME["score"].where(FRAME["age"] < 1)), outcome="score", cluster="school", covs=["age", "poor"])
    w = balancing_weights(survey)
    with pytest.raises(InputError, match="plays no part"):
        w.estimate(vcov="CR2", outcome_model="covariates")
    assert "The outcome model knows: none." in w.estimate(vcov="CR2").explain()
    assert "no outcome model is subtracted" in w.estimate(vcov="CR2").explain() and "both arms" not in w.estimate(vcov="CR2").explain()
    assert w.estimate(vcov="CR2", outcome_model="covariates", bias_corrected=True).std_error == w.estimate(vcov="CR2").std_error
