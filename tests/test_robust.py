"""Standard errors that count clusters: against R's clubSandwich, a published interval, and definitions."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from clusterweights import EstimationError, FewClustersWarning, InputError, Study, balancing_weights, hierarchical_weights, unadjusted_weights
from clusterweights.inference import Estimate, contrast
from clusterweights.robust import KINDS, cluster_counts, cluster_robust, clustered

REFERENCE = Path(__file__).resolve().parent / "reference"
FITS = json.loads((REFERENCE / "vcov" / "expected.json").read_text())["fits"]
COS = json.loads((REFERENCE / "cos" / "expected.json").read_text())


@pytest.fixture(scope="module")
def hsb():
    frame = pd.read_csv(REFERENCE / "vcov" / "data.csv.gz").sort_values("school", kind="stable")
    return frame, np.r_[0, np.cumsum(frame.groupby("school").size())]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FITS)
def test_variances_and_degrees_of_freedom_are_those_of_r(hsb, name, kind):
    (frame, starts), expected = hsb, FITS[name]
    columns = [c for c in expected["coef"] if c != "(Intercept)"]
    x = np.column_stack([np.ones(len(frame)), frame[columns]])
    weights = {"unw": np.ones(len(frame)), "wsize": frame["w_size"].to_numpy(), "watt": frame["w_att"].to_numpy()}[name.split("_")[0]]
    found, r = cluster_robust(x, frame["mathach"].to_numpy(), weights, starts, kind), expected["clubSandwich"][kind]
    assert_allclose(found.coef, list(expected["coef"].values()), rtol=1e-9)
    assert_allclose(found.vcov, r["vcov"], rtol=1e-8)
    if "df_satt" in r:
        assert_allclose([found.df(c) for c in np.eye(x.shape[1])], r["df_satt"], rtol=1e-8)
    scaled = cluster_robust(x, frame["mathach"].to_numpy(), 1e7 * weights, starts, kind)
    assert_allclose(scaled.vcov, found.vcov, rtol=1e-9)


@pytest.fixture(scope="module")
def schools():
    frame = pd.read_csv(REFERENCE / "cos" / "data_weights_exact.csv.gz")
    frame[["m1", "m0"]] = pd.read_csv(REFERENCE / "cos" / "mhat_ols.csv.gz")
    controls = frame.loc[frame["sector"] == 0, "mathach"]
    frame["y"] = (frame["mathach"] - controls.mean()) / controls.std()
    frame = frame.sort_values("school", kind="stable")
    return frame, np.r_[0, np.cumsum(frame.groupby("school").size())]


@pytest.mark.parametrize(("which", "column", "interval"), [("att", "w_att", (-0.762, 0.589)), ("subset", "w_subset", (-0.294, 0.441))])
def test_the_published_interval_is_cr2_with_a_normal_quantile(schools, which, column, interval):
    frame, starts = schools
    treat, y = frame["sector"].to_numpy() == 1, frame["y"].to_numpy()
    w = np.where(treat & (which == "att"), 1.0, frame[column])
    effect = clustered(contrast(y, treat, w, y), y, treat, w, starts)
    expected = COS[which]
    assert_allclose(effect.estimate, expected["estimate"], atol=1e-9)
    assert_allclose(effect.std_error, expected["CR2"]["se"], rtol=1e-6)
    assert_allclose(effect.df, expected["CR2"]["df_satt"], rtol=1e-6)
    for kind in ("CR0", "CR1", "CR3"):
        assert_allclose(clustered(effect, y, treat, w, starts, kind).std_error, expected[kind]["se"], rtol=1e-6)
    normal = effect.estimate + stats.norm.ppf([0.025, 0.975]) * effect.std_error
    assert_allclose(normal, interval, atol=6e-4)
    if which == "att":
        assert_allclose(effect.conf_int(), (-1.72, 1.55), atol=0.01)
        assert "1.817" in str(effect) and "2.8 independent clusters" in str(effect) and "not 1.96" in str(effect)


def test_one_column_is_the_weighted_mean_and_units_as_clusters_are_its_variance():
    rng = np.random.default_rng(0)
    y, w = rng.normal(size=40), rng.exponential(size=40)
    mean = np.average(y, weights=w)
    found = cluster_robust(np.ones((40, 1)), y, w, np.arange(41), "CR0")
    assert_allclose([found.coef[0], found.vcov[0, 0]], [mean, (w**2 * (y - mean) ** 2).sum() / w.sum() ** 2], rtol=1e-12)


def some_clusters(seed=0, k=9, mixed=False):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 8, size=k)
    cluster = np.repeat(np.arange(k), sizes)
    treat = rng.random(len(cluster)) < 0.5 if mixed else cluster % 2 == 0
    return (rng.normal(size=k)[cluster] + rng.normal(size=len(cluster)), treat, rng.exponential(size=len(cluster)),
            np.r_[0, np.cumsum(sizes)])


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rescaling_an_arm_changes_nothing(kind, mixed):
    y, treat, w, starts = some_clusters(mixed=mixed)
    once = clustered(contrast(y, treat, w, y), y, treat, w, starts, kind)
    other = np.where(treat, 1e5, 1e-5) * w
    again = clustered(contrast(y, treat, other, y), y, treat, other, starts, kind)
    assert_allclose([again.std_error, again.df], [once.std_error, once.df], rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_units_of_weight_zero_are_as_good_as_absent(kind):
    y, treat, w, starts = some_clusters(3)
    w = np.where(np.arange(len(y)) % 3 == 0, 0.0, w)
    w[starts[4]:starts[5]] = 0
    there = clustered(contrast(y, treat, w, y), np.where(w > 0, y, np.nan), treat, w, starts, kind)
    used = w > 0
    sizes = np.add.reduceat(used, starts[:-1])
    gone = clustered(contrast(y, treat, w, y), y[used], treat[used], w[used], np.r_[0, np.cumsum(sizes[sizes > 0])], kind)
    assert_allclose([there.std_error, there.df], [gone.std_error, gone.df], rtol=1e-10)


def test_the_order_of_clusters_does_not_matter():
    y, treat, w, starts = some_clusters(5)
    pieces = [np.arange(a, b) for a, b in zip(starts[:-1], starts[1:])][::-1]
    back = np.concatenate(pieces)
    a = clustered(contrast(y, treat, w, y), y, treat, w, starts)
    b = clustered(contrast(y, treat, w, y), y[back], treat[back], w[back], np.r_[0, np.cumsum([len(p) for p in pieces])])
    assert_allclose([a.std_error, a.df], [b.std_error, b.df], rtol=1e-10)


def test_under_its_working_model_cr2_is_unbiased_and_its_degrees_of_freedom_are_right():
    rng = np.random.default_rng(8)
    _, treat, w, starts = some_clusters(6)
    x = np.column_stack([np.ones(len(w)), treat]).astype(float)
    found = [cluster_robust(x, rng.normal(size=len(w)), w, starts) for _ in range(3000)]
    variances = np.array([f.vcov[1, 1] for f in found])
    truth = (w[treat] ** 2).sum() / w[treat].sum() ** 2 + (w[~treat] ** 2).sum() / w[~treat].sum() ** 2
    df = found[0].df(np.array([0.0, 1.0]))
    assert_allclose(variances.mean(), truth, rtol=4 * np.sqrt(2 / df / 3000))
    assert_allclose(2 * truth**2 / variances.var(), df, rtol=0.2)


@pytest.mark.parametrize(("change", "message"), [
    ({"kind": "HC1"}, "Unknown kind"), ({"starts": np.array([0, 10])}, "1 cluster with weight"), ({"x": np.ones((10, 2))}, "repeat each other")])
def test_what_cannot_be_computed_is_refused(change, message):
    arguments = {"x": np.column_stack([np.ones(10), np.arange(10)]), "y": np.arange(10.0), "weights": np.ones(10), "starts": np.arange(0, 11, 2), "kind": "CR2"} | change
    with pytest.raises((InputError, EstimationError), match=message):
        cluster_robust(**arguments)


def test_a_coefficient_that_hangs_on_one_cluster_has_no_cr3():
    x = np.column_stack([np.ones(10), np.arange(10) < 2]).astype(float)
    with pytest.raises(EstimationError, match="Use CR2"):
        cluster_robust(x, np.arange(10.0) ** 2, np.ones(10), np.arange(0, 11, 2), "CR3")


def test_effective_clusters():
    counts = cluster_counts(np.arange(6) < 3, np.array([2.0, 1, 1, 1, 0, 0]), np.arange(7))
    assert counts.loc["treated"].tolist() == [3, 16 / 6, 0.5]
    assert counts.loc["controls"].tolist() == [1, 1, 1]


# --- through Weights.estimate --------------------------------------------------------------------------------------


def whole_clusters(k=30, effect=1.0, seed=0):
    rng = np.random.default_rng(seed)
    school = np.repeat(np.arange(k), 12)
    size, late = rng.normal(size=k), rng.permutation(np.arange(k) < k // 2)
    x = rng.normal(size=len(school)) + size[school]
    score = x + size[school] + 0.5 * rng.normal(size=k)[school] + rng.normal(size=len(school)) + effect * late[school]
    return Study(pd.DataFrame({"school": school, "late": late[school].astype(int), "x": x, "size": size[school], "score": score}), treat="late",
                 outcome="score", cluster="school", covs=["x", "size"])


def test_whole_clusters_are_counted_by_default():
    study = whole_clusters()
    w = balancing_weights(study)
    effect = w.estimate()
    assert effect.vcov == "CR2, counts clusters" and 5 < effect.df < 30
    assert "whole clusters were treated" in effect.explain() and "Hence vcov='CR2'" in effect.explain()
    assert effect.std_error < w.estimate(outcome_model="none").std_error        # what covariates explain is balanced
    raw = clustered(contrast(study.outcome, study.treat, w.in_order, study.outcome), study.outcome, study.treat, w.in_order, study.starts)
    assert_allclose(w.estimate(outcome_model="none").std_error, raw.std_error, rtol=1e-12)


@pytest.mark.parametrize("estimand", ["ATT", "ATC", "ATE", "ATO"])
@pytest.mark.parametrize("vcov", ["residualised", "population", *KINDS])
def test_every_vcov_for_every_estimand(estimand, vcov):
    study = whole_clusters()
    effect = balancing_weights(study, estimand=estimand).estimate(vcov=vcov)
    assert 0 < effect.std_error < 1 and abs(effect.estimate - 1) < 5 * effect.std_error
    assert f"vcov='{vcov}' was asked for" in effect.explain()


def test_few_clusters_warn():
    with pytest.warns(FewClustersWarning, match="degrees of freedom.*count like"):
        effect = unadjusted_weights(whole_clusters(5)).estimate()
    assert effect.df < 5 and list(effect.clusters["clusters"]) == [2, 3]


def test_a_subgroup_has_its_own_clusters():
    study = whole_clusters(40)
    half = (study.cluster % 4 < 2).astype(int)
    rows = unadjusted_weights(study).estimate(by=study.to_rows(half)).set_index("group")
    for group in (0, 1):
        w = np.where(half == group, unadjusted_weights(study).in_order, 0.0)
        own = clustered(contrast(study.outcome, study.treat, w, study.outcome), study.outcome, study.treat, w, study.starts)
        assert_allclose(rows.loc[group, ["estimate", "std_error", "df"]].astype(float), [own.estimate, own.std_error, own.df], rtol=1e-10)


def test_units_treated_one_by_one_can_be_counted_by_cluster_if_asked():
    rng = np.random.default_rng(4)
    school = np.repeat(np.arange(40), 15)
    frame = pd.DataFrame({"school": school, "x": rng.normal(size=600)})
    frame["late"] = (rng.random(600) < 1 / (1 + np.exp(-0.5 * frame["x"]))).astype(int)
    frame["score"] = frame["x"] + rng.normal(size=40)[school] + rng.normal(size=600) + (1 + 2 * rng.normal(size=40)[school]) * frame["late"]
    w = hierarchical_weights(Study(frame, treat="late", outcome="score", cluster="school", covs="x"), lam=0.5)
    at_hand, elsewhere = w.estimate(), w.estimate(vcov="CR2")
    assert elsewhere.std_error > 1.5 * at_hand.std_error                     # effects differ between clusters: other clusters, another average
    assert "varies within" in at_hand.explain() and elsewhere.df > 20
    assert w.estimate(vcov="population").std_error > at_hand.std_error


def test_the_interval_with_bias():
    effect = Estimate(1.0, 0.5, df=7.0).with_bias(0.3)
    low, high = effect.conf_int(0.9)
    assert_allclose(effect.bias_interval(0.9), [low - 0.3, high + 0.3])
    assert "low with bias" in str(effect) and "low with bias" not in str(effect.with_bias(0))
    assert list(effect.tidy()) == list(Estimate(1.0, 0.5).tidy())


@pytest.mark.parametrize("estimand", ["ATT", "ATC", "ATE", "ATO"])
def test_the_population_error_is_the_spread_over_drawn_units(estimand):
    rng, found = np.random.default_rng(5), []
    for _ in range(400):
        x = rng.normal(size=400)
        z = rng.random(400) < 1 / (1 + np.exp(0.5 - 0.7 * x))
        y = x + 1.5 * x * z + rng.normal(size=400)              # effects differ
        study = Study(pd.DataFrame({"g": np.repeat(np.arange(80), 5), "x": x, "z": z.astype(int), "y": y}), treat="z", outcome="y", cluster="g", covs="x")
        effect = balancing_weights(study, estimand=estimand).estimate(vcov="population")
        found.append((effect.estimate, effect.std_error))
    estimates, errors = np.array(found).T
    assert abs(errors.mean() / estimates.std() - 1) < 0.12      # Monte Carlo error .035; for the units at hand it would be .18 to .28 too small
