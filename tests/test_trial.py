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
from clusterweights.trial import (Trial, design_effect, effective_n, false_positive_rates, intracluster_correlation, model_effect, plot_power,
                                  power_grid, profile_interval, randomisation_test, rejection_rates, sampling_distribution,
                                  simulate_power, simulate_trial, trial_effect, two_stage_effects)

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
    with pytest.raises(cw.InputError, match="grid"):
        own.conf_int()
    with pytest.raises(cw.InputError, match="one number for each row"):
        randomisation_test(trial, lambda z, y, starts: np.zeros((len(z), 3)))
    with pytest.raises(cw.EstimationError, match="not finite"):
        randomisation_test(trial, lambda z, y, starts: np.full(len(z), np.nan))


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
    common = dict(icc=0.05, sd=2.0, cv=0.3, r2_cluster=0.2, r2_unit=0.1, cluster_covs=1, level=0.01)
    power = cw.trial_power(clusters=30, size=40, effect=0.9, **common).power
    assert cw.trial_power(clusters=30, size=40, power=power, **common).effect == pytest.approx(0.9, abs=1e-8)
    assert cw.trial_power(clusters=30, effect=0.9, power=power - 1e-9, **common).size == 40
    assert cw.trial_power(size=40, effect=0.9, power=power - 1e-9, **common).clusters == 30
    for change in (dict(icc=0.06), dict(sd=2.1), dict(cv=0.4), dict(r2_cluster=0.1), dict(r2_unit=0.0), dict(cluster_covs=2), dict(level=0.005), dict(treated_share=0.3)):
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
    for bad in (dict(clusters=2), dict(icc=1.2), dict(size=0), dict(effect=0.3, clusters=4, size=3, power=0.5), dict(level=0), dict(effect=0, power=0.8, clusters=None, size=5)):
        with pytest.raises(cw.InputError):
            cw.trial_power(**dict(clusters=10, size=20, effect=0.3, icc=0.1) | bad)


def test_simulated_power_does_not_depend_on_workers():
    def draw(rng):
        return simulate_trial(rng, 8, rng.integers(2, 5, 8), effect=1.0)
    one, two = (simulate_power(draw, trial_effect, replicates=20, workers=k, progress=False) for k in (1, 2))
    np.testing.assert_array_equal(one.p_values, two.p_values)
    with pytest.raises(cw.InputError, match="p-value"):
        simulate_power(draw, lambda trial: 3.0, replicates=2, progress=False)


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
    with pytest.raises(cw.InputError, match="knows no blocks"):
        model_effect(uneven(1, [0, 0, 0, 0, 1, 1, 1, 1]))


def test_rejection_rates_of_the_guide():
    "Exact over all assignments for 4 and 10 clusters; 30 against the guide's printed 1,000 draws."
    names = ["robust, N − 2 df", "totals, normal", "mixed model, Wald"]
    four, ten = (rejection_rates(as_trial(load(f"J_{j}_clusters"))) for j in (4, 10))
    assert four[names].tolist() == pytest.approx([0, 0, 1 / 3], abs=1e-12)
    assert ten[names].tolist() == pytest.approx([28 / 252, 10 / 252, 28 / 252], abs=1e-12)
    assert four["permutation"] == 0 and ten["permutation"] == 12 / 252
    thirty = rejection_rates(as_trial(load("J_30_clusters")))
    for name, printed in zip(names, EXPECTED["type1"]["printed"][2][2:]):
        assert thirty[name] == pytest.approx(printed, abs=4 * np.sqrt(0.06 * 0.94 / 1000))
    with pytest.raises(cw.InputError, match="one size"):
        rejection_rates(uneven(1))


def test_false_positive_rates():
    rates = false_positive_rates([5, 30, 100], [0.1], replicates=4000, seed=2)
    error = 4 * np.sqrt(0.05 * 0.95 / 4000)
    assert (np.abs(rates.loc[[30, 100], "permutation"] - 0.05) < error).all()
    # five clusters: Welch's degrees of freedom, only nearly right; ten assignments never reach 5%
    assert abs(rates.loc[(30, 0.1), "CR2, Satterthwaite"] - 0.05) < error and rates.loc[(5, 0.1), "permutation"] == 0
    for j, printed in ((30, [0.061, 0.040, 0.063]), (100, [0.058, 0.052, 0.059])):
        found = rates.loc[(j, 0.1), ["robust, N − 2 df", "totals, normal", "mixed model, Wald"]]
        assert (np.abs(found - printed) < 4 * np.sqrt(0.06 * 0.94 * (1 / 1000 + 1 / 4000))).all()


def test_closed_forms_of_six_tests_with_arms_of_two_sizes():
    trial = uneven(1, treated=3)
    equal = Trial(np.random.default_rng(3).normal(size=40) + np.repeat(np.arange(8) % 3, 5), np.repeat(trial.treated, 5), np.arange(9) * 5)
    rates = {}
    for z in every_assignment(equal.block, equal.drawn):
        one = Trial(equal.y, np.repeat(z, 5), equal.starts)
        for name, p in (("CR2, Satterthwaite", trial_effect(one).p_value), ("mixed model, Wald", model_effect(one, "ml").p_value), ("permutation", randomisation_test(one).p_value)):
            rates.setdefault(name, []).append(p <= 0.2)
    found = rejection_rates(equal, level=0.2)
    for name, rejected in rates.items():
        assert found[name] == pytest.approx(np.mean(rejected), abs=1e-12)


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
    assert found.empty and found.p_value == 1 and "empty" in str(found)
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
            assert rejection_rates(trial, level=near)["robust, N − 2 df"] == np.mean(np.array(p) <= near)


def test_degenerate_outcomes():
    trial = uneven(1)
    with pytest.raises(cw.EstimationError, match="does not vary between clusters"):
        trial_effect(trial.with_outcome(np.zeros(len(trial.y))))
    with pytest.raises(cw.EstimationError, match="correlation is 1"):
        intracluster_correlation(np.repeat(np.arange(8.0), trial.sizes), trial.starts)
    with pytest.raises(ValueError, match="read-only"):
        trial.y[0] = 1.0
