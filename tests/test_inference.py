"""Standard errors against refitting, analysis of variance and closed forms."""

import numpy as np
import pytest
import statsmodels.api as sm
from helpers import anova_components, left_out_by_refitting
from numpy.testing import assert_allclose

from clusterweights import EstimationError, Estimate, InputError
from clusterweights.inference import contrast, fit_linear, residualised_variance


def clustered(seed=1):
    rng = np.random.default_rng(seed)
    cluster = np.repeat(np.arange(6), [3, 4, 5, 3, 6, 4])
    x = rng.normal(size=(25, 1)) + 2 * cluster[:, None]
    y = x[:, 0] + rng.normal(size=6)[cluster] + rng.normal(size=25)
    return x, y, cluster, np.searchsorted(cluster, np.arange(7))


def test_without_clusters_the_residuals_are_those_of_press():
    x, y, _, _ = clustered()
    assert_allclose(y - fit_linear(x, y).left_out, sm.OLS(y, sm.add_constant(x)).fit().get_influence().resid_press, rtol=1e-10)


@pytest.mark.parametrize("kappa", [0.5, 3.0])
def test_with_clusters_the_residuals_are_those_of_refitting(kappa):
    x, y, cluster, starts = clustered()
    assert_allclose(y - fit_linear(x, y, starts, kappa=kappa).left_out, left_out_by_refitting(y, x, cluster, kappa), rtol=1e-9)


def test_kappa_is_that_of_an_analysis_of_variance():
    x, y, cluster, starts = clustered()
    between, within = anova_components(y, x, cluster)
    assert between > 0
    assert_allclose(y - fit_linear(x, y, starts).left_out, left_out_by_refitting(y, x, cluster, within / between), rtol=1e-9)


def test_clusters_that_are_alike_count_as_none():
    alike = np.tile([1.0, -1.0, 3.0, -3.0, 2.0], 5)
    assert_allclose(alike - fit_linear(np.zeros((25, 0)), alike, np.arange(0, 26, 5)).left_out, (alike - alike.mean()) * 25 / 24, rtol=1e-12)


def test_a_negative_component_counts_as_no_clusters():
    y, cluster = np.random.default_rng(1).normal(size=30), np.repeat(np.arange(6), 5)
    assert anova_components(y, np.zeros((30, 0)), cluster)[0] < 0
    assert_allclose(y - fit_linear(np.zeros((30, 0)), y, np.arange(0, 31, 5)).left_out, (y - y.mean()) * 30 / 29, rtol=1e-12)


def test_a_unit_that_no_other_predicts_keeps_its_deviation_from_the_mean():
    y, x = np.array([1.0, 2.0, 4.0, 9.0]), np.array([[0.0], [0], [0], [1]])
    assert_allclose(y - fit_linear(x, y).left_out, [1 - 3, 2 - 2.5, 4 - 1.5, 9 - 4], atol=1e-12)


def test_the_variance_is_a_sum_over_units():
    assert residualised_variance(np.array([1.0, 3.0]), np.array([2.0, -1.0])) == pytest.approx((1 / 4) ** 2 * 4 + (3 / 4) ** 2 * 1)


def test_a_contrast_adds_both_arms():
    y, t, w = np.array([1.0, 5, 2, 4]), np.array([True, True, False, False]), np.array([1.0, 1, 3, 1])
    e = contrast(y, t, w, np.array([1.0, 2, 3, 4]), "ATC")
    assert e.estimate == pytest.approx(3 - 2.5)
    assert e.std_error == pytest.approx(np.sqrt((1 + 4) / 4 + (9 * 9 + 16) / 16))
    assert e.term == "ATC"


@pytest.mark.parametrize("lone", [0, 3])
def test_one_weighted_unit_in_an_arm_is_not_enough(lone):
    y, t = np.arange(6.0), np.arange(6) < 3
    with pytest.raises(EstimationError, match="1 unit with weight"):
        contrast(y, t, np.where((np.arange(6) == lone) | (t != t[lone]), 1.0, 0.0), y)


def test_no_residual_is_no_standard_error():
    with pytest.raises(EstimationError, match="does not vary"):
        contrast(np.arange(4.0), np.arange(4) < 2, np.ones(4), np.zeros(4))


@pytest.mark.parametrize("level", [0, 1, -0.1, 1.5, "high"])
def test_a_level_lies_between_zero_and_one(level):
    with pytest.raises(InputError, match="between 0 and 1"):
        Estimate(-0.2, 0.1, 0.1, 0.3).conf_int(level)


def test_intervals_are_those_of_the_normal_and_the_t_distribution():
    row = Estimate(-0.2, 0.1, 0.1, 0.3).tidy(0.9).iloc[0]
    assert_allclose([row["conf_low"], row["conf_high"]], [-0.2 - 0.1 * 1.6448536269514722, -0.2 + 0.1 * 1.6448536269514722])
    assert row["p_value"] == pytest.approx(0.04550026389635842)
    assert_allclose(Estimate(0.0, 1.0, 0, 0, df=4).conf_int(), [-2.7764451051977987, 2.7764451051977987])


def test_an_estimate_prints_both_means():
    assert "treated 0.100, of the controls 0.300" in " ".join(str(Estimate(-0.2, 0.1, 0.1, 0.3)).split())
