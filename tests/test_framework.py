"""Balance measures against numpy and by hand."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from numpy.testing import assert_allclose

from clusterweights import Study
from clusterweights.datasets import late_entry_study
from clusterweights.framework import arm_moments, balance, ess, root_mean_square, standardized_differences


def toy():
    "Treated + controls by cluster: 2 + 2, 1 + 3, 3 + 1, 1 + 1, 2 + 2, the last without weight on its controls."
    z = [1, 1, 0, 0] + [1, 0, 0, 0] + [1, 1, 1, 0] + [1, 0] + [1, 1, 0, 0]
    g = np.repeat([0, 1, 2, 3, 4], [4, 4, 4, 2, 4])
    x = np.array([1, 3, 2, 6, 4, 1, 2, 5, 7, 1, 0, 3, 2, 2.5, 1, 4, 9, 5])
    study = Study(pd.DataFrame({"z": z, "g": g, "x": x}), treat="z", cluster="g", covs="x")
    weights = np.where(study.treat, 1.0, 0.5 + np.arange(18) / 10)
    weights[(g == 4) & ~study.treat] = 0
    return study, weights


def test_the_weighted_variance_is_that_of_numpy():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=12), rng.exponential(size=12)
    total, mean, variance = arm_moments(x[:, None], w, np.array([0, 12]))
    assert total[0] == pytest.approx(w.sum())
    assert mean[0, 0] == pytest.approx(np.average(x, weights=w), rel=1e-12)
    assert variance[0, 0] == pytest.approx(np.cov(x, aweights=w, ddof=1), rel=1e-12)


@pytest.mark.parametrize("weight", [0.3, 0.1])
def test_one_weighted_unit_has_no_variance(weight):
    assert np.isnan(arm_moments(np.array([[0.1], [0.2]]), np.array([weight, 0.0]), np.array([0, 2]))[2]).all()


def test_rounding_errors_are_no_variation():
    x = np.array([0.1 * 3, 0.3, 0.3, 0.1 * 3, 0.3, 0.3])[:, None]
    before, after = standardized_differences(x, np.arange(6) < 3, np.array([0, 6]), np.ones(6), np.ones(6))
    assert np.isnan(before).all()
    assert np.isnan(after).all()


def test_small_measures():
    assert root_mean_square(np.array([3.0, np.nan, 4.0])) == pytest.approx(np.sqrt(12.5))
    assert np.isnan(root_mean_square(np.array([np.nan])))
    assert ess(np.array([1.0, 1, 2])) == pytest.approx(16 / 6)
    assert ess(np.array([1e-300, 1e-300])) == pytest.approx(2)
    assert np.isnan(ess(np.zeros(3)))


def test_local_balance_by_hand():
    study, w = toy()
    b = balance(study, w)
    sd = np.sqrt((np.var([1, 3], ddof=1) + np.var([2, 6], ddof=1)) / 2)
    assert b.local_before[0, 0] == pytest.approx(-2 / sd)
    assert b.local_after[0, 0] == pytest.approx((2 - np.average([2, 6], weights=w[2:4])) / sd)
    assert np.isnan(b.local_before[1:]).all()
    assert np.isnan(b.local_after[1:]).all()
    assert b.table.loc["x", "local L2"] == pytest.approx(2 / sd)
    assert b.table.loc["x", "local L2, weighted"] == pytest.approx(abs(b.local_after[0, 0]))
    assert b.table.loc["x", "clusters judged"] == 1


def test_clusters_that_cannot_be_judged_are_counted():
    study, w = toy()
    assert balance(study, w).undefined == {"fewer than two treated": 2, "fewer than two controls": 1, "no weight in an arm": 1}


def test_global_balance_by_hand():
    study, w = toy()
    b, x, t = balance(study, w), study.x[:, 0], study.treat
    row, sd = b.table.loc["x"], np.sqrt((x[t].var(ddof=1) + x[~t].var(ddof=1)) / 2)
    assert row["mean treated"] == pytest.approx(x[t].mean())
    assert row["mean control"] == pytest.approx(x[~t].mean())
    assert row["mean control, weighted"] == pytest.approx(np.average(x[~t], weights=w[~t]))
    assert row["SMD"] == pytest.approx((x[t].mean() - x[~t].mean()) / sd)
    assert row["SMD, weighted"] == pytest.approx((x[t].mean() - np.average(x[~t], weights=w[~t])) / sd)
    assert row["variance ratio"] == pytest.approx(x[t].var(ddof=1) / x[~t].var(ddof=1))
    assert row["variance ratio, weighted"] == pytest.approx(x[t].var(ddof=1) / np.cov(x[~t], aweights=w[~t], ddof=1))


def test_sizes_and_reductions_by_hand():
    study, w = toy()
    b, t = balance(study, w), study.treat
    assert list(b.ess["units"]) == [9, 7]
    assert_allclose(b.ess["before"], [9, 9])
    assert_allclose(b.ess["after"], [9, w[~t].sum() ** 2 / (w[~t] ** 2).sum()])
    row = b.table.loc["x"]
    assert_allclose(b.l2["before"], row[["SMD", "local L2"]].abs())
    assert_allclose(b.l2["after"], row[["SMD, weighted", "local L2, weighted"]].abs())
    assert_allclose(b.l2["reduction"], 100 * (b.l2["before"] - b.l2["after"]) / b.l2["before"])


def test_units_without_weight_before_count_as_absent():
    study, w = toy()
    keep = np.arange(18) < 12
    part = Study(pd.DataFrame({"z": study.treat[keep], "g": study.cluster[keep], "x": study.x[keep, 0]}), treat="z", cluster="g", covs="x")
    a, b = balance(study, w * keep, keep.astype(float)), balance(part, w[keep])
    assert_allclose(a.l2, b.l2)
    assert_allclose(a.table, b.table)
    assert_allclose(a.ess, b.ess)
    assert a.undefined == b.undefined


def test_separated_arms_are_as_far_apart_as_the_whole_sample_says():
    frame = pd.DataFrame({"z": [1, 1, 0, 0], "g": [1, 2, 1, 2], "x": [1.0, 1, 0, 0]})
    row = balance(Study(frame, treat="z", cluster="g", covs="x"), np.ones(4)).table.loc["x"]
    assert row["SMD"] == pytest.approx(1 / np.std(frame["x"]))


def test_the_love_plot_shows_before_and_after():
    study = late_entry_study()
    b = balance(study, np.where(study.treat, 1.0, 0.3 + study.x[:, 2]))
    axes = b.plot(Figure().subplots(1, 2))
    order = b.table["SMD"].abs().sort_values(ascending=False).index
    for ax, column in zip(axes, ["SMD", "local L2"]):
        dots = [line.get_xdata() for line in ax.lines if line.get_linestyle() == "None"]
        assert_allclose(dots[0], b.table.loc[order, column].abs())
        assert_allclose(dots[1], b.table.loc[order, f"{column}, weighted"].abs())
