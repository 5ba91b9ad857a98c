"""Balance measures against numpy and by hand."""

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from helpers import pupils, schools
from matplotlib.figure import Figure
from numpy.testing import assert_allclose

import clusterweights as cw
from clusterweights import Study
from clusterweights.datasets import late_entry_study
from clusterweights.framework import (arm_moments, balance, ess, love_plot, plot_overlap, root_mean_square, standardized_differences,
                                      treatment_chances)


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
    axes = b.plot(Figure().subplots(1, 3))
    order = b.table["SMD"].abs().sort_values(ascending=False).index
    place = [list(study.names).index(name) for name in order]
    wanted = [[b.table.loc[order, f"{kind}{end}"].abs() for end in ("", ", weighted")] for kind in ("cluster SMD", "SMD")]
    wanted.append([np.nanmean(np.abs(v[:, place]), axis=0) for v in (b.local_before, b.local_after)])
    for ax, series in zip(axes, wanted):
        dots = [line.get_xdata() for line in ax.lines if line.get_linestyle() == "None"]
        assert [t.get_text() for t in ax.get_yticklabels()] == list(order)
        assert_allclose(dots, [np.asarray(v) for v in series])
    bars = axes[2].collections[0].get_segments()
    assert_allclose([[bar[0][0], bar[1][0]] for bar in bars], np.nanquantile(np.abs(b.local_before[:, place]), [0.1, 0.9], axis=0).T)


def test_the_love_plot_gathers_what_does_not_fit():
    rng = np.random.default_rng(0)
    unit, cluster, local = rng.normal(size=60), rng.normal(size=60), rng.normal(size=(5, 60))
    local[:, 7] = np.nan
    axes = love_plot([f"x{j}" for j in range(60)], {"before": (cluster, unit, local)}, Figure().subplots(1, 3))
    labels = [t.get_text() for t in axes[0].get_yticklabels()]
    assert len(labels) == 40
    assert labels[-1] == "the 21 others"
    worst = np.maximum(np.abs(unit), np.abs(cluster))
    rest = np.argsort(-worst)[39:]
    assert {f"x{j}" for j in rest}.isdisjoint(labels)
    for ax, values in zip(axes, (cluster[rest], unit[rest], local[:, rest])):
        known = np.abs(values[~np.isnan(values)])
        [dots] = [line.get_xdata() for line in ax.lines if line.get_linestyle() == "None"]
        [bar] = ax.collections[0].get_segments()[-1:]
        assert dots[-1] == pytest.approx(known.mean())
        assert_allclose([bar[0][0], bar[1][0]], np.quantile(known, [0.1, 0.9]))


def test_panels_without_clusters_say_so():
    nothing = np.full(3, np.nan)
    axes = love_plot(["a", "b", "c"], {"before": (nothing, np.ones(3), nothing[None])}, Figure().subplots(1, 3))
    assert [[t.get_text() for t in ax.texts] for ax in axes] == [["not defined"], [], ["not defined"]]


def test_cluster_averages_are_compared_like_any_covariate():
    "By handing the averages to a study as covariates."
    data = schools(n_schools=6)
    data["s"] = np.random.default_rng(0).uniform(0.5, 3, len(data))
    data["average"] = data.groupby("school").apply(lambda d: pd.Series(np.average(d["age"], weights=d["s"]), d.index)).droplevel(0)
    study = pupils(data, covs=["age", "average"], sampling_weights="s")
    w = np.random.default_rng(1).exponential(size=study.n)
    table = balance(study, w, study.sampling_weights).table
    for end in ("", ", weighted"):
        assert table.loc["age", f"cluster SMD{end}"] == pytest.approx(table.loc["average", f"SMD{end}"], rel=1e-9)
        assert table.loc["average", f"cluster SMD{end}"] == pytest.approx(table.loc["average", f"SMD{end}"], rel=1e-9)


# --- decomposition -------------------------------------------------------------------------------------------------


def simulated(seed=0, n_clusters=12):
    "Rows in random order, levels, shared slopes and departures of each cluster, and the expected outcomes they make."
    rng = np.random.default_rng(seed)
    data = schools(n_clusters, 24, seed).sample(frac=1, random_state=seed).reset_index(drop=True)
    x, school = data[["age", "income"]].to_numpy(), data["school"].to_numpy()
    parts = [rng.normal(size=n_clusters)[school], x @ rng.normal(size=2), (rng.normal(size=(n_clusters, 2))[school] * x).sum(axis=1)]
    return data.assign(score=sum(parts), s=rng.uniform(0.5, 2, len(data))), parts


WAYS = [(make, estimand) for make in (cw.unadjusted_weights, cw.balancing_weights, cw.hierarchical_weights) for estimand in ("ATT", "ATC", "ATE")]


@pytest.mark.parametrize("options", [{}, {"cluster_weight": "clusters"}], ids=["units", "clusters"])
@pytest.mark.parametrize(("make", "estimand"), WAYS, ids=lambda v: getattr(v, "__name__", v))
def test_the_terms_add_up_to_the_bias(make, estimand, options):
    "With no noise, and an effect of 0, the estimate is its bias."
    data, parts = simulated()
    study = pupils(data, covs=["age", "income"], sampling_weights="s")
    lam = {"lam": 0.3} if make is cw.hierarchical_weights else {}
    w = make(study, estimand=estimand, **lam, **options)
    found = cw.decompose(w, *parts)
    assert found.terms.loc["bias", "effect"] == pytest.approx(w.estimate().estimate, abs=1e-10)
    assert found.terms.iloc[:3].sum().to_numpy() == pytest.approx(found.terms.loc["bias"].to_numpy(), abs=1e-12)
    assert found.clusters.sum().to_numpy() == pytest.approx(found.terms["effect"].to_numpy(), abs=1e-12)
    equal = ["average to one"] if options else []  # each cluster has both arms, so equal clusters are equal in both
    removed = {cw.unadjusted_weights: equal, cw.balancing_weights: ["global"], cw.hierarchical_weights: ["average to one", "global"]}[make]
    zero = found.terms.index[(found.terms.abs() < 1e-8).all(axis=1)]
    assert list(zero) == removed


def test_the_overlap_population_has_one_gap():
    data, parts = simulated(3)
    study = pupils(data, covs=["age", "income"])
    w = cw.balancing_weights(study, estimand="ATO")
    found = cw.decompose(w, *parts)
    assert list(found.terms) == ["mean of controls", "effect"]
    assert found.terms.loc["bias", "effect"] == pytest.approx(w.estimate().estimate, abs=1e-10)


def test_arms_may_have_their_own_outcomes():
    data, parts = simulated(1)
    study = pupils(data, covs=["age", "income"])
    w = cw.hierarchical_weights(study, estimand="ATE", lam=1.0)
    both = {"controls": parts[1], "treated": parts[1] + 1.0 + data["age"]}
    found = cw.decompose(w, parts[0], both, parts[2])
    y = np.where(data["late"] == 1, sum(parts) + 1 + data["age"], sum(parts))
    assert found.terms.loc["bias", "effect"] == pytest.approx(w.estimate(outcome=y).estimate - (1 + data["age"]).mean(), abs=1e-10)


def test_a_survey_has_the_bias_of_its_mean():
    data, parts = simulated(2)
    answers = data.assign(score=data["score"].where(data["late"] == 0))
    w = cw.hierarchical_weights(Study.survey(answers, outcome="score", cluster="school", covs=["age", "income"]), lam=1.0)
    found = cw.decompose(w, *parts)
    assert list(found.terms) == ["mean of respondents"]
    assert found.terms.loc["bias"].item() == pytest.approx(w.estimate().estimate - data["score"].mean(), abs=1e-10)
    assert found.terms.loc["average to one"].item() == pytest.approx(0, abs=1e-10)


@pytest.mark.filterwarnings("ignore::clusterweights.DroppedUnitsWarning")
def test_the_decomposition_speaks_of_whom_the_estimate_speaks_of():
    data, parts = simulated(4)
    lost = (data["school"] == 0) & (data["late"] == 0)
    left = data[~lost].reset_index(drop=True)
    w = cw.hierarchical_weights(pupils(left, covs=["age", "income"]), lam=1.0)
    found = cw.decompose(w, *[part[~lost] for part in parts])
    assert found.terms.loc["bias", "effect"] == pytest.approx(w.estimate().estimate, abs=1e-10)
    assert found.clusters.loc[0].abs().max() == 0


@pytest.mark.parametrize(("make", "estimand"), WAYS, ids=lambda v: getattr(v, "__name__", v))
def test_the_worst_case_is_a_bound_and_is_attained(make, estimand):
    data, _ = simulated(5)
    study = pupils(data, covs=["age", "income"])
    w = make(study, estimand=estimand, **({"lam": 0.3} if make is cw.hierarchical_weights else {}))
    bound = cw.worst_case(w, levels=0.7, slopes=0.4, departures=0.2)
    z = ((study.x - study.x.mean(axis=0)) / study.x.std(axis=0))
    inside = (study.cluster[:, None] == np.arange(study.n_clusters)).astype(float)
    sides = {"controls": -1, "treated": 1}
    models = {}
    for arm, gap in w.gaps.items():
        gap, shared, own = sides[arm] * gap, gap @ z * sides[arm], inside.T @ (gap[:, None] * z) * sides[arm]
        own /= np.maximum(np.linalg.norm(own, axis=1, keepdims=True), 1e-300)
        parts = 0.7 * np.sign(gap @ inside)[study.cluster], 0.4 * z @ shared / max(np.linalg.norm(shared), 1e-300), 0.2 * (own[study.cluster] * z).sum(1)
        models[arm] = [study.to_rows(part) for part in parts]
    worst = cw.decompose(w, *({arm: model[k] for arm, model in models.items()} for k in range(3)))
    assert_allclose(worst.terms["effect"], bound, atol=1e-10)
    assert_allclose(cw.worst_case(w) * [0.7, 0.4, 0.2, 0], bound * [1, 1, 1, 0], atol=1e-12)


def test_decompose_complains():
    data, parts = simulated(6)
    study = pupils(data, covs=["age", "income"])
    w = cw.unadjusted_weights(study)
    with pytest.raises(cw.InputError, match="one value for each of the 288 rows"):
        cw.decompose(w, parts[0][:5])
    with pytest.raises(cw.InputError, match="finite number"):
        cw.decompose(w, np.where(np.arange(288) == 3, np.nan, 0))
    outside = cw.balancing_weights(study, estimand="ATE", target={"age": 0.2, "income": 0.5})
    with pytest.raises(cw.InputError, match="from outside"):
        cw.decompose(outside, *parts)
    assert "average to one" in str(cw.decompose(w, 1.0, 2.0, 3.0))
    assert_allclose(cw.decompose(w, 1.0, 2.0, 3.0).terms, 0, atol=1e-12)


# --- overlap -------------------------------------------------------------------------------------------------------


def test_estimated_chances_against_regression_with_dummies():
    data = schools(6, 12, 1).assign(s=lambda d: np.random.default_rng(0).uniform(0.5, 2, len(d)))
    data.loc[data["school"] == 2, "late"] = 0
    study = pupils(data, covs=["age", "income"], sampling_weights="s")
    across, within = treatment_chances(study)
    z, s = study.treat.astype(float), study.sampling_weights
    dummies = (study.cluster[:, None] == np.arange(6)).astype(float)
    assert_allclose(across, np.clip(sm.WLS(z, sm.add_constant(study.x), weights=s).fit().fittedvalues, 0, 1), atol=1e-9)
    lone = study.cluster == 2
    both = sm.WLS(z[~lone], np.column_stack([study.x, np.delete(dummies, 2, axis=1)])[~lone], weights=s[~lone])
    assert_allclose(within[~lone], np.clip(both.fit().fittedvalues, 0, 1), atol=1e-9)
    assert (within[lone] == 0).all()


def test_the_overlap_plot_draws_each_arm_whole():
    axes = plot_overlap(pupils(schools(), covs=["age", "income"]), Figure().subplots(1, 2))
    for ax in axes:
        heights = np.array([bar.get_height() for bar in ax.patches])
        assert heights[heights > 0].sum() == pytest.approx(1)
        assert heights[heights < 0].sum() == pytest.approx(-1)


def test_weights_from_elsewhere_are_held_against_known_totals():
    data = schools(6, 12, 1)
    answers = data.assign(score=data["score"].where(data["late"] == 0))
    survey = Study.survey(answers, outcome="score", cluster="school", covs=["age", "income"],
                          totals={"N": 500, "age": 500 * data["age"].mean(), "income": 500 * data["income"].mean()})
    w = cw.balancing_weights(survey)
    assert_allclose(cw.balance_of(survey, w.weights).table["SMD, weighted"], 0, atol=1e-9)
    assert_allclose(cw.balance_of(survey, w.weights).table["SMD"], w.balance().table["SMD"], atol=1e-12)
