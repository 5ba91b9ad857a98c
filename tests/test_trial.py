"""Cluster-randomised designs against R's numbers for the EGAP guide, exact enumeration and brute force."""

import json
import pickle
from itertools import combinations, product
from pathlib import Path
from time import perf_counter

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import clusterweights as cw
from clusterweights.robust import cluster_robust
from clusterweights.trial import (TARGETS, Trial, balance_test, design_effect, effective_n, false_positive_rates, intracluster_correlation,
                                  model_effect, pair_effect, plot_power, power_grid, profile_interval, randomisation_interval, randomisation_test, rejection_rates,
                                  sampling_distribution, simulate_plan, simulate_power, simulate_trial, trial_effect, two_stage_effects)

EGAP = Path(__file__).parent / "reference" / "egap"
EXPECTED = json.loads((EGAP / "expected.json").read_text())
ESTIMATR = json.loads((EGAP / "estimatr.json").read_text())


def load(name):
    return pd.read_csv(EGAP / f"{name}.csv.gz")


def starts_of(codes):
    return np.r_[0, np.flatnonzero(np.diff(codes)) + 1, len(codes)]


def as_trial(frame, cluster="j", **more):
    return Trial(frame["Y"], frame["Z"], starts_of(frame[cluster]), **more)


@pytest.fixture(scope="module")
def pretend():
    return load("pretend_data")


@pytest.fixture(scope="module")
def firms():
    return load("firms")


def uneven(seed, block=None, treated=None, clusters=8):
    "A small trial of unequal clusters, two treated in each block."
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 9, clusters)
    block = np.zeros(clusters, int) if block is None else np.asarray(block)
    z = np.zeros(clusters, bool)
    for b in np.unique(block):
        z[rng.permutation(np.flatnonzero(block == b))[:2 if treated is None else treated]] = True
    y = np.repeat(rng.normal(size=clusters), sizes) + rng.normal(size=sizes.sum())
    return Trial(y, np.repeat(z, sizes), np.r_[0, np.cumsum(sizes)], np.repeat(block, sizes))


def every_assignment(block, drawn):
    "By brute force: each way to draw `drawn[b]` clusters of each block."
    ways = [combinations(np.flatnonzero(block == b), k) for b, k in enumerate(drawn)]
    for picks in product(*ways):
        yield np.isin(np.arange(len(block)), np.concatenate(picks))


# --- parts 1 to 3 ------------------------------------------------------------------------------------------------


def test_design_effect():
    want = EXPECTED["design_effect"]
    assert design_effect(np.full(10, 20), 0.5) == pytest.approx(want["deff"], abs=1e-12)
    assert effective_n(np.full(10, 20), 0.5) == pytest.approx(want["effective_n"], abs=1e-6)
    sizes = np.array([3, 9, 20])                                    # the variance of a mean by its definition
    rho, cov = 0.3, np.zeros((32, 32))
    cluster = np.repeat(np.arange(3), sizes)
    cov = np.where(cluster[:, None] == cluster, rho, 0) + (1 - rho) * np.eye(32)
    assert design_effect(sizes, rho) == pytest.approx(cov.mean() * 32, abs=1e-12)


def test_true_standard_error(pretend):
    found = sampling_distribution(pretend["Y1"], pretend["Y0"], starts_of(pretend["j"]), 5)
    want = EXPECTED["pretend"]
    assert found.enumerated and len(found.values) == want["n_assignments"]
    assert found.std_error == pytest.approx(want["true_SE_population_denominator"], abs=1e-6)
    assert found.values.std(ddof=1) == pytest.approx(want["true_SE"], abs=1e-6)
    four = load("J_4_clusters")
    exact = sampling_distribution(four["Y1"], four["Y0"], starts_of(four["j"]), 2)
    assert exact.values.std(ddof=1) == pytest.approx(EXPECTED["compare_SE"]["J4_exact"], abs=1e-6)
    thirty = load("J_30_clusters")
    drawn = sampling_distribution(thirty["Y1"], thirty["Y0"], starts_of(thirty["j"]), 15, draws=20_000)
    assert not drawn.enumerated                                     # R drew 5,000: a spread has the error se/sqrt(2R)
    assert drawn.std_error == pytest.approx(0.161, abs=4 * 0.161 / np.sqrt(2 * 5000) + 0.0005)


@pytest.mark.parametrize(("row", "j"), [(0, 4), (1, 30), (2, 100)])
def test_standard_errors_over_the_number_of_clusters(row, j):
    "Printed to three digits; the simulated one from 5,000 lots drawn by R."
    want, frame = EXPECTED["compare_SE"]["table"][row], load(f"J_{j}_clusters")
    trial = as_trial(frame)
    assert (want["J"], len(trial.sizes), len(trial.y)) == (j, j, 100 * j)
    assert trial_effect(trial, vcov="iid").std_error == pytest.approx(want["IID_SE"], abs=5e-4)
    assert trial_effect(trial, vcov="CR1").std_error * np.sqrt((100 * j - 1) / (100 * j - 2)) == pytest.approx(want["RCSE"], abs=5e-4)
    true = sampling_distribution(frame["Y1"], frame["Y0"], starts_of(frame["j"]), j // 2, draws=50_000)
    assert true.enumerated == (j == 4)
    assert true.std_error == pytest.approx(want["simulated_SE"], abs=4 * true.std_error / np.sqrt(2 * 5000) + 5e-4)


def test_a_hundred_clusters():
    "One trial, four analyses: where statsmodels and the closed forms must agree to 1e-6."
    frame = load("J_100_clusters")
    trial = as_trial(frame)
    assert trial.totals.sum() == pytest.approx(frame["Y"].sum(), abs=1e-8)
    statsmodels = pytest.importorskip("statsmodels.api")
    fit = statsmodels.OLS(trial.y, np.column_stack([np.ones(10_000), trial.treat])).fit()
    robust = fit.get_robustcov_results("cluster", groups=frame["j"])
    assert trial_effect(trial).estimate == pytest.approx(fit.params[1], abs=1e-10)
    assert trial_effect(trial, vcov="iid").std_error == pytest.approx(fit.bse[1], abs=1e-9)
    assert trial_effect(trial, vcov="CR1").std_error * np.sqrt(9999 / 9998) == pytest.approx(robust.bse[1], abs=1e-9)
    normal = trial_effect(trial, "horvitz_thompson", vcov="null")
    test = randomisation_test(trial, draws=20_000)
    assert test.std_error == pytest.approx(normal.std_error, abs=4 * normal.std_error / np.sqrt(2 * 20_000))
    means = trial.totals / 100
    assert trial_effect(trial).p_value == pytest.approx(stats.ttest_ind(means[trial.treated], means[~trial.treated]).pvalue, abs=1e-9)
    assert test.p_value == pytest.approx(trial_effect(trial).p_value, abs=0.02)


def test_standard_errors(pretend):
    trial, want = as_trial(pretend), EXPECTED["pretend"]
    iid = trial_effect(trial, vcov="iid")
    assert iid.estimate == pytest.approx(want["ATE"], abs=1e-6)
    assert iid.std_error == pytest.approx(want["IID_SE"], abs=1e-6)
    stata = np.sqrt(999 / 998)                                      # the guide's small-sample factor beyond CR1's J / (J − 1)
    assert trial_effect(trial, vcov="CR1").std_error * stata == pytest.approx(want["RCSE"], abs=1e-6)
    for kind, key in (("CR0", "lm_robust_CR0"), ("CR2", "lm_robust_CR2"), ("neyman", "difference_in_means_clustered")):
        assert trial_effect(trial, vcov=kind).std_error == pytest.approx(ESTIMATR[key]["se"], abs=1e-6)
    cr2 = trial_effect(trial)
    assert (cr2.df, cr2.p_value) == pytest.approx((ESTIMATR["lm_robust_CR2"]["df"], ESTIMATR["lm_robust_CR2"]["p"]), abs=1e-6)
    assert cr2.conf_int() == pytest.approx(ESTIMATR["lm_robust_CR2"]["ci"], abs=1e-6)


def test_hansen_bowers_totals(pretend):
    trial, want = as_trial(pretend), EXPECTED["hansen_bowers"]
    normal = trial_effect(trial, "horvitz_thompson", vcov="null")
    assert (normal.estimate, normal.std_error, normal.p_value) == pytest.approx((want["cluster_level_ATE"], want["normal_se"], want["normal_p"]), abs=1e-6)
    test = randomisation_test(trial, "horvitz_thompson")
    assert test.enumerated and test.std_error == pytest.approx(want["normal_se"], abs=1e-9)     # the formula is the exact spread
    assert test.std_error == pytest.approx(want["perm_se_10000"], abs=4 * test.std_error / np.sqrt(2 * 10_000))
    # the guide's p doubles the smaller tail; its Monte Carlo error is doubled with it
    one_tail = np.mean(test.values >= test.observed * (1 - 1e-12))
    assert 2 * one_tail == pytest.approx(want["perm_p_10000"], abs=4 * 2 * np.sqrt(one_tail * (1 - one_tail) / 10_000))


@pytest.mark.parametrize("block", [None, [0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 0, 1, 0, 1, 1, 1]])
def test_null_variance_is_the_spread_over_all_assignments(block):
    trial = uneven(1, block)
    assert trial_effect(trial, "horvitz_thompson", vcov="null").std_error == pytest.approx(randomisation_test(trial, "horvitz_thompson").std_error, abs=1e-12)


def by_hand(z, y, starts, block, name):
    "The estimators unit by unit."
    unit_z, unit_block = np.repeat(z, np.diff(starts)), np.repeat(block, np.diff(starts))
    pi = np.array([z[block == b].mean() for b in range(block.max() + 1)])[unit_block]
    w = np.where(unit_z, 1 / pi, 1 / (1 - pi))
    if name == "horvitz_thompson":
        return ((w * y)[unit_z].sum() - (w * y)[~unit_z].sum()) / len(y)
    if name == "hajek":
        return np.average(y[unit_z], weights=w[unit_z]) - np.average(y[~unit_z], weights=w[~unit_z])
    return sum((y[unit_z & (unit_block == b)].mean() - y[~unit_z & (unit_block == b)].mean()) * (unit_block == b).mean() for b in range(block.max() + 1))


@pytest.mark.parametrize("block", [None, [0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 0, 1, 0, 1, 1, 1]])
@pytest.mark.parametrize("name", ["difference", "hajek", "horvitz_thompson"])
@pytest.mark.parametrize("null", [0.0, 0.7])
def test_randomisation_by_brute_force(block, name, null):
    trial = uneven(2, block)
    y = trial.y - null * trial.treat
    values = np.array([by_hand(z, y, trial.starts, trial.block, name) for z in every_assignment(trial.block, trial.drawn)])
    observed = by_hand(trial.treated, y, trial.starts, trial.block, name)
    test = randomisation_test(trial, name, null=null)
    assert test.enumerated and len(values) == trial.assignments
    np.testing.assert_allclose(np.sort(test.values), np.sort(values), atol=1e-12)
    assert test.observed == pytest.approx(observed, abs=1e-12)
    assert test.p_value == np.mean(np.abs(values) >= abs(observed) - 1e-10)
    drawn = randomisation_test(trial, name, null=null, draws=17)
    assert not drawn.enumerated and 1 / 18 <= drawn.p_value <= 1


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("draws", [9999, 60])
def test_interval_inverts_the_test(seed, draws):
    trial = uneven(seed, None if seed % 2 else [0, 1, 0, 1, 0, 1, 1, 1], clusters=8)
    level = 0.8
    low, high = randomisation_test(trial, draws=draws).conf_int(level)
    def rejects(null): return randomisation_test(trial, null=null, draws=draws).p_value <= 1 - level + 1e-12
    assert rejects(low - 1e-6) and rejects(high + 1e-6) and not rejects(low + 1e-6) and not rejects(high - 1e-6)
    assert randomisation_test(trial, draws=draws).conf_int(0.5)[1] <= high


def test_any_statistic():
    trial = uneven(3)
    def named(z, y, starts):
        return np.array([by_hand(row, y, starts, trial.block, "difference") for row in z])
    own, built_in = randomisation_test(trial, named, null=0.3), randomisation_test(trial, null=0.3)
    assert own.p_value == built_in.p_value and own.statistic == "named"
    with pytest.raises(cw.InputError, match="randomisation_interval"):
        own.conf_int()
    assert randomisation_interval(trial, named, level=0.8) == pytest.approx(randomisation_test(trial).conf_int(0.8), abs=1e-6)
    assert randomisation_interval(trial, level=0.8) == randomisation_test(trial, seed=int(np.random.default_rng(0).integers(2**63))).conf_int(0.8)
    with pytest.raises(cw.InputError, match="one number for each row"):
        randomisation_test(trial, lambda z, y, starts: np.zeros((len(z), 3)))
    with pytest.raises(cw.EstimationError, match="not finite"):
        randomisation_test(trial, lambda z, y, starts: np.full(len(z), np.nan))


@pytest.mark.parametrize("draws", [9999, 60])
def test_interval_of_totals_is_what_they_do_not_reject(draws):
    trial = uneven(4, [0, 1, 0, 1, 0, 1, 1, 1])
    low, high = randomisation_interval(trial, "horvitz_thompson", level=0.8, draws=draws, seed=5)
    seed = int(np.random.default_rng(5).integers(2**63))
    def rejects(null): return randomisation_test(trial, "horvitz_thompson", null=null, draws=draws, seed=seed).p_value <= 0.2 + 1e-12
    assert rejects(low - 1e-6) and rejects(high + 1e-6) and not rejects(low + 1e-6) and not rejects(high - 1e-6)
    assert randomisation_interval(as_trial(load("J_4_clusters")), "horvitz_thompson") == (-np.inf, np.inf)
    far = trial.with_outcome(trial.y + 30)                              # totals then go with sizes, far from the difference in means
    low, high = randomisation_interval(far, "horvitz_thompson", level=0.8, draws=draws, seed=5)
    assert abs(randomisation_test(far).estimate) < 5 and low < high < -5
    with pytest.raises(cw.EstimationError, match="rejects even 0.*where the search"):
        randomisation_interval(trial, lambda z, y, starts: (z == trial.treated).all(axis=1) * 1.0, draws=draws)


def test_four_clusters_cannot_reject():
    four = randomisation_test(as_trial(load("J_4_clusters")))
    assert four.smallest_p == pytest.approx(1 / 3, abs=1e-12) and four.conf_int() == (-np.inf, np.inf)
    assert "5% cannot reject" in str(four)
    assert "cannot reject" not in str(randomisation_test(uneven(1)))


def test_icc():
    d, want = load("J_30_clusters"), EXPECTED["multilevel_J30"]
    y, starts, z = d["Y"].to_numpy(), starts_of(d["j"]), d["Z"].to_numpy()
    for method in ("anova", "reml"):
        found = intracluster_correlation(y, starts, treat=z, method=method)
        assert found.estimate == pytest.approx(want["icc"], abs=1e-6)
        assert 0 < found.low < found.estimate < found.high < 0.3
    f = stats.f_oneway(*[c for c in (y - np.where(z, y[z == 1].mean(), y[z == 0].mean())).reshape(30, 100)]).statistic * 29 / 28
    low = (f / stats.f.ppf(0.975, 28, 2970) - 1) / (f / stats.f.ppf(0.975, 28, 2970) + 99)
    assert intracluster_correlation(y, starts, treat=z).low == pytest.approx(low, abs=1e-10)
    noise = np.random.default_rng(1).normal(size=3000)
    assert intracluster_correlation(noise - np.repeat(noise.reshape(30, 100).mean(1), 100), starts, method="reml").low == 0
    with pytest.raises(cw.EstimationError):
        intracluster_correlation(y, np.arange(len(y) + 1))


def test_speed():
    rng = np.random.default_rng(0)
    trial = Trial(rng.normal(size=100_000), np.arange(100_000) < 50_000, np.arange(1001) * 100)
    begin = perf_counter()
    randomisation_test(trial, draws=10_000)
    assert perf_counter() - begin < 3


# --- what is refused ---------------------------------------------------------------------------------------------


def test_refusals():
    trial = uneven(1)
    n = len(trial.y)
    with pytest.raises(cw.InputError, match="treatment varies within clusters, in"):
        Trial(trial.y, np.arange(n) % 2, trial.starts)
    with pytest.raises(cw.InputError, match="units of more than one block are found in"):
        Trial(trial.y, trial.treat, trial.starts, np.arange(n) // (n // 2))
    with pytest.raises(cw.InputError, match="one arm only"):
        Trial(trial.y, trial.treat, trial.starts, trial.treat)
    with pytest.raises(cw.InputError, match="same treatment"):
        Trial(trial.y, np.ones(n), trial.starts)
    with pytest.raises(cw.InputError, match="y must be finite"):
        Trial(np.full(n, np.nan), trial.treat, trial.starts)
    with pytest.raises(cw.InputError, match="no outcome"):
        randomisation_test(Trial(None, trial.treat, trial.starts))
    with pytest.raises(cw.InputError, match="of another size"):
        trial_effect(uneven(1, [0, 0, 0, 0, 1, 1, 1, 1]), vcov="pairs")
    with pytest.raises(cw.EstimationError, match="single cluster in an arm"):
        trial_effect(uneven(1, [0, 0, 0, 1, 1, 1, 1, 1]))
    for bad in (dict(statistic="diffrence"), dict(draws=0), dict(null=np.nan)):
        with pytest.raises(cw.InputError):
            randomisation_test(trial, **bad)
    with pytest.raises(cw.InputError, match="at least one treated"):
        sampling_distribution(trial.y, trial.y, trial.starts, 8)


def test_from_a_study():
    frame = pd.DataFrame({"village": list("cacbbdda"), "z": [1, 0, 1, 1, 1, 0, 0, 0], "y": np.arange(8.0), "age": [3, 1, 4, 1, 5, 9, 2, 6], "region": list("nnnssssn")})
    study = cw.Study(frame, treat="z", cluster="village", covs="age", outcome="y")
    trial = Trial.from_study(study, block=frame["region"])
    assert list(trial.labels) == list("abcd") and trial.treated.tolist() == [False, True, True, False] and trial.paired
    assert trial.totals.tolist() == [8, 7, 2, 11] and trial.assignments == 4
    assert pickle.loads(pickle.dumps(trial)).assignments == 4
    assert trial.with_outcome(trial.x[:, 0]).totals.tolist() == [7, 6, 7, 11]


# --- parts 4 and 5: unequal sizes -------------------------------------------------------------------------------


def test_firms_exactly(firms):
    want, starts = EXPECTED["firms"], starts_of(firms["firm"])
    naive = sampling_distribution(firms["Y1"], firms["Y0"], starts, 10)
    assert naive.enumerated and len(naive.values) == 184_756
    assert naive.truth == pytest.approx(want["true_SATE"], abs=1e-6) and naive.expectation == pytest.approx(13.4815, abs=5e-5)
    assert naive.expectation == pytest.approx(want["mean_unweighted_1000"], abs=4 * naive.std_error / np.sqrt(1000))
    for estimator, slope in (("horvitz_thompson", 0.0), ("des_raj", 3.0)):
        found = sampling_distribution(firms["Y1"], firms["Y0"], starts, 10, estimator=estimator, slope=slope)
        assert found.expectation == pytest.approx(want["true_SATE"], abs=1e-6)
    paired = sampling_distribution(firms["Y1"], firms["Y0"], starts, 1, block=np.arange(20) // 2)
    assert paired.enumerated and paired.expectation == pytest.approx(want["true_SATE"], abs=1e-6)
    assert paired.expectation == pytest.approx(want["mean_paired_1000"], abs=4 * paired.std_error / np.sqrt(1000))
    assert paired.std_error == pytest.approx(want["sd_paired"], rel=4 / np.sqrt(2 * 1000))


def test_pairs_as_estimatr():
    frame = load("firms_paired_assignment")
    trial = Trial(frame["Y"], frame["Z"], starts_of(frame["firm"]), frame["pair"])
    want, found = ESTIMATR["firms_matched_pair_clustered"], trial_effect(trial)
    assert (found.estimate, found.std_error, found.df, found.p_value) == pytest.approx((want["est"], want["se"], want["df"], want["p"]), abs=1e-6)


def two_of_three(rng, pairs=3):
    "Pairs of clusters of 2 to 4 people; (2·pairs,) people in each, their starts, both outcomes, and how many are measured."
    people = rng.integers(2, 5, 2 * pairs)
    starts = np.r_[0, np.cumsum(people)]
    y0 = rng.normal(size=starts[-1])
    return people, starts, y0, y0 + rng.normal(1, 1, size=starts[-1]), np.maximum(people - 1, 2)


@pytest.mark.parametrize("weights", ["arithmetic", "harmonic"])
def test_pairs_as_in_the_published_formula(weights):
    "Estimate and variance with weights normalised to the number of units, as Imai, King & Nall print them."
    frame = load("firms_paired_assignment")
    trial = Trial(frame["Y"], frame["Z"], starts_of(frame["firm"]), frame["pair"])
    means = frame.groupby(["pair", "Z"])["Y"].agg(["mean", "size"]).unstack()
    d, n1, n0, n, m = means["mean"][1] - means["mean"][0], means["size"][1], means["size"][0], len(frame), len(means)
    w = n1 + n0 if weights == "arithmetic" else n1 * n0 / (n1 + n0)
    w = n * w / w.sum()
    estimate = (w * d).sum() / n
    variance = m / ((m - 1) * n**2) * ((w * d - n * estimate / m) ** 2).sum()
    found = pair_effect(trial, weights=weights)
    assert (found.estimate, found.std_error**2, found.df) == pytest.approx((estimate, variance, m - 1), abs=1e-9)
    if weights == "arithmetic":
        same = trial_effect(trial)
        assert (found.estimate, found.std_error, found.df) == pytest.approx((same.estimate, same.std_error, same.df), abs=1e-10)
    assert pair_effect(trial, target="UATE", weights=weights).std_error ** 2 == pytest.approx(
        m / (m - 1) * ((w / n * (d - estimate)) ** 2).sum(), abs=1e-9)


@pytest.mark.parametrize("weights", ["arithmetic", "harmonic"])
def test_all_units_of_the_clusters_by_enumeration(weights):
    "CATE: over every draw of units within clusters and every lot, the variance's surplus is the formula's, and with equal effects there is no bias."
    people, starts, y0, y1, measured = two_of_three(np.random.default_rng(8))
    samples = [list(combinations(range(a, b), k)) for a, b, k in zip(starts, starts[1:], measured)]
    block = np.repeat([0, 1, 2], 2)
    def everything(y1):
        values, variances = [], []
        for z in every_assignment(block, [1, 1, 1]):
            for picked in product(*samples):
                rows = np.concatenate(picked)
                one = Trial(np.where(np.repeat(z, measured), y1[rows], y0[rows]), np.repeat(z, measured), np.r_[0, np.cumsum(measured)],
                            np.repeat(block, measured))
                found = pair_effect(one, target="CATE", weights=weights, population=people)
                values.append(found.estimate)
                variances.append(found.std_error**2)
        return np.mean(values), np.var(values), np.mean(variances)
    mean, spread, estimated = everything(y1)
    effect = (np.add.reduceat(y1 - y0, starts[:-1]) / people).reshape(3, 2)
    sizes = people.reshape(3, 2)
    w = sizes.sum(1) if weights == "arithmetic" else sizes.prod(1) / sizes.sum(1)
    w = w / w.sum()
    assert mean == pytest.approx(w @ effect.mean(1), abs=1e-12)
    assert estimated - spread == pytest.approx(1.5 * ((w * effect.mean(1) - mean / 3) ** 2).sum(), abs=1e-12) and estimated > spread
    assert everything(y0 + 2.0)[0] == pytest.approx(2.0, abs=1e-12)


def test_populations_of_pairs():
    "UATE and PATE: over random draws of pairs, units and lots, the estimate is right and so is the ratio's variance; that with weights as given is not."
    rng, pairs, found = np.random.default_rng(9), 60, []
    for _ in range(1500):
        people = np.repeat(rng.integers(10, 60, pairs), 2)
        measured = rng.integers(5, 10, 2 * pairs)
        tau = 2 + people / 30
        z = rng.permuted(np.tile([True, False], (pairs, 1)), axis=1).ravel()
        means = np.repeat(rng.normal(size=pairs), 2) + tau * z + rng.normal(size=2 * pairs) / np.sqrt(measured)
        trial = Trial(np.repeat(means, measured), np.repeat(z, measured), np.r_[0, np.cumsum(measured)], np.repeat(np.arange(2 * pairs) // 2, measured))
        found.append([(e.estimate, e.std_error**2) for e in (
            pair_effect(trial, target="UATE"), pair_effect(trial, target="PATE", population=people), pair_effect(trial, target="CATE", population=people))])
    found, sizes = np.array(found), np.arange(10, 60)
    truth = np.array([(2 + sizes / 30).mean(), (sizes * (2 + sizes / 30)).sum() / sizes.sum()])
    spread, error = found[:, :2, 0].var(0), 4 * np.sqrt(2 / 1500)
    assert (np.abs(found[:, :2, 0].mean(0) - truth) < 4 * np.sqrt(spread / 1500) + 0.01).all()
    assert (np.abs(found[:, :2, 1].mean(0) / spread - 1) < error + 2 / 60).all()
    assert found[:, 2, 1].mean() / spread[1] > 3                       # the same estimate, the other variance


def test_pair_effect_refuses():
    trial = uneven(1, [0, 0, 1, 1, 2, 2, 3, 3], treated=1)
    people = trial.sizes + 3
    assert [pair_effect(trial, target=t, population=people if t in ("CATE", "PATE") else None).term for t in TARGETS] == list(TARGETS)
    for change, match in ((dict(target="ATE"), "Unknown target"), (dict(weights="geometric"), "Unknown weights"), (dict(population=people), "takes no"),
                          (dict(target="PATE"), "takes population="), (dict(target="CATE", population=people[:-1]), "one number for each of 8"),
                          (dict(target="CATE", population=trial.sizes - (np.arange(8) == 2)), "measured, or missing, in 2")):
        with pytest.raises(cw.InputError, match=match):
            pair_effect(trial, **change)
    with pytest.raises(cw.InputError, match="2 blocks of 2 are of another size"):
        pair_effect(uneven(1, [0, 0, 0, 0, 1, 1, 1, 1]))
    with pytest.raises(cw.InputError, match="there is one pair"):
        pair_effect(Trial(np.arange(4.0), [1, 1, 0, 0], [0, 2, 4]))
    with pytest.raises(cw.EstimationError, match="contribute the same"):
        pair_effect(Trial(np.tile([1.0, 0.0], 4), np.tile([1, 0], 4), np.arange(9), np.arange(8) // 2))


@pytest.mark.parametrize("block", [[0] * 8, [0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 0, 1, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2, 3, 3]])
def test_unbiased_by_brute_force(block):
    "Totals are unbiased in any blocks; every estimator's values are those of the trials one would see."
    block, rng = np.array(block), np.random.default_rng(4)
    drawn = np.where(np.bincount(block) == 2, 1, 2)
    sizes = rng.integers(1, 9, 8)
    starts, cluster = np.r_[0, np.cumsum(sizes)], np.repeat(np.arange(8), sizes)
    y0 = rng.normal(size=len(cluster)) + 5
    y1 = y0 + sizes[cluster]
    for estimator in ("difference", "hajek", "horvitz_thompson", "des_raj"):
        found = sampling_distribution(y1, y0, starts, drawn, block=block, estimator=estimator, slope=2.0 * (estimator == "des_raj"))
        if estimator in ("horvitz_thompson", "des_raj"):
            assert found.bias == pytest.approx(0, abs=1e-12)
        else:
            by_unit = [by_hand(z, np.where(z[cluster], y1, y0), starts, block, estimator) for z in every_assignment(block, drawn)]
            np.testing.assert_allclose(np.sort(found.values), np.sort(by_unit), atol=1e-12)


def test_hajek_neyman_is_conservative_and_not_far_off():
    rng = np.random.default_rng(5)
    sizes = rng.integers(5, 15, 40)
    starts, cluster = np.r_[0, np.cumsum(sizes)], np.repeat(np.arange(40), sizes)
    y0 = rng.normal(size=40)[cluster] + rng.normal(size=len(cluster))
    block = np.arange(40) // 20
    for estimator in ("hajek", "difference"):
        true = sampling_distribution(y0 + 1, y0, starts, [8, 12], block=block, estimator=estimator, draws=20_000)
        estimated = []
        for _ in range(300):
            z = np.concatenate([rng.permutation(20) < k for k in (8, 12)])
            estimated.append(trial_effect(Trial(y0 + z[cluster], z[cluster], starts, block[cluster]), estimator).std_error ** 2)
        assert 0.93 < np.mean(estimated) / true.std_error**2 < 1.12


def test_pairs_are_optimal_and_odd_numbers_refused():
    networkx = pytest.importorskip("networkx")
    assert networkx
    x = np.random.default_rng(0).normal(size=(40, 3))
    code = cw.pair_clusters(x)
    assert (np.bincount(code) == 2).all() and (np.unique(code, return_index=True)[1].argsort() == np.arange(20)).all()
    inverse = np.linalg.inv(np.cov(x.T, bias=True))
    def between(a, b): return np.sqrt((x[a] - x[b]) @ inverse @ (x[a] - x[b]))
    pairs = [tuple(np.flatnonzero(code == k)) for k in range(20)]
    for (a, b), (c, d) in combinations(pairs, 2):                  # no exchange between two pairs does better
        assert between(a, b) + between(c, d) <= min(between(a, c) + between(b, d), between(a, d) + between(b, c)) + 1e-9
    np.testing.assert_array_equal(cw.pair_clusters(x * [1, 100, 0.01] + 5), code)
    with pytest.raises(cw.InputError, match="31 clusters cannot be paired: the number is odd"):
        cw.pair_clusters(np.arange(31))


def test_without_networkx(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "networkx", None)
    with pytest.raises(cw.InputError, match="needs networkx"):
        cw.pair_clusters(np.arange(4))


# --- part 9: power ------------------------------------------------------------------------------------------------


def test_power_solves_for_each():
    common = dict(icc=0.05, sd=2.0, cv=0.3, r2_cluster=0.2, r2_unit=0.1, cluster_covs=1, alpha=0.01)
    power = cw.trial_power(clusters=30, size=40, effect=0.9, **common).power
    assert cw.trial_power(clusters=30, size=40, power=power, **common).effect == pytest.approx(0.9, abs=1e-8)
    assert cw.trial_power(clusters=30, effect=0.9, power=power - 1e-9, **common).size == 40
    assert cw.trial_power(size=40, effect=0.9, power=power - 1e-9, **common).clusters == 30
    for change in (dict(icc=0.06), dict(sd=2.1), dict(cv=0.4), dict(r2_cluster=0.1), dict(r2_unit=0.0), dict(cluster_covs=2), dict(alpha=0.005), dict(treated_share=0.3)):
        assert cw.trial_power(clusters=30, size=40, effect=0.9, **common | change).power < power


@pytest.mark.parametrize(("clusters", "size", "icc"), [(6, 10, 0.1), (10, 30, 0.05), (20, 5, 0.3), (60, 50, 0.0)])
def test_power_formula_is_exact_for_equal_sizes(clusters, size, icc):
    rng, reps = np.random.default_rng(3), 40_000
    effect = 2.2 * np.sqrt((icc + (1 - icc) / size) * 4 / clusters)
    means = rng.normal(size=(reps, clusters)) * np.sqrt(icc + (1 - icc) / size)
    means[:, ::2] += effect
    p = stats.ttest_ind(means[:, ::2], means[:, 1::2], axis=1).pvalue
    want = cw.trial_power(clusters=clusters, size=size, effect=effect, icc=icc).power
    assert np.mean(p <= 0.05) == pytest.approx(want, abs=4 * np.sqrt(want * (1 - want) / reps))


def test_power_refuses():
    with pytest.raises(cw.EstimationError, match="It takes at least"):
        cw.trial_power(clusters=10, effect=0.2, power=0.8, icc=0.2)
    for bad in (dict(clusters=2), dict(icc=1.2), dict(size=0), dict(effect=0.3, clusters=4, size=3, power=0.5), dict(alpha=0), dict(alpha=0.95), dict(effect=0, power=0.8, clusters=None, size=5)):
        with pytest.raises(cw.InputError):
            cw.trial_power(**dict(clusters=10, size=20, effect=0.3, icc=0.1) | bad)


def test_simulated_power_does_not_depend_on_workers():
    def draw(rng):
        return simulate_trial(rng, 8, rng.integers(2, 5, 8), effect=1.0)
    one, two = (simulate_power(draw, trial_effect, replicates=20, workers=k, progress=False) for k in (1, 2))
    np.testing.assert_array_equal(one.p_values, two.p_values)
    with pytest.raises(cw.InputError, match="p-value"):
        simulate_power(draw, lambda trial: 3.0, replicates=2, progress=False)


def test_plan_by_simulation():
    "For normal outcomes of equal sizes the formula is exact: the plan found is the formula's, give or take Monte Carlo error."
    def by_clusters(rng, j): return simulate_trial(rng, j, 10, effect=0.8, icc=0.1)
    def by_size(rng, n): return simulate_trial(rng, 14, n, effect=0.8, icc=0.1)
    def by_effect(rng, tau): return simulate_trial(rng, 14, 10, effect=tau, icc=0.1)
    common = dict(replicates=400, seed=4, progress=False)
    for draw, candidates, known in ((by_clusters, range(6, 41, 2), dict(size=10, effect=0.8)), (by_size, range(2, 60), dict(clusters=14, effect=0.8)),
                                    (by_effect, np.linspace(0.1, 2, 20), dict(clusters=14, size=10))):
        plan = simulate_plan(draw, trial_effect, candidates, **common)
        left_out = ({"clusters", "size", "effect"} - set(known)).pop()
        def exact(value): return cw.trial_power(**{left_out: value}, **known, icc=0.1).power
        assert plan.power.power >= 0.8 and plan.tried[plan.value] == plan.power.power and len(plan.tried) <= 8
        for value, power in plan.tried.items():
            assert power == pytest.approx(exact(value), abs=4 * np.sqrt(0.25 / 400))
        below = plan.tried[plan.tried.index < plan.value]
        assert (below < 0.8).all() and len(below)
    again = simulate_power(lambda rng: by_effect(rng, plan.value), trial_effect, replicates=400, progress=False,
                           seed=int(np.random.default_rng(4).integers(2**63)))
    np.testing.assert_array_equal(again.p_values, plan.power.p_values)                       # the same random numbers for every candidate
    with pytest.raises(cw.EstimationError, match="Even 8, the last candidate, has power"):
        simulate_plan(by_clusters, trial_effect, [4, 6, 8], **common)
    for bad in (dict(candidates=[]), dict(candidates=[8, 4]), dict(candidates=[4, 8], power=0.01)):
        with pytest.raises(cw.InputError, match="candidates must|power="):
            simulate_plan(by_clusters, trial_effect, **bad)


def test_simulation_shows_a_bar(capfd):
    simulate_power(lambda rng: simulate_trial(rng, 6, 3), trial_effect, replicates=5)
    assert "replicates: 100%" in capfd.readouterr().err
    simulate_power(lambda rng: simulate_trial(rng, 6, 3), trial_effect, replicates=5, progress=False)
    assert capfd.readouterr().err == ""


def test_sliders_of_the_lesson():
    "The cell that a page only shows does work in a running notebook."
    widgets, nbformat = pytest.importorskip("ipywidgets"), pytest.importorskip("nbformat")
    cells = [c.source for c in nbformat.read(Path(__file__).parents[1] / "nbs" / "16_trial.ipynb", 4).cells if c.cell_type == "code"]
    picture, call = (next(c for c in cells if sign in c) for sign in ("def picture_of_plan", "interact(picture_of_plan"))
    seen, names = [], {"plot_power": plot_power, "power_grid": power_grid, "trial_power": cw.trial_power, "effective_n": effective_n, "np": np,
                       "interact": lambda f, **sliders: seen.append((f, widgets.interactive(f, **sliders)))}
    import matplotlib
    matplotlib.use("Agg")
    exec(picture, names)
    exec(call, names)
    function, box = seen[0]
    assert {w.description for w in box.children[:-1]} == {"clusters", "size", "icc", "effect"}
    assert all(w.min <= w.value <= w.max for w in box.children[:-1]) and box.children[0].value == 20
    for slider in box.children[:-1]:
        for end in (slider.min, slider.max):
            assert function(**(box.kwargs | {w.description: w.value for w in box.children[:-1]} | {slider.description: end})).get_title()


def test_power_grid():
    grid = power_grid(clusters=[4, 50], effect=[0.5, 0.6], icc=0.2, power=0.8)
    assert np.isnan(grid.loc[4]).all() and grid.loc[50, 0.5] == cw.trial_power(clusters=50, effect=0.5, icc=0.2, power=0.8).size
    with pytest.raises(cw.InputError, match="Two arguments"):
        power_grid(clusters=[4, 5], size=10, effect=0.3, icc=0.1)


# --- part 8: design and model -----------------------------------------------------------------------------------


def test_model_intervals_as_lme4():
    trial, want = as_trial(load("J_30_clusters")), EXPECTED["multilevel_J30"]
    model = model_effect(trial)
    assert (model.estimate, model.std_error) == pytest.approx((want["reml"], want["reml_se"]), abs=1e-6)
    assert model.conf_int() == pytest.approx(want["wald_CI"], abs=1e-6)
    assert profile_interval(trial) == pytest.approx(want["profile_CI"], abs=1e-6)
    design = trial_effect(trial, vcov="CR1")
    half = stats.t.ppf(0.975, 2998) * design.std_error * np.sqrt(2999 / 2998)
    assert (design.estimate - half, design.estimate + half) == pytest.approx(want["design_CI"], abs=1e-6)


def in_blocks(seed=1, blocks=5, clusters=4):
    "A trial of unequal clusters in blocks, with a covariate of clusters and one of units."
    rng = np.random.default_rng(seed)
    sizes = rng.integers(3, 12, blocks * clusters)
    cluster = np.repeat(np.arange(len(sizes)), sizes)
    block = cluster // clusters
    z = np.concatenate([rng.permutation(clusters) < clusters // 2 for _ in range(blocks)])[cluster]
    x = np.column_stack([rng.normal(size=len(sizes))[cluster], rng.normal(size=len(cluster))])
    y = block + 2.0 * rng.normal(size=len(sizes))[cluster] + rng.normal(size=len(cluster)) + 0.5 * z + x @ [0.4, 0.8]
    return Trial(y, z, np.r_[0, np.cumsum(sizes)], np.array(list("vwxyz"))[block], x, ("rain", "age"))


@pytest.mark.parametrize("adjust", [False, True])
@pytest.mark.parametrize("method", ["reml", "ml"])
def test_model_in_blocks_as_statsmodels(method, adjust):
    mixed = pytest.importorskip("statsmodels.regression.mixed_linear_model")
    trial = in_blocks()
    cluster = np.repeat(np.arange(20), trial.sizes)
    design = np.column_stack([trial.treat, np.eye(5)[cluster // 4], *([trial.x] if adjust else [])]).astype(float)
    want = mixed.MixedLM(trial.y, design, cluster).fit(reml=method == "reml", method="lbfgs")
    found = model_effect(trial, method, adjust=adjust)
    assert found.estimate == pytest.approx(want.fe_params[0], abs=1e-5)
    assert found.df == np.inf and model_effect(trial, method, adjust=adjust, df="clusters").df == 20 - 2 - 4 - adjust
    variance = np.linalg.inv(sum(design[cluster == j].T @ np.linalg.solve(
        want.scale * np.eye(n) + want.cov_re[0, 0] * np.ones((n, n)), design[cluster == j]) for j, n in enumerate(trial.sizes)))[0, 0]
    assert found.std_error == pytest.approx(np.sqrt(variance), rel=1e-4)
    if method == "ml":
        for end in profile_interval(trial, adjust=adjust):
            held = mixed.MixedLM(trial.y - end * trial.treat, design[:, 1:], cluster).fit(reml=False, method="lbfgs")
            assert 2 * (want.llf - held.llf) == pytest.approx(stats.chi2.ppf(0.95, 1), abs=1e-4)


def test_model_effect_refuses():
    trial = in_blocks()
    with pytest.raises(cw.InputError, match="no covariates to adjust for"):
        model_effect(uneven(1), adjust=True)
    with pytest.raises(cw.InputError, match="Unknown df"):
        model_effect(trial, df="kenward")
    with pytest.raises(cw.EstimationError, match="2 clusters are too few for 2 coefficients"):
        model_effect(Trial(np.arange(6.0), [1, 1, 1, 0, 0, 0], [0, 3, 6]))
    shifted = trial.with_outcome(trial.y + 10 * np.repeat(trial.block, trial.sizes))           # what blocks explain changes nothing
    assert model_effect(shifted).conf_int() == pytest.approx(model_effect(trial).conf_int(), abs=1e-6)
    assert profile_interval(shifted) == pytest.approx(profile_interval(trial), abs=1e-6)


def test_rejection_rates_of_the_guide():
    "Exact over all assignments for 4 and 10 clusters; 30 and 100 against the guide's printed 1,000 draws."
    names = ["robust, df of units", "totals, normal", "mixed model, ML"]
    four, ten = (rejection_rates(as_trial(load(f"J_{j}_clusters"))) for j in (4, 10))
    assert four[names].tolist() == pytest.approx([0, 0, 1 / 3], abs=1e-12)
    assert ten[names].tolist() == pytest.approx([28 / 252, 10 / 252, 28 / 252], abs=1e-12)
    assert four["permutation"] == 0 and ten["permutation"] == 12 / 252
    for row, j in ((2, 30), (3, 100)):
        rates = rejection_rates(as_trial(load(f"J_{j}_clusters")))
        for name, printed in zip(names, EXPECTED["type1"]["printed"][row][2:]):
            assert rates[name] == pytest.approx(printed, abs=4 * np.sqrt(0.06 * 0.94 * (1 / 1000 + 1 / 20_000)))
    with pytest.raises(cw.InputError, match="one size"):
        rejection_rates(uneven(1))


def test_false_positive_rates():
    rates = false_positive_rates([5, 30, 100], [0.1], replicates=4000, seed=2)
    error = 4 * np.sqrt(0.05 * 0.95 / 4000)
    assert (np.abs(rates.loc[[30, 100], "permutation"] - 0.05) < error).all()
    # five clusters: Welch's degrees of freedom, only nearly right; ten assignments never reach 5%
    assert abs(rates.loc[(30, 0.1), "CR2, Satterthwaite"] - 0.05) < error and rates.loc[(5, 0.1), "permutation"] == 0
    for j, printed in ((30, [0.061, 0.040, 0.063]), (100, [0.058, 0.052, 0.059])):
        found = rates.loc[(j, 0.1), ["robust, df of units", "totals, normal", "mixed model, ML"]]
        assert (np.abs(found - printed) < 4 * np.sqrt(0.06 * 0.94 * (1 / 1000 + 1 / 4000))).all()


def test_closed_forms_of_tests_with_arms_of_two_sizes():
    trial = uneven(1, treated=3)
    equal = Trial(np.random.default_rng(3).normal(size=40) + np.repeat(np.arange(8) % 3, 5), np.repeat(trial.treated, 5), np.arange(9) * 5)
    rates = {}
    for z in every_assignment(equal.block, equal.drawn):
        one = Trial(equal.y, np.repeat(z, 5), equal.starts)
        for name, p in (("CR2, Satterthwaite", trial_effect(one).p_value), ("mixed model, ML", model_effect(one, "ml").p_value), ("permutation", randomisation_test(one).p_value)):
            rates.setdefault(name, []).append(p <= 0.2)
    found = rejection_rates(equal, alpha=0.2)
    for name, rejected in rates.items():
        assert found[name] == pytest.approx(np.mean(rejected), abs=1e-12)


@pytest.mark.parametrize("block", [[0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 0, 0, 1, 1, 1, 1]])
def test_closed_forms_in_blocks(block):
    "Each test by its own regression with an intercept for each block, over all assignments."
    rng, block = np.random.default_rng(3), np.array(block)
    y, unit_block, blocks = rng.normal(size=32) + np.repeat(rng.normal(size=8), 4) + np.repeat(block, 4), np.repeat(block, 4), block[-1] + 1
    p = {}
    for z in every_assignment(block, [4 // blocks] * blocks):
        one = Trial(y, np.repeat(z, 4), np.arange(9) * 4, unit_block)
        design = np.column_stack([one.treat, np.eye(blocks)[unit_block]]).astype(float)
        c = np.eye(blocks + 1)[0]
        for name, kind, scale, df in (("robust, df of units", "CR1", np.sqrt(31 / (31 - blocks)), 31 - blocks), ("CR2, Satterthwaite", "CR2", 1.0, None)):
            fit = cluster_robust(design, y, np.ones(32), one.starts, kind)
            t = abs(fit.coef[0]) / np.sqrt(fit.vcov[0, 0]) / scale
            p.setdefault(name, []).append(2 * stats.t.sf(t, fit.df(c) if df is None else df))
        iid = np.linalg.inv(design.T @ design)[0, 0] * ((y - design @ np.linalg.lstsq(design, y, rcond=None)[0]) ** 2).sum() / (31 - blocks)
        p.setdefault("units as independent", []).append(2 * stats.t.sf(abs(fit.coef[0]) / np.sqrt(iid), 31 - blocks))
        for name, found in (("totals, normal", trial_effect(one, "horvitz_thompson", vcov="null")), ("mixed model, ML", model_effect(one, "ml")),
                            ("mixed model, REML, t", model_effect(one, df="clusters")), ("permutation", randomisation_test(one))):
            p.setdefault(name, []).append(found.p_value)
    for level in (0.1, 0.3, 0.5):
        rates = rejection_rates(one, alpha=level)
        assert set(rates.index) == set(p)
        for name, values in p.items():
            assert rates[name] == np.mean(np.array(values) <= level + 1e-9), name


def test_false_positive_rates_in_pairs():
    "CR1 and ML find half the variance in pairs, three quarters in blocks of four, however many there are."
    error = 4 * np.sqrt(0.05 * 0.95 / 4000)
    for block_size, found_share in ((2, 0.5), (4, 0.75)):
        rates = false_positive_rates([16, 240], [0.1, 0.5], block_size=block_size, replicates=4000, size=20, seed=6)
        assert (np.abs(rates[["CR2, Satterthwaite", "mixed model, REML, t"]] - 0.05) < error).to_numpy().all()
        assert (rates["permutation"] < 0.05 + error).all() and (rates.loc[240, "permutation"] > 0.05 - error).all()
        for name in ("robust, df of units", "mixed model, ML"):
            assert (np.abs(rates.loc[240, name] - 2 * stats.norm.sf(1.96 * np.sqrt(found_share))) < 0.03).all()
            assert (rates.loc[16, name] > rates.loc[240, name]).all()
    for bad, match in ((dict(block_size=3), "cannot be put into blocks"), (dict(block_size=6), "cannot be put into blocks"), (dict(size=1), "two units")):
        with pytest.raises(cw.InputError, match=match):
            false_positive_rates([16], [0.1], **bad)
    with pytest.raises(cw.InputError, match="12 clusters cannot be put into blocks of 3"):
        false_positive_rates([12], [0.1], block_size=3)
    with pytest.raises(cw.InputError, match="3 to 5 clusters, 2 to 2 of them"):
        rejection_rates(Trial(np.arange(16.0), np.repeat([1, 0, 1, 0, 1, 1, 0, 0], 2), np.arange(9) * 2, np.repeat([0, 0, 0, 1, 1, 1, 1, 1], 2)))


# --- parts 6 and 7: spillover -----------------------------------------------------------------------------------


def test_dormitory():
    "Rooms of two drawn from four and six of two types: exact expectations by enumeration."
    kind, rng = np.repeat([0, 1], [4, 6]), np.random.default_rng(1)
    base = rng.normal(size=10)
    def pairings(left):
        return [[]] if not left else [[(left[0], left[i]), *rest] for i in range(1, len(left)) for rest in pairings(left[1:i] + left[i + 1:])]
    def expectation(rooms):
        people = np.ravel(rooms)
        mixed = np.repeat(kind[people[::2]] != kind[people[1::2]], 2)
        return sampling_distribution(base[people] + 5 - 10 * mixed, base[people], np.arange(0, 11, 2), 2).expectation
    chance = [expectation(rooms) for rooms in pairings(list(range(10)))]
    assert len(chance) == 945 and np.mean(chance) == pytest.approx(EXPECTED["spillover"]["analytic_expectation"], abs=1e-10)
    matched = [expectation(a + b) for a in pairings([0, 1, 2, 3]) for b in pairings([4, 5, 6, 7, 8, 9])]
    assert np.mean(matched) == pytest.approx(EXPECTED["spillover"]["true_ATE"], abs=1e-10)


def test_two_stage_by_hand():
    rng = np.random.default_rng(2)
    sizes, saturation = np.array([4, 5, 6, 4, 5, 7]), np.array([0.5, 0.5, 0.4, 0.5, 0.4, 0.4])
    starts, cluster = np.r_[0, np.cumsum(sizes)], np.repeat(np.arange(6), sizes)
    treat = np.concatenate([rng.permutation(n) < 2 for n in sizes])
    y = rng.normal(size=len(cluster))
    found = two_stage_effects(y, treat, starts, saturation).effects
    mean = np.array([[y[(cluster == j) & (treat == z)].mean() for j in range(6)] for z in (0, 1)])
    var = np.array([[y[(cluster == j) & (treat == z)].var(ddof=1) / ((cluster == j) & (treat == z)).sum() for j in range(6)] for z in (0, 1)])
    up = saturation == 0.5
    assert found["direct, high"].estimate == pytest.approx((mean[1] - mean[0])[up].mean(), abs=1e-12)
    assert found["direct, high"].std_error ** 2 == pytest.approx(0.5 * (mean[1] - mean[0])[up].var(ddof=1) / 3 + var[:, up].sum() / 18, abs=1e-12)
    assert found["indirect"].estimate == pytest.approx(mean[0, up].mean() - mean[0, ~up].mean(), abs=1e-12)
    assert found["indirect"].std_error ** 2 == pytest.approx(mean[0, up].var(ddof=1) / 3 + mean[0, ~up].var(ddof=1) / 3, abs=1e-12)
    assert found["total"].estimate == pytest.approx(found["direct, high"].estimate + found["indirect"].estimate, abs=1e-12)
    nobody = two_stage_effects(y, treat & up[cluster], starts, saturation * up).effects
    assert "direct, low" not in nobody and nobody["total"].estimate == pytest.approx(mean[1, up].mean() - pd.Series(y).groupby(cluster).mean()[~up].mean(), abs=1e-12)
    with pytest.raises(cw.EstimationError, match="3 clusters with fewer than two"):
        two_stage_effects(y, treat & ~up[cluster], starts, saturation)
    with pytest.raises(cw.InputError, match="two saturations"):
        two_stage_effects(y, treat, starts, np.arange(6))


# --- part 10: balance ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def villages():
    frame = pd.read_csv(EGAP / "villages_covariates.csv")
    return Trial(None, frame["Z"], np.arange(11), x=frame.drop(columns="Z"), names=tuple(frame.columns[1:]))


def test_balance_as_ritools(villages):
    want, found = EXPECTED["balance"], cw.balance_test(villages)
    for column, key in (("difference", "adj_diff"), ("std_diff", "std_diff"), ("z", "z"), ("p_value", "p")):
        np.testing.assert_allclose(found.table[column], want[key], atol=1e-6)
    assert (found.d2, found.df, found.p_chi2) == pytest.approx((want["d2"], want["df"], want["p_omnibus"]), abs=1e-6)
    assert found.empty and found.p_value == 1 and "Test fewer than 9 covariates." in " ".join(str(found).split())
    few = cw.balance_test(Trial(None, villages.treat, villages.starts, x=villages.x[:, :3], names=villages.names[:3]))
    assert not few.empty and few.df == 3 and 0 < few.p_value < 1 and "empty" not in str(few)


@pytest.mark.parametrize("block", [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 2, 2, 3, 3]])
def test_balance_in_blocks_by_brute_force(block):
    rng, block = np.random.default_rng(6), np.array(block)
    sizes = rng.integers(1, 6, 8)
    starts, cluster = np.r_[0, np.cumsum(sizes)], np.repeat(np.arange(8), sizes)
    x, z = rng.normal(size=(len(cluster), 2)), np.tile([True, False], 4)
    trial = Trial(None, z[cluster], starts, block[cluster], x, ("a", "b"))
    found = cw.balance_test(trial)
    totals = np.column_stack([np.add.reduceat(x - x.mean(0), starts[:-1]), sizes])
    sums = np.array([row @ totals for row in every_assignment(block, trial.drawn)])
    inverse, centred = np.linalg.pinv(np.cov(sums.T, bias=True)), sums - sums.mean(0)
    d2, here = np.einsum("ri,ij,rj->r", centred, inverse, centred), z @ totals - sums.mean(0)
    assert found.d2 == pytest.approx(here @ inverse @ here, abs=1e-9) and found.p_value == np.mean(d2 >= found.d2 - 1e-9)
    np.testing.assert_allclose(found.table["z"], here / sums.std(0), atol=1e-9)
    shifted = cw.balance_test(Trial(None, z[cluster], starts, block[cluster], 3 * x + 100, ("a", "b")))
    assert shifted.d2 == pytest.approx(found.d2, abs=1e-8)
    np.testing.assert_allclose(shifted.table["std_diff"], found.table["std_diff"], atol=1e-8)


def test_balance_refuses():
    trial = uneven(1)
    with pytest.raises(cw.InputError, match="no covariates"):
        cw.balance_test(trial)
    with pytest.raises(cw.InputError, match="No lot could change the balance of 'region'"):
        block = np.repeat([0, 1], 4)
        cw.balance_test(Trial(None, np.tile([1, 0], 4), np.arange(9), block, block[:, None], ("region",)))


def test_results_print_and_draw(villages):
    import matplotlib
    matplotlib.use("Agg")
    trial = uneven(2)
    for result in (trial, randomisation_test(trial), cw.balance_test(villages)):
        assert result._repr_html_().count("<table") == 1 and pickle.loads(pickle.dumps(result)) is not None
    for ax in (randomisation_test(trial).plot(), cw.balance_test(villages).plot(), sampling_distribution(trial.y, trial.y, trial.starts, 2).plot(),
               plot_power(power_grid(clusters=[4, 50], effect=[0.5, 0.6], icc=0.2, size=20))):
        assert ax.get_xlabel()


# --- later refusals, and what must not change an answer ------------------------------------------------------------


def test_no_option_is_silently_ignored():
    trial = uneven(1)
    with pytest.raises(cw.InputError, match="slope=2.0 is for"):
        trial_effect(trial, slope=2.0)
    with pytest.raises(cw.InputError, match="slope=2.0 is for"):
        sampling_distribution(trial.y, trial.y, trial.starts, 2, estimator="hajek", slope=2.0)
    frame = pd.DataFrame({"c": [1, 1, 2, 2], "z": [0, 0, 1, 1], "x": [1.0, 2, 3, 5], "w": [1, 2, 1, 2]})
    with pytest.raises(cw.InputError, match="no sampling weights"):
        Trial.from_study(cw.Study(frame, treat="z", cluster="c", covs="x", sampling_weights="w"))
    with pytest.raises(cw.InputError, match="whole number"):
        cw.trial_power(clusters=10.5, size=20, effect=0.3, icc=0.1)


@pytest.mark.parametrize("seed", range(8))
def test_a_shift_of_the_outcome_changes_no_test(seed):
    trial = uneven(seed, treated=4)
    far = trial.with_outcome(trial.y * 1e-3 + 1e6)
    for statistic in ("difference", "hajek"):
        assert randomisation_test(far, statistic).p_value == randomisation_test(trial, statistic).p_value


def test_variance_in_blocks_by_hand():
    "Blocks as small trials of their own: their robust variances, weighted by their units."
    trial = uneven(3, [0, 0, 0, 0, 1, 1, 1, 1])
    unit_block, variance = np.repeat(trial.block, trial.sizes), 0.0
    for b in (0, 1):
        for arm in (True, False):
            here = trial.y[(unit_block == b) & (trial.treat == arm)]
            clusters = np.flatnonzero((trial.block == b) & (trial.treated == arm))
            rest = [(trial.y[trial.starts[j]:trial.starts[j + 1]] - here.mean()).sum() for j in clusters]
            variance += (unit_block == b).mean() ** 2 * np.square(rest).sum() / len(here) ** 2 * len(clusters) / (len(clusters) - 1)
    found = trial_effect(trial)
    assert found.std_error**2 == pytest.approx(variance, abs=1e-12) and found.df == 4


def test_des_raj_by_hand():
    trial = uneven(4, [0, 0, 0, 0, 1, 1, 1, 1])
    off = trial.totals - 3.0 * (trial.sizes - np.array([trial.sizes[:4].mean(), trial.sizes[4:].mean()])[trial.block])
    found = trial_effect(trial, "des_raj", slope=3.0)
    assert found.estimate == pytest.approx((2 * off * np.where(trial.treated, 1, -1)).sum() / len(trial.y), abs=1e-12)
    spread = sum(16 * off[(trial.block == b) & (trial.treated == arm)].var(ddof=1) / 2 for b in (0, 1) for arm in (True, False))
    assert found.std_error**2 == pytest.approx(spread / len(trial.y) ** 2, abs=1e-12)


def test_drawn_assignments_keep_the_pairs():
    block = np.array([0, 1, 2, 0, 1, 2])
    trial = Trial(np.arange(6.0), np.array([1, 1, 1, 0, 0, 0]), np.arange(7), block)
    seen = []
    randomisation_test(trial, lambda z, y, starts: seen.append(z.copy()) or z @ y, draws=7)
    drawn = np.concatenate(seen[1:])
    assert drawn.shape == (7, 6) and (drawn[:, :3] ^ drawn[:, 3:]).all()
    seen.clear()
    larger = Trial(np.arange(80.0), np.arange(80) % 2, np.arange(81), np.arange(80) // 2 % 40)
    randomisation_test(larger, lambda z, y, starts: seen.append(z.copy()) or z @ y, draws=4000)
    share = np.concatenate(seen[1:]).mean(axis=0)
    assert np.abs(share - 0.5).max() < 4.5 * np.sqrt(0.25 / 4000)


def test_plan_by_hand():
    plan = cw.trial_power(clusters=21, size=8, effect=0.5, icc=0.2, sd=3.0, cv=0.6, r2_cluster=0.3, r2_unit=0.1, cluster_covs=2, treated_share=1 / 3)
    assert plan.std_error**2 == pytest.approx(9 * (0.2 * 0.7 * 1.36 + 0.8 * 0.9 / 8) * (1 / 7 + 1 / 14), abs=1e-12)
    nc, t = 0.5 / plan.std_error, stats.t.ppf(0.975, 17)
    assert plan.df == 17 and plan.power == pytest.approx(stats.nct.sf(t, 17, nc) + stats.nct.cdf(-t, 17, nc), abs=1e-9)


def test_robust_test_of_the_guide_by_hand():
    "Its p-values on N − 2 degrees of freedom with the factor (N − 1)/(N − 2), at every level they could be tested."
    rng = np.random.default_rng(3)
    trial = Trial(rng.normal(size=12) + np.repeat(np.arange(6) % 3, 2), np.repeat(np.arange(6) < 3, 2), np.arange(7) * 2)
    p = []
    for z in every_assignment(trial.block, trial.drawn):
        one = trial_effect(Trial(trial.y, np.repeat(z, 2), trial.starts), vcov="CR1")
        p.append(2 * stats.t.sf(abs(one.estimate) / one.std_error / np.sqrt(11 / 10), 10))
    for level in np.unique(p):
        for near in (level - 1e-7, level + 1e-7):
            assert rejection_rates(trial, alpha=near)["robust, df of units"] == np.mean(np.array(p) <= near)


def test_degenerate_outcomes():
    trial = uneven(1)
    with pytest.raises(cw.EstimationError, match="does not vary between clusters"):
        trial_effect(trial.with_outcome(np.zeros(len(trial.y))))
    alike = Trial(np.tile([0.3, 0.1], 4), np.tile([1, 0], 4), np.arange(9))                          # what is left of these is rounding
    with pytest.raises(cw.EstimationError, match="does not vary between clusters"):
        trial_effect(alike)
    sizes = np.array([3, 4, 5, 6, 7, 1, 2, 2])
    treat = np.repeat(np.tile([1, 0], 4), sizes)
    pairs = Trial(np.where(treat, 0.3, 0.1), treat, np.r_[0, np.cumsum(sizes)], np.repeat(np.arange(8) // 2, sizes))
    with pytest.raises(cw.EstimationError, match="All pairs contribute the same"):
        pair_effect(pairs, target="UATE")
    assert pair_effect(pairs).std_error > 0.01                                                      # as the pairs' shares differ
    with pytest.raises(cw.EstimationError, match="correlation is 1"):
        intracluster_correlation(np.repeat(np.arange(8.0), trial.sizes), trial.starts)
    with pytest.raises(ValueError, match="read-only"):
        trial.y[0] = 1.0


@pytest.mark.parametrize("function", [trial_effect, randomisation_test, randomisation_interval, pair_effect, model_effect, profile_interval,
                                      rejection_rates, balance_test])
def test_a_study_is_no_trial_yet(function):
    frame = pd.DataFrame({"y": [1.0, 2, 4, 3], "z": [1, 1, 0, 0], "village": [1, 2, 3, 4], "age": [1.0, 3, 2, 4]})
    with pytest.raises(cw.InputError, match="Trial.from_study"):
        function(cw.Study(frame, treat="z", outcome="y", cluster="village", covs="age"))
