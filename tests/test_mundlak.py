"""Mundlak weights: parity with R, the link to hierarchical weights, statistics, extrapolation, scores and the split of the bias."""

import json
import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from hypothesis import given, reject, settings
from hypothesis import strategies as st

import clusterweights as cw
import clusterweights.weights as weights_module
from clusterweights.framework import ess
from clusterweights.hierarchical import solve_hierarchical
from clusterweights.mundlak import solve_mundlak
from clusterweights.simulate import framework_data, simulated_study
from clusterweights.weights import _halves, arms

REFERENCE = Path(__file__).parent / "reference" / "balancer"


@pytest.mark.parametrize("solver", ["structured", "piqp", "osqp"])
@pytest.mark.parametrize("lam", [1, 10])
def test_weights_of_balancer(lam, solver):
    data, exact = pd.read_csv(REFERENCE / "data.csv"), pd.read_csv(REFERENCE / "weights_exact.csv")
    names = [f"x{j}" for j in range(1, 6)]
    x, z, by = data[names].to_numpy(), data["z"].to_numpy() == 1, data.groupby("cluster")
    means, share = by[names].transform("mean").to_numpy(), by["z"].transform("mean").to_numpy()[:, None]
    psi = np.column_stack([x, means, share * x, x[:, [1]] * means])
    starts, totals = np.r_[0, np.cumsum((~z * 1).reshape(30, 25).sum(axis=1))], z.reshape(30, 25).sum(axis=1).astype(float)
    found = solve_mundlak(x[~z], psi[~z], starts, x[z].mean(axis=0), psi[z].mean(axis=0), totals, lam, scaling="sums", solver=solver)
    np.testing.assert_allclose(found.weights, exact[f"mundlak_lam{lam}_scale1_exact1"].to_numpy()[~z], atol=1e-9)


def blocks(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(8, 20, 5)
    return rng.normal(size=(sizes.sum(), 2)), np.r_[0, np.cumsum(sizes)], 0.2 * rng.normal(size=(5, 2)), rng.integers(1, 6, 5).astype(float)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), lam=st.sampled_from([0.1, 1.0, 30.0]))
def test_products_with_cluster_indicators_are_the_hierarchical_problem_of_sums(seed, lam):
    x, starts, means, totals = blocks(seed)
    member = np.repeat(np.eye(5), np.diff(starts), axis=0)
    products = (x[:, :, None] * member[:, None, :]).reshape(len(x), -1)
    goal = (means[:, :, None] * np.eye(5)[:, None, :]).reshape(5, -1)
    share = totals / totals.sum()
    try:
        one = solve_hierarchical(x, starts, means, totals, lam, scaling="sums").weights
    except cw.InfeasibleError:
        reject()                                           # too many of these fail the test
    np.testing.assert_allclose(solve_mundlak(x, products, starts, share @ means, share @ goal, totals, lam, scaling="sums").weights, one, atol=1e-8)


@pytest.fixture(scope="module")
def frame():
    return framework_data(5, n_clusters=30, mean_size=25).drop(columns=["x5", "x6", "x7", "x8", "x9", "x10"])


def columns(study):
    "Standardised covariates and statistics by unit, from pandas."
    x = pd.DataFrame(study.x, columns=list(study.names)).assign(share=study.treat)
    both = pd.concat([x.drop(columns="share"), x.groupby(study.cluster).transform("mean").add_prefix("mean ")], axis=1)
    return ((both - both.mean()) / both.std(ddof=0)).to_numpy()


def test_the_objective_is_equation_8(frame):
    "The optimum beats every feasible direction of the objective written out again."
    study, lam, rng = simulated_study(frame), 50.0, np.random.default_rng(0)
    w, both = cw.mundlak_weights(study, lam=lam), columns(simulated_study(frame))
    d, q, z = 4, 5, study.treat
    psi = (both[:, :d, None] * both[:, None, d:]).reshape(study.n, -1)
    exact, gamma, n1 = np.column_stack([np.ones(study.n), both])[~z], w.in_order[~z], z.sum()
    np.testing.assert_allclose(gamma @ exact / n1, np.column_stack([np.ones(study.n), both])[z].mean(axis=0), atol=1e-9)

    def value(v):
        return ((v @ psi[~z] / n1 - psi[z].mean(axis=0)) ** 2).sum() / q + lam * (v**2).sum() / n1**2
    free = gamma > 0
    for _ in range(20):
        step = np.where(free, rng.normal(size=len(gamma)), 0.0)
        step[free] -= exact[free] @ np.linalg.lstsq(exact[free], step[free], rcond=None)[0]          # keeps all that is exact
        slope = (value(gamma + 1e-4 * step) - value(gamma - 1e-4 * step)) / 2e-4
        assert abs(slope) < 1e-9 and value(gamma + 1e-2 * step) > value(gamma)


def test_without_a_local_term_to_speak_of_weights_are_the_least_variable(frame):
    study = simulated_study(frame)
    both = columns(study)
    names = [f"c{j}" for j in range(9)]
    wide = cw.Study(pd.DataFrame(both, columns=names).assign(z=study.treat, g=study.cluster), treat="z", cluster="g", covs=names)
    np.testing.assert_allclose(cw.mundlak_weights(study, lam=1e9).weights, cw.balancing_weights(wide).weights, atol=1e-5)


def test_statistics_that_tell_all_clusters_apart_make_both_variants_one():
    study = simulated_study(framework_data(2, n_clusters=6, mean_size=80).drop(columns=[f"x{j}" for j in range(4, 11)]))
    recipe = ["means", "treated", "treated means", "squares"]
    assert len(cw.cluster_statistics(study, recipe).names) == 5
    found = [cw.mundlak_weights(study, variant=v, statistics=recipe, lam=1.0).weights for v in ("gb", "avto")]
    np.testing.assert_allclose(*found, atol=1e-7)


def test_copies_of_statistics_do_not_count_and_near_copies_do_no_harm(frame):
    study = simulated_study(frame)
    w = cw.mundlak_weights(study, lam=1.0)
    copied = cw.mundlak_weights(study, lam=1.0, statistics=["means", "treated", lambda s: pd.DataFrame({"again": 2 * s.x[:, 1] - s.treat + 7})])
    np.testing.assert_allclose(copied.weights, w.weights, atol=1e-10)
    assert "without 'mean again'" in copied.facts["statistics"]
    jitter = np.random.default_rng(0).normal(size=study.n)
    near = cw.mundlak_weights(study, lam=1.0, statistics=["means", "treated", lambda s: s.x[:, [1]] + 1e-4 * jitter[:, None]])
    assert near.solution.certificate.ok and near.facts["statistics"].startswith("6 of each")


@pytest.mark.parametrize("variant", ["gb", "avto"])
def test_scale_and_origin_do_not_matter_with_rich_statistics(frame, variant):
    changed = frame.assign(x2=1e4 * frame["x2"] + 300, x1=5 - 3 * frame["x1"])
    options = dict(lam=20.0, variant=variant, statistics=["means", "treated", "treated means", "squares"], tolerance=0.1)
    found = [cw.mundlak_weights(simulated_study(f), **options).weights for f in (frame, changed)]
    np.testing.assert_allclose(*found, atol=1e-7)


def test_what_is_extrapolated(frame):
    one_armed = frame[~(frame["cluster"].isin([0, 1]) & (frame["treat"] == 0))]
    share = one_armed.loc[one_armed["treat"] == 1, "cluster"].isin([0, 1]).mean()
    assert 0.02 < share < 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gb = cw.mundlak_weights(simulated_study(one_armed))
    assert gb.facts["extrapolation from controls"].startswith(f"{share:.1%}") and gb.target.units == (one_armed["treat"] == 1).sum()
    assert "extrapolation" in str(gb.summary()) and "extrapolation" not in str(cw.mundlak_weights(simulated_study(frame)).summary())
    with pytest.warns(cw.DroppedUnitsWarning, match="no controls in cluster"):
        avto = cw.mundlak_weights(simulated_study(one_armed), variant="avto")
    assert avto.target.units == gb.target.units - one_armed["cluster"].isin([0, 1]).sum() and "extrapolation from controls" not in avto.facts
    equal = cw.mundlak_weights(simulated_study(one_armed), cluster_weight="clusters", tolerance=0.1)       # there 2 of 30 clusters are a fifteenth
    assert equal.facts["extrapolation from controls"].startswith("6.7%")
    many = frame[~((frame["cluster"] < 6) & (frame["treat"] == 0))]
    with pytest.warns(cw.OverlapWarning, match="clusters without controls") as caught:
        cw.mundlak_weights(simulated_study(many), lam=1.0, tolerance=0.1)
    assert {w.filename for w in caught} == {__file__}


def test_cluster_level_covariates_alone(frame):
    "Products are none then: what is left is balance of clusters' properties."
    sized = frame.assign(size=frame.groupby("cluster")["treat"].transform("size"))
    study = cw.Study(sized, treat="treat", outcome="outcome", cluster="cluster", covs=["size"])
    w = cw.mundlak_weights(study)
    assert w.facts["statistics"].startswith("2 of each cluster, and 0 × 2 = 0 products")
    weighted = np.average(sized["size"][sized["treat"] == 0], weights=w.weights[sized["treat"] == 0])
    assert weighted == pytest.approx(sized["size"][sized["treat"] == 1].mean())


@pytest.mark.parametrize("name, options", [("hierarchical", {}), ("mundlak", {}), ("mundlak", {"variant": "avto"})])
def test_lam_by_balance_reads_no_outcome(frame, name, options):
    method = getattr(cw, f"{name}_weights")
    roles = dict(treat="treat", cluster="cluster", covs=["x1", "x2", "x3", "x4"])
    blind, other = cw.Study(frame, **roles), cw.Study(frame.assign(outcome=frame["x1"] * 9), outcome="outcome", **roles)
    first = method(blind, lam="balance", **options)
    np.testing.assert_array_equal(first.weights, method(other, lam="balance", **options).weights)
    assert isinstance(first.params["lam"], float) and first.refit(other).params["lam"] == first.params["lam"]
    mixed = method(blind, lam={"controls": "balance", "treated": 2.0}, estimand="ATE", **options)
    assert mixed.params["lam"]["treated"] == 2.0 and mixed.params["lam"]["controls"] in np.logspace(5, -3, 25)


def test_lam_by_balance_is_the_largest_with_95_percent_of_attainable_balance(frame, monkeypatch):
    "The rule computed again, with single fits in place of the path; halves as the module draws them."
    curves, held_out = [], weights_module._held_out
    monkeypatch.setattr(weights_module, "_held_out", lambda *args: curves.append(held_out(*args)) or curves[-1])
    study, lams, rng = simulated_study(frame), np.logspace(5, -3, 25), np.random.default_rng(0)
    [arm], _, _ = arms(study, "ATT", within=True)
    held = np.zeros(25)
    for _ in range(3):
        pair = _halves(study, arm, True, True, rng)
        for one, other in (pair, pair[::-1]):
            assert ((one.goal > 0) & (other.goal > 0)).sum() == 0 and one.target_total.sum() == pytest.approx(2 * (one.goal > 0).sum())
            for k, lam in enumerate(lams):
                v = solve_hierarchical(one.x, one.starts, one.target_mean, one.target_total, lam).weights
                means = np.add.reduceat(v[:, None] * one.x, one.starts[:-1]) / one.target_total[:, None]
                held[k] += ((means - other.target_mean) ** 2).sum()
    gained = (held[0] - held) / (held[0] - held.min())
    assert 0 < np.argmax(gained >= 0.95) != np.argmax(gained >= 0.5)
    assert cw.hierarchical_weights(study, lam="balance").params["lam"] == pytest.approx(lams[np.argmax(gained >= 0.95)])
    np.testing.assert_allclose(np.sum(curves, axis=0), held, rtol=1e-7)


def test_lam_by_balance_needs_pairs_of_target_units(frame):
    single = pd.concat([frame[frame["treat"] == 0], frame[frame["treat"] == 1].groupby("cluster").head(1)])
    for method in (cw.hierarchical_weights, cw.mundlak_weights):
        with pytest.raises(cw.EstimationError, match="no cluster has two"):
            method(simulated_study(single), lam="balance", tolerance="auto")
    study = simulated_study(frame)
    with pytest.raises(cw.EstimationError, match="from outside"):
        cw.hierarchical_weights(study, lam="balance", estimand="ATE", target=frame)


@pytest.mark.parametrize("method, options", [
    ("hierarchical", {}), ("hierarchical", {"estimand": "ATE", "bounds": (0, 20)}), ("hierarchical", {"tolerance": 0.05, "standardize": False}),
    ("mundlak", {}), ("mundlak", {"estimand": "ATC", "cluster_weight": "clusters", "tolerance": 0.1}),
    ("mundlak", {"variant": "avto", "estimand": "ATE"}),
    ("mundlak", {"variant": "avto", "max_share": 0.5})])
def test_the_path_is_that_of_cold_fits_in_fewer_steps(frame, method, options):
    people = np.random.default_rng(4).integers(1, 4, len(frame))
    study = cw.Study(frame.assign(people=people), treat="treat", outcome="outcome", cluster="cluster", covs=["x1", "x2", "x3", "x4"],
                     sampling_weights="people")
    w = getattr(cw, f"{method}_weights")(study, lam=1.0, **options)
    lams = np.random.default_rng(0).permutation(np.logspace(-2, 3, 11)).tolist()
    lams = [{"controls": lam, "treated": 2 * lam} for lam in lams] if w.estimand == "ATE" else lams
    together, alone = weights_module._along(w, weights_module._posed(w), lams), [w.refit(study, lam=lam) for lam in lams]
    for one, other in zip(together, alone):
        np.testing.assert_allclose(one.in_order, other.in_order, atol=1e-9)
        assert one.params == other.params and one.solution.certificate.ok
        assert {arm: s.tolerance for arm, s in one.solutions.items()} == {arm: s.tolerance for arm, s in other.solutions.items()}
    steps = [sum(s.iterations for w in found for s in w.solutions.values()) for found in (together, alone)]
    assert steps[0] < 0.75 * steps[1]


def test_the_path_where_balance_is_loosened(frame):
    "Clusters too small for exact balance: the same smallest tolerance at each point, and the choice of lam reads no outcome."
    small = frame.groupby("cluster").head(6).reset_index(drop=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cw.ClusterWeightsWarning)
        w = cw.hierarchical_weights(simulated_study(small), lam=1.0, tolerance="auto")
        path = w.path([0.1, 10.0])
        assert w.solution.tolerance > 0
        for lam, row in path.table.set_index("lam").iterrows():
            assert w.refit(w.study, lam=lam).estimate().estimate == pytest.approx(row["estimate"], abs=1e-9)


@pytest.mark.parametrize("estimand", ["ATT", "ATE"])
def test_what_the_path_shows_and_chooses(frame, estimand):
    study = simulated_study(frame)
    w = cw.mundlak_weights(study, lam={"controls": 2.0, "treated": 8.0} if estimand == "ATE" else 4.0, estimand=estimand)
    path = w.path()
    table, choices = path.table, path.choices
    assert table["lam"].to_numpy() == pytest.approx(np.logspace(-3, 5, 25)) and choices.loc["this recipe", "lam"] == pytest.approx(4.0)
    both, z = columns(study), study.treat
    psi = (both[:, :4, None] * both[:, None, 4:]).reshape(study.n, -1) / np.sqrt(5)
    goal = psi.mean(axis=0) if estimand == "ATE" else psi[z].mean(axis=0)
    for name, made in (("this recipe", w), ("held-out balance", w.refit(study, lam="balance"))):
        arms_now = [~z, z] if estimand == "ATE" else [~z]
        gaps = [np.average(psi[arm], weights=made.in_order[arm], axis=0) - goal for arm in arms_now]
        assert choices.loc[name, "imbalance"] == pytest.approx(np.linalg.norm(gaps), abs=1e-9)
        assert choices.loc[name, "ess"] == pytest.approx(min(ess(made.in_order[arm]) for arm in arms_now))
        assert choices.loc[name, "estimate"] == pytest.approx(made.estimate().estimate)
    lams = table["lam"]
    for shown in (path, w.path(np.logspace(0, 5, 16))):
        squared = shown.table["imbalance"] ** 2
        enough = squared.iloc[-1] - squared >= 0.95 * (squared.iloc[-1] - squared.min())
        assert shown.choices.loc["95% of attainable balance", "lam"] == shown.table["lam"][enough].max()
    points = table[["ess", "imbalance"]].to_numpy()
    across = np.diff(points[[0, -1]], axis=0)[0] / np.ptp(points, axis=0)
    distance = [np.linalg.det([across, (p - points[0]) / np.ptp(points, axis=0)]) for p in points]         # to the chord, times its length
    assert choices.loc["knee", "lam"] == lams[np.argmin(distance)]
    blind = cw.Study(frame, treat="treat", cluster="cluster", covs=["x1", "x2", "x3", "x4"])
    unseen = cw.mundlak_weights(blind, lam=w.params["lam"], estimand=estimand).path()
    np.testing.assert_array_equal(unseen.choices["lam"], choices["lam"])
    assert "estimate" not in unseen.table and len(unseen.plot()) == 1
    text = str(path)
    assert all(name in text for name in choices.index) and len(path.plot()) == 2


def test_paths_without_a_problem_or_a_held_out_choice(frame):
    study = simulated_study(frame)
    asked = cw.mundlak_weights(study, lam=2.0, solver="piqp")
    assert {w.solution.solver for w in weights_module._along(asked, weights_module._posed(asked), [1.0, 5.0])} == {"piqp"}
    soft = cw.softcal_weights(study, lam=5.0).path([1.0, 20.0])
    assert soft.measure.startswith("local") and "held-out balance" not in soft.choices.index
    assert soft.table["imbalance"].iloc[1] == pytest.approx(cw.softcal_weights(study, lam=20.0).balance().l2.loc["local", "after"])
    there = cw.hierarchical_weights(study, lam=1.0, estimand="ATE", target=frame).path([1.0, 2.0])
    assert "No held-out choice" in str(there) and "held-out balance" not in there.choices.index
    whole = cw.Study(frame.assign(treat=frame["cluster"] % 2), treat="treat", outcome="outcome", cluster="cluster", covs=["x1", "x2"])
    assert cw.cos_weights(whole, lam=1.0, icc=0.1).path().measure.startswith("global")
    for wrong in ([], [0.0], [1.0, np.nan], "auto"):
        with pytest.raises(cw.InputError, match="positive numbers"):
            asked.path(wrong)


def test_scores_are_those_of_a_logistic_regression(frame):
    study = simulated_study(frame)
    fitted = sm.Logit(study.treat.astype(float), sm.add_constant(columns(study))).fit(disp=0, tol=1e-12).predict()
    np.testing.assert_allclose(study.from_rows(cw.mundlak_scores(study)), fitted, atol=1e-7)
    assert np.abs(cw.mundlak_scores(study, products=True) - cw.mundlak_scores(study)).max() > 0.01
    assert np.abs(cw.mundlak_scores(study, "treated") - cw.mundlak_scores(study)).max() > 0.01


def test_the_split_of_the_bias_adds_up_in_both_arms(frame):
    study, rng = simulated_study(frame), np.random.default_rng(1)
    level = rng.normal(size=30)[frame["cluster"]] + 5 * frame.groupby("cluster")["treat"].transform("mean")
    slope = rng.normal(size=30)[frame["cluster"]]
    parts = dict(levels={"controls": level, "treated": 2 * level}, common=frame["x1"], departures=slope * frame["x2"])
    for weights in (cw.mundlak_weights(study, estimand="ATE"), cw.balancing_weights(study, estimand="ATE"), cw.hierarchical_weights(study)):
        ours, plain = cw.decompose_by_statistics(weights, **parts), cw.decompose(weights, **parts).terms
        np.testing.assert_allclose(ours.loc["bias"], plain.loc["bias"], atol=1e-10)
        np.testing.assert_allclose(ours.loc[["global cluster", "levels beyond the statistics"]].sum(), plain.loc["average to one"], atol=1e-10)
        np.testing.assert_allclose(ours.loc[["local", "departures beyond the statistics"]].sum(), plain.loc["local"], atol=1e-10)
    linear = cw.decompose_by_statistics(cw.balancing_weights(study), levels=5 * frame.groupby("cluster")["treat"].transform("mean"))
    assert abs(linear.loc["global cluster", "effect"]) > 0.01 and abs(linear.loc["levels beyond the statistics", "effect"]) < 1e-10
    with pytest.raises(cw.InputError, match="levels differ"):
        cw.decompose_by_statistics(cw.mundlak_weights(study), levels=frame["x2"])


def test_statistics_weigh_units_by_their_sampling_weights(frame):
    people = np.random.default_rng(4).integers(1, 5, len(frame))
    study = cw.Study(frame.assign(people=people), treat="treat", cluster="cluster", covs=["x1", "x2"], sampling_weights="people")
    found = cw.cluster_statistics(study).table["mean x2"].to_numpy()
    expected = (people * frame["x2"]).groupby(frame["cluster"]).sum() / pd.Series(people, frame.index).groupby(frame["cluster"]).sum()
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_weights_travel(frame):
    w = cw.mundlak_weights(simulated_study(frame))
    again = pickle.loads(pickle.dumps(w))
    np.testing.assert_array_equal(again.weights, w.weights)
    assert again.facts == w.facts and again.label == "Mundlak, global balance"
    assert cw.mundlak_weights(simulated_study(frame), variant="avto").label == "Mundlak, average to one"
    drawn = w.study.resample(np.arange(0, 30, 2))
    np.testing.assert_allclose(w.refit(drawn).weights, cw.mundlak_weights(drawn, lam=w.params["lam"]).weights, atol=1e-12)


def test_the_chapter_quotes_the_benchmark():
    "The figures in the chapter are those of benchmarks/framework_simulation.md."
    root = Path(__file__).resolve().parents[1]
    names = {"balancing": "no clusters"}
    text = (root / "benchmarks/framework_simulation.md").read_text(encoding="utf-8")
    lines = re.findall(r"^ ?(0\.\d+) +(.+?) +(-?0\.\d+)((?: +-?\d+\.\d+){3}) +(0\.\d+)", text, re.M)
    measured = {(names.get(name, name), float(rho)): (float(bias), float(sd)) for rho, name, bias, _, sd in lines}
    [cell] = [cell["source"] for cell in json.loads((root / "nbs/13_mundlak.ipynb").read_text(encoding="utf-8"))["cells"]
              if "method,rho,bias,sd" in "".join(cell["source"])]
    quoted = re.findall(r'^"?([\w ,-]+?)"?,([\d.]+),(-?[\d.]+),([\d.]+)$', "".join(cell), re.M)
    assert {(name, float(rho)): (float(bias), float(sd)) for name, rho, bias, sd in quoted} == measured and len(measured) == 18


def test_the_plot_over_statistics(frame):
    "With statistics that tell clusters apart, global balance cannot reach a cluster without controls; average to one leaves it out."
    few = frame[(frame["cluster"] < 8) & ~((frame["cluster"] == 0) & (frame["treat"] == 0))]
    study = cw.Study(few, treat="treat", outcome="outcome", cluster="cluster", covs=["x2", "x4"])
    recipes = {"few": "treated", "more": ["means", "treated"], "too many": lambda s: np.eye(8)[s.cluster][:, 1:]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cw.ClusterWeightsWarning)
        beside = cw.hierarchical_weights(study, lam=3.0)
        made = [cw.mundlak_weights(study, variant=variant, statistics=recipes[label], lam=3.0).estimate().estimate
                for variant, label in (("gb", "few"), ("gb", "more"), ("avto", "few"), ("avto", "more"), ("avto", "too many"))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax = cw.plot_statistics(study, recipes, beside=beside, lam=3.0)
    gb, avto = ax.lines[0], ax.lines[1]
    np.testing.assert_allclose(np.r_[gb.get_xdata()[:2], avto.get_xdata()], made, atol=1e-12)
    assert np.isnan(gb.get_xdata()[2]) and (gb.get_markerfacecolor(), avto.get_markerfacecolor()) == ("black", "white")
    assert [text.get_text() for text in ax.get_yticklabels()] == list(recipes)
    assert ax.lines[2].get_xdata()[0] == pytest.approx(beside.estimate().estimate)
