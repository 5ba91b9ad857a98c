"""Bounds under hidden confounding: against linear programmes, brute force, and hidden covariates that are known."""

import itertools
import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
from helpers import pupils, schools
from numpy.testing import assert_allclose
from scipy.optimize import linprog

from clusterweights import (DroppedUnitsWarning, InputError, OverlapWarning, Study, balancing_weights, hierarchical_weights, ipw_weights,
                            sensitivity_analysis, unadjusted_weights)
from clusterweights.sensitivity import TiltedMean

pytestmark = pytest.mark.filterwarnings("ignore::clusterweights.core.ClusterWeightsWarning")
DATA = schools(n_schools=6, size=18, seed=3)
ROLES = {"treat": "late", "cluster": "school", "covs": ["age", "income"], "outcome": "score"}


def study(data=DATA, **changes):
    return Study(data, **(ROLES | changes))


def whole_schools(data=DATA):
    "Late is a property of the school."
    return study(data.assign(late=data["school"] % 2))


def quick(weights, **options):
    return sensitivity_analysis(weights, **({"replicates": 0, "progress": False} | options))


def by_corners(y, w, lam):
    "Smallest and largest mean over all ways to give each unit one of the two extreme factors."
    means = [np.average(y, weights=w * np.array(f)) for f in itertools.product([lam, 1 / lam], repeat=len(y))]
    return min(means), max(means)


# --- one mean -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("lam", [1.0, 1.05, 2.0, 50.0])
def test_against_all_corners(seed, lam):
    rng = np.random.default_rng(seed)
    y, w = np.round(rng.normal(size=9), 1 if seed % 2 else 12) + 1e3 * (seed == 4), rng.exponential(size=9) * (rng.uniform(size=9) > 0.2)
    mean = TiltedMean.of(y, w)
    used = w > 0
    assert_allclose([mean.at(-np.log(lam)), mean.at(np.log(lam))], by_corners(y[used], w[used], lam), rtol=1e-12, atol=1e-12)


def test_array_scalar_and_monotone():
    rng = np.random.default_rng(0)
    mean = TiltedMean.of(rng.normal(size=300), rng.exponential(size=300))
    logs = np.linspace(-8, 8, 801)
    values = mean.at(logs)
    assert (np.diff(values) > 0).all()
    assert_allclose(values, [mean.at(v) for v in logs], rtol=1e-13)
    assert_allclose([mean.reaching(v) for v in values], logs, atol=1e-7)


def test_extremes():
    mean = TiltedMean.of(np.array([0.0, 1, 5]), np.ones(3))
    assert_allclose([mean.at(200.0), mean.at(-200.0)], [5, 0], atol=1e-12)
    assert mean.reaching(5.0) == np.inf and mean.reaching(0.0) == -np.inf and mean.reaching(6) == np.inf
    assert TiltedMean.of(np.ones(4), np.ones(4)).at(3.0) == 1.0


# --- effects ------------------------------------------------------------------------------------------------------


def program(y, treat, w, moves, lam, sign):
    "The extreme effect, arm by arm, as linear programmes after Charnes and Cooper."
    total = 0.0
    for arm, s in ((treat, sign), (~treat, -sign)):
        yy, ww = y[arm & (w > 0)], w[arm & (w > 0)]
        top = lam if ("treated" if arm is treat else "controls") in moves else 1.0
        m = len(yy)
        limits = np.block([[np.eye(m), -top * ww[:, None]], [-np.eye(m), ww[:, None] / top]])
        mean = s * -linprog(np.r_[-s * yy, 0], A_ub=limits, b_ub=np.zeros(2 * m), A_eq=[np.r_[np.ones(m), 0]], b_eq=[1], bounds=(0, None)).fun
        total += mean if arm is treat else -mean
    return total


@pytest.mark.parametrize("estimand, moves", [("ATT", ["controls"]), ("ATC", ["treated"]), ("ATE", ["treated", "controls"])])
@pytest.mark.parametrize("make", [lambda s, e: hierarchical_weights(s, 1.0, estimand=e), lambda s, e: balancing_weights(s, estimand=e)])
def test_bounds_against_programs(estimand, moves, make):
    w = make(study(), estimand)
    found, s = quick(w), w.study
    assert_allclose(found.bounds(1.0), [w.estimate().estimate] * 2, rtol=1e-12)
    for lam in (1.2, 3.0):
        expected = [program(s.outcome, s.treat, w.in_order, moves, lam, sign) for sign in (-1, 1)]
        assert_allclose(found.bounds(lam), expected, atol=1e-8)
    lam = quick(w, null=0.3).lam_null
    assert_allclose(np.abs(np.subtract(quick(w).bounds(lam), 0.3)).min(), 0, atol=1e-9)


def test_clusters_share_a_factor():
    w = balancing_weights(whole_schools(), tolerance="auto")
    s, found = w.study, quick(w)
    assert found.by == "clusters" and quick(hierarchical_weights(study(), 1.0)).by == "units"
    rows = [slice(a, b) for a, b in zip(s.starts[:-1], s.starts[1:]) if not s.treat[a] and w.in_order[a:b].sum() > 0]
    y, total = ([f(r) for r in rows] for f in (lambda r: np.average(s.outcome[r], weights=w.in_order[r]), lambda r: w.in_order[r].sum()))
    treated = np.average(s.outcome[s.treat], weights=w.in_order[s.treat])
    low, high = by_corners(np.array(y), np.array(total), 1.8)
    assert_allclose(found.bounds(1.8), [treated - high, treated - low], rtol=1e-10)
    units = quick(w, by="units").bounds(1.8)
    assert units[0] < found.bounds(1.8)[0] and units[1] > found.bounds(1.8)[1]


def test_hidden_factors_stay_within():
    rng, w = np.random.default_rng(8), hierarchical_weights(study(), 1.0)
    s, (low, high) = w.study, quick(w).bounds(1.5)
    for _ in range(200):
        v = np.where(s.treat, 1, 1.5 ** rng.uniform(-1, 1, s.n)) * w.in_order
        assert low <= np.average(s.outcome[s.treat], weights=v[s.treat]) - np.average(s.outcome[~s.treat], weights=v[~s.treat]) <= high


def test_null_out_of_reach():
    data = DATA.assign(score=DATA["score"] + 1000 * DATA["late"])
    found = quick(hierarchical_weights(study(data), 1.0))
    assert found.lam_null == np.inf and "No factors" in found.sentence()
    both = quick(hierarchical_weights(study(data), 1.0, estimand="ATE"))
    assert both.lam_null == np.inf


def test_units_and_signs():
    base = quick(hierarchical_weights(study(), 1.0))
    other = quick(hierarchical_weights(study(DATA.assign(score=5 - 2 * DATA["score"])), 1.0))
    assert_allclose(other.lam_null, base.lam_null, rtol=1e-9)
    assert_allclose(other.bounds(1.4), [-2 * base.bounds(1.4)[1], -2 * base.bounds(1.4)[0]], rtol=1e-9)


# --- the bootstrap ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("estimand", ["ATT", "ATC", "ATE"])
def test_interval(estimand, sign):
    w = hierarchical_weights(study(DATA.assign(score=sign * (DATA["score"] + 2 * DATA["late"]))), 1.0, estimand=estimand)
    found = quick(w, replicates=199, lams=[1, 1.2, 4])
    table = found.table()
    assert_allclose(table.loc[0, ["conf_low", "conf_high"]].astype(float), w.bootstrap(replicates=199, progress=False).conf_int(), rtol=1e-12)
    assert (table["conf_low"] < table["low"]).all() and (table["high"] < table["conf_high"]).all() and (np.diff(table["conf_low"]) < 0).all()
    at = found.lam_null_interval()
    assert 1 < at < found.lam_null
    if len(found.draws.draws) == 199:                   # else quantiles lie between draws
        ends = quick(w, replicates=199, lams=[at]).table().loc[0, ["conf_low", "conf_high"]].astype(float)
        assert_allclose(np.abs(ends).min(), 0, atol=1e-9)


def test_interval_that_holds_the_null_already():
    data = DATA.assign(score=np.random.default_rng(0).normal(size=len(DATA)))
    found = quick(hierarchical_weights(study(data), 1.0), replicates=199)
    assert found.lam_null_interval() == 1 and "even if nothing is hidden" in found.sentence()


def test_null_far_away():
    found = quick(hierarchical_weights(study(DATA.assign(score=DATA["score"] + 1000 * DATA["late"])), 1.0), replicates=199)
    assert found.lam_null_interval() == np.inf


# --- benchmarks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimand", ["ATT", "ATC"])
def test_bias_is_the_change_if_outcomes_are_linear(estimand):
    data = DATA.assign(score=2 * DATA["age"] - DATA["income"] + 0.5 * DATA["late"])
    for w in (balancing_weights(study(data), estimand=estimand), hierarchical_weights(study(data), 1.0, estimand=estimand)):
        marks = quick(w).benchmark().frame
        assert_allclose(marks["bias"].astype(float), marks["change"].astype(float), atol=1e-6)
        assert_allclose(marks["imbalance"] * marks["strength"], marks["bias"].abs(), rtol=1e-9)
        assert_allclose(marks.loc["age", "strength"], 2 * DATA["age"].std(ddof=0), rtol=1e-5)


def test_benchmark_lam_is_the_bound():
    w = hierarchical_weights(study(), 1.0)
    found = quick(w)
    for _, row in found.benchmark().frame.iterrows():
        side = 0 if found.estimate > 0 else 1
        assert_allclose(abs(found.estimate - found.bounds(row["lam"])[side]), abs(row["bias"]), atol=1e-9)


def test_cluster_covariates_and_factors():
    data = DATA.assign(size=DATA["school"] ** 2, town=np.random.default_rng(0).choice(["a", "b", "c"], len(DATA)))
    s = study(data, covs=["age", "town", "size"])
    within, across = (quick(w).benchmark().frame for w in (hierarchical_weights(s, 1.0), balancing_weights(s)))
    assert set(within.index) == {"age", "town", "size"} and within.loc["size", "level"] == "cluster" and within.loc["town", "level"] == "unit"
    assert_allclose(within.loc["size", ["imbalance", "bias", "change"]].astype(float), 0, atol=1e-8)
    assert within.loc["size", "lam"] == pytest.approx(1, abs=1e-8)
    assert across.loc["age", "imbalance"] > 0.1


def test_numbers_out_of_range_are_refused():
    found = quick(hierarchical_weights(study(), 1.0))
    for call, words in ((lambda: found.lam_of_bias(-0.1), "0 or more"), (lambda: found.lam_of_bias("a"), "0 or more"),
                        (lambda: found.lam_of_bias(np.nan), "0 or more"), (lambda: found.amplify([1, 2]), "one number"),
                        (lambda: found.amplify(2, ["a"]), "positive numbers"), (lambda: sensitivity_analysis(found.weights.study), "takes Weights")):
        with pytest.raises(InputError, match=words):
            call()


def test_benchmark_of_weights_that_cannot_be_fitted_anew():
    s = study()
    given = sensitivity_analysis(ipw_weights(s, np.full(s.n, 0.4)), replicates=0)
    with pytest.raises(InputError, match="scores that were given"):
        given.benchmark()
    slopes = sensitivity_analysis(ipw_weights(s, "random coefficients", slopes=["age"]), replicates=0)
    with pytest.raises(InputError, match="cannot fit the weights without 'age'"):
        slopes.benchmark()


def test_an_estimate_at_the_null_needs_no_factor():
    s = study()
    found = sensitivity_analysis(hierarchical_weights(s, 1.0), np.full(s.n, 3.7), replicates=0)
    assert found.lam_null == 1.0 and "reach 0" in found.sentence()


def test_amplify():
    found = quick(hierarchical_weights(study(), 1.0))
    table = found.amplify(imbalance=[0.1, 0.4])
    assert_allclose(table["imbalance"] * table["strength"], abs(found.estimate))
    low, high = found.bounds(1.3)
    assert_allclose(found.amplify(1.3)["strength"] * found.amplify(1.3)["imbalance"], found.estimate - low if found.estimate > 0 else high - found.estimate)


# --- shapes and refusals ------------------------------------------------------------------------------------------


def test_prints_pickles_draws():
    import matplotlib
    matplotlib.use("Agg")
    found = quick(hierarchical_weights(study(), 1.0), replicates=79)
    again = pickle.loads(pickle.dumps(found))
    pd.testing.assert_frame_equal(again.table(0.9), found.table(0.9))
    assert "bounds on the ATT" in repr(found) and "<table" in found._repr_html_()
    ax = found.plot()
    assert_allclose(ax.lines[0].get_ydata()[[0, -1]], [found.estimate, found.bounds(3)[0]])


def test_given_outcome():
    w = hierarchical_weights(study(), 1.0)
    assert_allclose(quick(w, outcome=DATA["score"] + DATA["late"]).bounds(1.2), np.add(quick(w).bounds(1.2), 1), rtol=1e-10)


def test_refusals():
    w = hierarchical_weights(study(), 1.0)
    for options, words in (({"lams": [0.9]}, "from 1"), ({"lams": []}, "from 1"), ({"lams": "x"}, "from 1"), ({"by": "schools"}, "Unknown by"), ({"null": np.nan}, "null"),
                           ({"outcome": "points"}, "no outcome"), ({"replicates": 1}, "replicates")):
        with pytest.raises(InputError, match=words):
            quick(w, **options)
    with pytest.raises(InputError, match="only one"):
        quick(unadjusted_weights(pupils())).benchmark()
    with pytest.raises(InputError, match="imbalance"):
        quick(w).amplify(imbalance=[0.0])
    survey = Study.survey(DATA.assign(score=DATA["score"].where(DATA["age"] > -1)), outcome="score", cluster="school", covs=["income"])
    with pytest.raises(InputError, match="survey"):
        quick(balancing_weights(survey))
    with pytest.raises(InputError, match="outside"):
        quick(balancing_weights(study(), estimand="ATE", target={"age": 0.0, "income": 0.5}))


def test_what_weights_have_said_is_not_said_again():
    lost = study(DATA[(DATA["school"] != DATA["school"].iloc[0]) | (DATA["late"] == 1)])
    weights = hierarchical_weights(lost, lam=1.0, tolerance="auto")
    assert weights.target.units < weights.target.all_units
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        sensitivity_analysis(weights, replicates=5, progress=False)
    assert not [w for w in heard if issubclass(w.category, (DroppedUnitsWarning, OverlapWarning))]
