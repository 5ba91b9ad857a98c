"""What an estimate speaks of: totals, outside targets, lost clusters, and what balance is measured against."""

import warnings

import numpy as np
import pandas as pd
import pytest

import clusterweights as cw

RNG = np.random.default_rng(12)
N = 400
FRAME = pd.DataFrame({"g": RNG.integers(0, 12, N), "a": RNG.normal(size=N), "b": RNG.normal(size=N), "people": RNG.integers(1, 6, N)})
FRAME["z"] = RNG.uniform(size=N) < 1 / (1 + np.exp(1 - 0.5 * FRAME["a"]))
FRAME["y"] = FRAME["a"] + FRAME["g"] / 4 + FRAME["z"] + RNG.normal(size=N)
ROLES = dict(cluster="g", covs=["a", "b"], outcome="y")


def test_a_total_is_that_of_the_units_spoken_of():
    silent = FRAME["g"].isin([0, 1]) | (RNG.uniform(size=N) < 0.3)
    survey = cw.Study.survey(FRAME.assign(y=FRAME["y"].where(~silent)), sampling_weights="people", **ROLES)
    with pytest.warns(cw.DroppedUnitsWarning, match="no respondents"):
        weights = cw.hierarchical_weights(survey, estimand="total", lam=1.0)
    known = FRAME["y"].where(~silent, 0.0)
    total = weights.estimate().estimate
    assert total == pytest.approx((weights.weights * known).sum() * survey.weight_scale, rel=1e-10)
    kept = ~FRAME["g"].isin([0, 1])
    mean = np.average(known, weights=weights.weights)
    assert total == pytest.approx(mean * FRAME.loc[kept, "people"].sum(), rel=1e-8)


def test_balance_of_a_survey_is_against_its_totals():
    silent = RNG.uniform(size=N) < 0.4
    totals = {"a": 200.0, "b": -100.0, "N": 1000}
    survey = cw.Study.survey(FRAME.assign(y=FRAME["y"].where(~silent)), totals=totals, **ROLES)
    balance = cw.balancing_weights(survey).balance()
    np.testing.assert_allclose(balance.table["SMD, weighted"], 0, atol=1e-9)
    np.testing.assert_allclose(balance.table["mean population"], [0.2, -0.1])
    respondents = FRAME.loc[~silent, "a"]
    pooled = np.sqrt((FRAME["a"].var() + respondents.var()) / 2)
    assert balance.table.loc["a", "SMD"] == pytest.approx((0.2 - respondents.mean()) / pooled)
    assert np.isnan(balance.l2.loc["local", "after"])


def test_the_studys_own_frame_as_target_is_the_effect_on_everybody():
    study = cw.Study(FRAME, treat="z", sampling_weights="people", **ROLES)
    for method, options in ((cw.balancing_weights, {}), (cw.hierarchical_weights, {"lam": 1.0})):
        np.testing.assert_allclose(method(study, estimand="ATE", target=FRAME, **options).weights, method(study, estimand="ATE", **options).weights,
                                   atol=1e-8)


@pytest.mark.parametrize("kind", [pd.Series, dict, lambda m: m.to_numpy(), list])
def test_means_may_come_in_any_form(kind):
    study = cw.Study(FRAME, treat="z", **ROLES)
    means = pd.Series({"a": 0.2, "b": -0.1})
    weights = cw.balancing_weights(study, estimand="ATE", target=kind(means))
    for arm in (FRAME["z"], ~FRAME["z"]):
        np.testing.assert_allclose(np.average(FRAME.loc[arm, ["a", "b"]], weights=weights.weights[arm], axis=0), means, atol=1e-9)
    assert "largest miss of the target" in str(weights.summary())


def test_rows_left_out_for_gaps_are_of_unknown_arm():
    with pytest.warns(cw.DroppedUnitsWarning):
        study = cw.Study(FRAME.assign(a=FRAME["a"].where(FRAME.index > 1)), treat="z", missing="drop", **ROLES)
    frame = cw.unadjusted_weights(study).to_frame()
    assert frame["treated"].isna().sum() == 2 and frame["treated"].sum() == FRAME.loc[2:, "z"].sum()


def test_one_impossible_covariate_does_not_spoil_the_others():
    study = cw.Study(FRAME.assign(told=FRAME["z"].astype(float)), treat="z", cluster="g", covs=["a", "told"], outcome="y")
    with pytest.warns(cw.OverlapWarning, match="loosened"):
        weights = cw.balancing_weights(study, tolerance="auto")
    assert abs(weights.balance().table.loc["a", "SMD, weighted"]) < 1e-9


def test_clusters_can_count_the_same_without_adjustment():
    study = cw.Study(FRAME, treat="z", **ROLES)
    for estimand in ("ATT", "ATE"):
        weights = cw.unadjusted_weights(study, estimand=estimand, cluster_weight="clusters")
        by_cluster = FRAME.groupby(["z", "g"])["y"].mean().groupby("z").mean()
        assert weights.estimate().mean_control == pytest.approx(by_cluster[False])


def test_a_row_that_speaks_of_others_is_marked():
    study = cw.Study(FRAME, treat="z", **ROLES)
    comparison = cw.compare(study, ["unadjusted", "balancing"], estimand="ATE", target={"a": 0.2, "b": -0.1})
    assert "Unadjusted does not know 'target'" in comparison.reading()


def test_an_infeasible_arm_is_named_and_its_weights_fit_the_rows():
    study = cw.Study(FRAME.assign(far=FRAME["a"] + 9 * FRAME["z"]), treat="z", cluster="g", covs=["b", "far"], outcome="y")
    with pytest.raises(cw.InfeasibleError, match="Weighting the controls") as caught:
        cw.balancing_weights(study, estimand="ATE")
    assert caught.value.weights.shape == (N,) and (caught.value.weights[FRAME["z"]] == 0).all()
    assert caught.value.weights.sum() == pytest.approx(N)


def test_the_smallest_tolerances_are_lexicographic():
    from clusterweights.qp import with_tolerance
    from clusterweights.qp import BlockSums, Problem, exact_means, exact_totals
    x = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    problem = Problem(BlockSums(np.zeros((4, 1)), np.array([0, 4]), np.ones(1)), np.zeros((1, 1)), np.ones(4),
                      (exact_means(x, np.array([[3.0, 0.25]]), np.array([4.0]), spread=np.ones(2)), exact_totals(np.array([0, 4]), np.array([4.0]))))
    np.testing.assert_allclose(with_tolerance(problem, "auto").constraints[0].tolerance, [[2.02, 0.0]], atol=1e-9)


def test_warnings_point_at_the_callers_line():
    lost = cw.Study(FRAME[~((FRAME["g"] == 3) & ~FRAME["z"])], treat="z", **ROLES)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cw.compare(lost, lam=1.0)
    assert {w.filename for w in caught} == {__file__}
