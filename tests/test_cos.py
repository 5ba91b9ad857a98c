"""Whole clusters treated: against balancer's exact weights, the published reproduction, definitions, and what must not matter."""

import json
import pickle
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import clusterweights as cw
from clusterweights import EstimationError, InfeasibleError, InputError, Study, balancing_weights, cos_advice, cos_features, cos_weights
from clusterweights.cos import design_effect_of_weights, outcome_noise, solve_cos, solve_cos_overlap
from clusterweights.datasets import load_hsb
from clusterweights.mixed import fit_linear_mixed
from clusterweights.study import cluster_sums
from clusterweights.weights import METHODS

REFERENCE = Path(__file__).resolve().parent / "reference"
BALANCER = REFERENCE / "balancer_cos"
RUNS = json.loads((BALANCER / "expected.json").read_text())
COS = json.loads((REFERENCE / "cos" / "expected.json").read_text())

pytestmark = pytest.mark.filterwarnings("ignore::clusterweights.core.ClusterWeightsWarning")


# --- parity -------------------------------------------------------------------------------------------------------


def starts_of(cluster): return np.r_[np.unique(cluster, return_index=True)[1], len(cluster)]


@pytest.fixture(scope="module")
def balancer():
    data = pd.read_csv(BALANCER / "data.csv.gz")
    assert data["cluster"].is_monotonic_increasing
    return data, pd.read_csv(BALANCER / "weights_exact.csv.gz"), pd.read_csv(BALANCER / "cluster_totals_icc1.csv", index_col="cluster")


def as_balancer(data, name, solver="structured"):
    "Our solution of one of balancer's problems, and the mask of its units."
    run, x, z, cluster = RUNS[name], data[["x1", "x2", "w1", "w2"]].to_numpy(), data["a"].to_numpy() == 1, data["cluster"].to_numpy()
    if name.startswith("maxsubset"):
        return solve_cos_overlap(x, starts_of(cluster), z, run["lambda"], run["icc"], bounds=(0, len(z)), solver=solver), np.ones(len(z), dtype=bool)
    return solve_cos(x[~z], starts_of(cluster[~z]), x[z].mean(axis=0), z.sum(), run["lambda"], run["icc"], bounds=(0, z.sum()), solver=solver), ~z


@pytest.mark.parametrize("name", [n for n in RUNS if RUNS[n]["icc"] < 1])
def test_weights_of_balancer(balancer, name):
    data, exact, _ = balancer
    found, mask = as_balancer(data, name)
    assert_allclose(found.weights, exact[name].to_numpy()[mask], atol=1e-8)
    assert_allclose(found.objective, RUNS[name]["objective_half"], rtol=1e-5)


@pytest.mark.parametrize("name", [n for n in RUNS if RUNS[n]["icc"] == 1])
def test_totals_and_objective_of_balancer_at_icc_one(balancer, name):
    data, _, totals = balancer
    found, mask = as_balancer(data, name)
    own = pd.Series(found.weights).groupby(data["cluster"].to_numpy()[mask]).sum()
    assert_allclose(own, totals.loc[own.index, name], atol=5e-4)
    assert_allclose(found.objective, RUNS[name]["objective_half"], rtol=2e-5)


@pytest.mark.parametrize("solver", ["piqp", "osqp"])
def test_other_solvers_agree(balancer, solver):
    for name in ("cluster_weights_lam1_icc0.2", "maxsubset_lam1_icc0.2"):
        assert_allclose(as_balancer(balancer[0], name, solver)[0].weights, as_balancer(balancer[0], name)[0].weights, atol=1e-8)


@pytest.fixture(scope="module")
def catholic():
    data = load_hsb()
    data = data.assign(catholic=(data["sector"] == "Catholic").astype(int), female=(data["sex"] == "Female").astype(int),
                       minority=(data["minority"] == "Yes").astype(int))
    for name in ("ses", "minority", "female"):
        data[f"{name}_mean"] = data.groupby("school")[name].transform("mean")
    data = data[(data["female_mean"] > 0.30) & (data["female_mean"] < 0.75)].reset_index(drop=True)
    public = data.loc[data["catholic"] == 0, "mathach"]
    return data.assign(score=(data["mathach"] - public.mean()) / public.std())


COVS = ["ses", "minority", "female", "ses_mean", "minority_mean", "female_mean", "size", "pracad", "disclim"]


@pytest.mark.parametrize(("estimand", "which", "column"), [("ATT", "att", "w_att"), ("ATO", "subset", "w_subset")])
def test_the_published_analysis_from_the_shipped_data(catholic, estimand, which, column):
    exact, n = pd.read_csv(REFERENCE / "cos" / "data_weights_exact.csv.gz"), len(catholic)
    assert_array_equal(exact["school"], catholic["school"])
    assert_allclose(exact["ses"], catholic["ses"])
    fit = fit_linear_mixed(catholic[COVS].to_numpy(float), catholic["score"].to_numpy(), starts_of(catholic["school"]))
    lam = fit.within / (fit.coef[1:] ** 2).sum()
    assert (round(fit.icc, 3), round(lam, 1)) == (0.036, 1.2)
    study = Study(catholic, treat="catholic", outcome="score", cluster="school", covs=COVS)
    w = cos_weights(study, estimand=estimand, icc=fit.icc, lam=lam * n / (n - 1))            # R's scale() divides by n − 1
    weighted = (catholic["catholic"] == 0) | (estimand == "ATO")
    assert_allclose(w.weights[weighted], exact[column][weighted], atol=1e-6)
    effect = w.estimate(outcome_model="none")
    assert_allclose([effect.estimate, effect.std_error, effect.df], [COS[which]["estimate"], COS[which]["CR2"]["se"], COS[which]["CR2"]["df_satt"]],
                    rtol=1e-5)


# --- definitions --------------------------------------------------------------------------------------------------


def schools(k=30, seed=0, weighted=False):
    rng = np.random.default_rng(seed)
    school = np.repeat(np.arange(k), rng.integers(5, 15, k))
    size, urban = rng.normal(size=(2, k))
    late = size + rng.normal(size=k) > 0
    age, female = rng.normal(size=len(school)) + 0.5 * size[school], (rng.random(len(school)) < 0.5).astype(int)
    score = 0.6 * age + 0.5 * size[school] + 0.4 * rng.normal(size=k)[school] + rng.normal(size=len(school)) + 0.5 * late[school]
    return pd.DataFrame({"school": school, "late": late[school].astype(int), "age": age, "female": female, "size": size[school],
                         "urban": urban[school],
                         "score": score, "people": rng.uniform(0.5, 3, len(school)) if weighted else 1.0})


def study(frame=None, **changes):
    return Study(schools() if frame is None else frame,
                 **({"treat": "late", "outcome": "score", "cluster": "school", "covs": ["age", "female", "size", "urban"]} | changes))


def test_without_correlation_clusters_do_not_matter():
    "At icc = 0 the weights are those of a ridge without clusters, known in closed form where no bound binds."
    s = study()
    z = (s.x - s.x.mean(0)) / s.x.std(0)
    control, lam, n1 = z[~s.treat], 400.0, s.treat.sum()
    m, goal = len(control), z[s.treat].mean(0)
    kkt = np.block([[control @ control.T + lam * np.eye(m), np.ones((m, 1))], [np.ones((1, m)), np.zeros((1, 1))]])
    closed = np.linalg.solve(kkt, np.r_[n1 * control @ goal, n1])[:m]
    assert closed.min() > 0
    assert_allclose(cos_weights(s, icc=0, lam=lam).in_order[~s.treat], closed, atol=1e-9)


def test_at_full_correlation_only_totals_of_clusters_matter():
    "With covariates of clusters only and icc = 1, sizes of clusters play no part in the totals but for the target."
    frame = schools()
    twice = pd.concat([frame, frame[(frame["late"] == 0) & (frame["school"] % 2 == 0)]])
    scale = study(frame).x[:, 2:].std(0), study(frame).x[:, 2:].mean(0)
    def totals(data):
        s = study(data, covs=["size", "urban"])
        x, c = (s.x - scale[1]) / scale[0], ~s.treat
        starts = starts_of(s.cluster[c])
        return cluster_sums(solve_cos(x[c], starts, x[s.treat].mean(0), s.treat.sum(), 2.0, 1.0).weights, starts)
    assert_allclose(totals(frame), totals(twice), rtol=1e-3)


def test_clusters_as_rows_are_equation_ten():
    s = study()
    w = cos_weights(s, "cluster", icc=0.2, lam=1.5)
    per_unit = w.in_order[~s.treat]
    sizes, first = np.diff(starts_of(s.cluster[~s.treat])), starts_of(s.cluster[~s.treat])[:-1]
    mean = per_unit[first]
    assert_allclose(per_unit, np.repeat(mean, sizes), rtol=1e-12)
    x = ((s.x - s.x.mean(0)) / s.x.std(0))[:, 2:]
    control, goal, n1 = x[~s.treat][first], x[s.treat].mean(0), s.treat.sum()
    ridge = 1.5 * ((1 - 0.2) * sizes + 0.2 * sizes**2)
    gradient = sizes * (control @ (sizes * mean @ control - n1 * goal)) + ridge * mean           # of Eq. 10, times n1²/2
    price = (gradient / sizes)[mean > 1e-9]
    assert np.ptp(price) < 1e-6 * np.abs(price).max() and (gradient / sizes)[mean <= 1e-9].min(initial=np.inf) > price.mean() - 1e-6
    assert_allclose(sizes @ mean, n1)
    assert "age" not in w.estimate().vcov and METHODS["cos"].knows(w.params) == "cluster covariates"


def test_unit_weights_with_covariates_of_clusters_only_are_cluster_weights():
    s = study(covs=["size", "urban"])
    for estimand in ("ATT", "ATC", "ATO"):
        assert_allclose(cos_weights(s, icc=0.1, lam=1.0, estimand=estimand).in_order,
                        cos_weights(s, "cluster", icc=0.1, lam=1.0, estimand=estimand).in_order, atol=1e-9)


def test_atc_is_the_att_of_the_mirrored_study():
    frame = schools(weighted=True)
    there = cos_weights(study(frame.assign(late=1 - frame["late"]), sampling_weights="people"), icc=0.1, lam=1.0)
    assert_allclose(cos_weights(study(frame, sampling_weights="people"), icc=0.1, lam=1.0, estimand="ATC").weights, there.weights, atol=1e-10)


def test_sampling_weights_are_copies_where_units_are_independent():
    frame = schools()
    frame["people"] = 1 + frame["school"] % 3
    copies = frame.loc[frame.index.repeat(frame["people"])].assign(people=1)
    ratio = frame["people"].mean()
    for estimand in ("ATT", "ATO"):
        often = cos_weights(study(copies), icc=0.0, lam=1.0, estimand=estimand)
        once = cos_weights(study(frame, sampling_weights="people"), icc=0.0, lam=1.0 / ratio, estimand=estimand)
        assert_allclose(once.weights * ratio, pd.Series(often.weights, copies.index).groupby(level=0).sum(), atol=1e-8)


def test_hyperparameters_are_those_of_the_mixed_model():
    s = study()
    z = (s.x - s.x.mean(0)) / s.x.std(0)
    fit = fit_linear_mixed(np.column_stack([z, s.treat]), s.outcome, s.starts)
    w = cos_weights(s)
    assert_allclose([w.params["icc"], w.params["lam"]], [fit.icc, (fit.between + fit.within) / (fit.coef[1:5] ** 2).sum()], rtol=1e-10)
    assert cos_weights(s, icc=0.5).params["lam"] == w.params["lam"] and cos_weights(s, lam=9).params["icc"] == w.params["icc"]
    assert "lam=" in str(w) and "icc=" in str(w)
    noise = outcome_noise(z, s.outcome, s.starts, treat=s.treat)
    assert_allclose(noise.lam, w.params["lam"])
    with pytest.raises(InputError, match="have none|has none"):
        cos_weights(study(outcome=None))
    assert_array_equal(cos_weights(study(outcome=None), icc=0.1, lam=1.0).weights, cos_weights(s, icc=0.1, lam=1.0).weights)


def test_sample_split_keeps_outcomes_out_of_the_weights():
    s = study(schools(80, 4))
    w = cos_weights(s, sample_split=0.4)
    aside = w.reason != ""
    assert (w.in_order[aside] == 0).all() and not s.treat[aside].any() and len(np.unique(s.cluster[aside])) == round(0.4 * (s.n_treated == 0).sum())
    rows = s.to_rows(aside)
    frame = schools(80, 4)
    elsewhere = frame.assign(score=np.where(rows, frame["score"], -5 * frame["score"] ** 2))
    assert_array_equal(cos_weights(study(elsewhere), sample_split=0.4).weights, w.weights)
    inside = frame.assign(score=np.where(rows, frame["score"] + 3 * frame["age"] ** 2, frame["score"]))
    assert np.abs(cos_weights(study(inside), sample_split=0.4).weights - w.weights).max() > 1e-3
    assert_allclose(w.in_order[~s.treat].sum(), s.treat.sum())
    both = cos_weights(s, sample_split=0.4, estimand="ATO")
    assert s.treat[both.reason != ""].any() and (both.in_order[both.reason != ""] == 0).all()
    for share in (0, 1, True, "half"):
        with pytest.raises(InputError, match="sample_split"):
            cos_weights(s, sample_split=share)
    with pytest.raises(EstimationError, match="sets aside 0 of"):
        cos_weights(s, sample_split=0.001)


def test_bounds_hold_and_are_named():
    s = study(schools(30, 1, weighted=True), sampling_weights="people")
    for estimand in ("ATT", "ATO"):
        w = cos_weights(s, icc=0.1, lam=0.1, estimand=estimand, bounds=(0.05, 3.0))
        used = w.in_order[~s.treat]
        assert used.min() >= 0.05 - 1e-12 and used.max() <= 3 + 1e-12
        for design in ("unit", "cluster"):
            w = cos_weights(s, design, icc=0.1, lam=0.1, estimand=estimand, cluster_bounds=(0.2, 1.6))
            mean = (cluster_sums(w.in_order, s.starts) / cluster_sums(s.sampling_weights, s.starts))[(s.n_treated == 0) | (estimand == "ATO")]
            assert mean.min() >= 0.2 - 1e-8 and mean.max() <= 1.6 + 1e-8 and mean.max() > 1.55, (estimand, design)
            assert w.solution.certificate.ok


def test_a_lower_bound_on_clusters_alone_leaves_one_of_them_all_the_rest():
    sizes = np.array([4, 5, 3])
    x, starts = np.repeat([[0.0], [1.0], [5.0]], sizes, axis=0), np.r_[0, np.cumsum(sizes)]
    units = solve_cos(x, starts, np.array([4.9]), 12.0, 0.01, 0.2, cluster_bounds=(0.3, np.inf))
    rows = solve_cos(x[starts[:-1]], np.arange(4), np.array([4.9]), 12.0, 0.01, 0.2, cluster_bounds=(0.3, np.inf), base=sizes.astype(float))
    totals = cluster_sums(units.weights, starts)
    assert_allclose(totals, rows.weights, atol=1e-7)
    assert_allclose(totals, [1.2, 1.5, 12 - 2.7], atol=1e-7)
    with pytest.raises(InputError, match="finite lower bound"):
        solve_cos(x, starts, np.array([4.9]), 12.0, 0.01, 0.2, bounds=(-np.inf, np.inf), cluster_bounds=(-np.inf, 3))


def test_what_cannot_be_done_is_refused():
    frame, s = schools(), study()
    broken = frame.assign(late=np.where(np.arange(len(frame)) == 3, 1 - frame["late"], frame["late"]))
    with pytest.raises(InputError, match=r"varies within 1 of 30 clusters \(0\).*hierarchical_weights"):
        cos_weights(study(broken))
    survey = Study.survey(frame.assign(score=frame["score"].where(frame["age"] > 0)), outcome="score", cluster="school", covs=["age", "size"])
    with pytest.raises(InputError, match="for a survey use"):
        cos_weights(survey)
    with pytest.raises(EstimationError, match="only 1 control cluster"):
        cos_weights(s.restrict(s.treat | (s.cluster == np.flatnonzero(s.n_treated == 0)[0])), icc=0.1, lam=1.0)
    few = s.restrict(np.isin(s.cluster, np.r_[np.flatnonzero(s.n_treated > 0)[:2], np.flatnonzero(s.n_treated == 0)[:2]]))
    with pytest.raises(EstimationError, match="4 clusters.*Give icc and lam as numbers"):
        cos_weights(few)
    assert cos_weights(few, icc=0.1, lam=1.0).solution.certificate.ok
    with pytest.raises(InfeasibleError, match="may carry at most"):
        cos_weights(s, icc=0.1, lam=1.0, bounds=(0, 0.3))
    with pytest.raises(InfeasibleError, match="must carry at least"):
        cos_weights(s, icc=0.1, lam=1.0, cluster_bounds=(30, 40))
    with pytest.raises(InfeasibleError, match="contradict each other"):
        cos_weights(s, icc=0.1, lam=1.0, bounds=(0, 3), cluster_bounds=(4, 5))
    for options, words in (({"icc": 1.2}, "icc=1.2"), ({"icc": "auo"}, "icc='auo'"), ({"lam": 0}, "lam=0"), ({"lam": True}, "lam=True"),
                           ({"design": "units"}, "Did you mean 'unit'"),
                           ({"cluster_bounds": 3}, "must be two numbers"), ({"cluster_bounds": (3, 1)}, "must not exceed"),
                           ({"bounds": (-1, 2)}, "extrapolate"),
                           ({"interactions": [("age", "female")]}, "no pair"), ({"interactions": ["size"]}, "no pair"),
                           ({"interactions": "age:size"}, "interactions='age:size' is no pair"), ({"interactions": 5}, "no pair"),
                           ({"cluster_means": "yes"}, "True or False"), ({"design": "cluster", "bounds": 5}, "cluster_bounds instead"),
                           ({"design": "cluster", "interactions": True}, "clusters only"),
                           ({"estimand": "ATE"}, "offers 'ATT', 'ATC' and 'ATO'")):
        with pytest.raises(InputError, match=words):
            cos_weights(s, **options)
    with pytest.raises(InputError, match="cluster_means=True"):
        cos_weights(study(covs=["age", "female"]), "cluster")
    with pytest.raises(InputError, match="in the study already"):
        cos_features(cos_features(s))


# --- options and invariances --------------------------------------------------------------------------------------

OTHER = {"design": "cluster", "estimand": "ATC", "icc": 0.9, "lam": 50.0, "cluster_means": True, "interactions": [("age", "size")],
         "bounds": (0.2, 3), "cluster_bounds": (0.3, 2.0),
         "sample_split": 0.3, "seed": 1, "solver": "osqp"}


@pytest.mark.parametrize("option", METHODS["cos"].options)
def test_every_option_changes_the_result(option):
    s, given = study(), {"sample_split": 0.3} if option == "seed" else {}
    before, after = cos_weights(s, **given), cos_weights(s, **given, **{option: OTHER[option]})
    if option == "solver":
        assert (before.solution.solver, after.solution.solver) == ("structured", "osqp")
    else:
        assert np.abs(before.weights - after.weights).max() > 1e-6
    assert set(after.params) == set(METHODS["cos"].options)


@pytest.mark.parametrize("options", [{}, {"design": "cluster"}, {"estimand": "ATO"},
                                     {"cluster_means": True, "interactions": True, "lam": 1.0, "icc": 0.1}])
def test_what_must_not_matter(options):
    frame = schools()
    base, order = cos_weights(study(frame), **options).weights, np.random.default_rng(1).permutation(len(frame))
    renamed = frame.assign(school=[f"school {997 * s % 31}" for s in frame["school"]])
    changed = {"order of rows": (frame.iloc[order], base[order]), "cluster labels": (renamed, base),
               "scale and shift": (frame.assign(age=1e-5 * frame["age"] + 40, size=-1e6 * frame["size"]), base),
               "units of the outcome": (frame.assign(score=10 * frame["score"] + 500), base)}
    for what, (data, expected) in changed.items():
        assert_allclose(cos_weights(study(data), **options).weights, expected, atol=1e-7, err_msg=what)


def test_refit_copies_and_bootstrap():
    s = study()
    w = cos_weights(s, cluster_means=True, interactions=[("age", "urban")])
    assert_array_equal(w.refit(s).weights, w.weights)
    other = study(schools(30, 5))
    again = w.refit(other)
    assert again.params["lam"] == w.params["lam"] and w.refit(other, lam="auto", icc="auto").params["lam"] != w.params["lam"]
    assert_array_equal(pickle.loads(pickle.dumps(w)).weights, w.weights)
    boot = cos_weights(s).bootstrap(replicates=30, seed=1, progress=False)
    assert np.isfinite(boot.draws.to_numpy(float)).mean() > 0.9


# --- features, advice, plots --------------------------------------------------------------------------------------


def test_features_are_balanced_and_judged():
    s = study()
    more = cos_features(s, interactions=True)
    assert more.names == (*s.names, "mean of age", "mean of female",
                          *(f"{u}:{c}" for u in ("age", "female") for c in ("size", "urban", "mean of age", "mean of female")))
    assert_allclose(more.x[:, 4], (cluster_sums(s.x[:, 0], s.starts) / np.diff(s.starts))[s.cluster])
    z = (s.x - s.x.mean(0)) / s.x.std(0)
    assert_allclose(more.x[:, 6], z[:, 0] * z[:, 2])
    without, with_them = (cos_weights(s, icc=0.02, lam=1e-2, estimand="ATO", **o).weights
                          for o in ({}, {"cluster_means": True, "interactions": True}))
    left = [cw.balance_of(more, w).table["SMD, weighted"].abs().max() for w in (without, with_them)]
    assert left[1] < 0.5 * left[0]


def test_design_effect_by_hand():
    unit, cluster, starts = np.array([1.0, 3, 0, 2]), np.array([2.0, 2, 1, 1]), np.array([0, 2, 4])
    assert design_effect_of_weights(unit, cluster, starts, 0.0) == pytest.approx(14 / 10)
    assert design_effect_of_weights(unit, cluster, starts, 1.0) == pytest.approx((16 + 4) / (16 + 4))
    assert design_effect_of_weights(unit, cluster, starts, 0.5) == pytest.approx((7 + 10) / (5 + 10))


def test_advice_follows_the_rule():
    s = study()
    advice = cos_advice(s)
    z = (s.x - s.x.mean(0)) / s.x.std(0)
    fits = [fit_linear_mixed(np.column_stack([x, s.treat]), s.outcome, s.starts) for x in (z, z[:, 2:])]
    sigma, without = (fit.between + fit.within for fit in fits)
    assert_allclose([advice.units.variance, advice.clusters.variance, advice.units.icc], [sigma, without, fits[0].icc], rtol=1e-10)
    assert_allclose(advice.table["variance ratio"], sigma / without * advice.table["design effect"])
    assert advice.include_units and (advice.table["variance ratio"] < 1).all() and (advice.table["covariates of units"] == "worth it").all()
    beyond = ((s.x[s.treat, 2] > s.x[~s.treat, 2].max()) | (s.x[s.treat, 2] < s.x[~s.treat, 2].min()))
    count = len(np.unique(s.cluster[s.treat][beyond]))
    assert advice.overlap.loc["size", "treated clusters beyond"] == f"{count} of {(s.n_treated > 0).sum()}"
    assert "this study" in str(advice) and "whatever the ratio" in advice._repr_html_()
    noise = schools().assign(score=np.random.default_rng(2).normal(size=len(schools())) + schools()["size"])
    assert cos_advice(study(noise)).table["variance ratio"].max() > 0.95
    for bad, words in ((study(covs=["size", "urban"]), "none of units"), (study(outcome=None), "has none"),
                       (study(covs=["age"]), "cluster_means=True")):
        with pytest.raises(InputError, match=words):
            cos_advice(bad)
    with pytest.raises(InputError, match="one arm"):
        cos_advice(s, estimand="ATO")
    assert_allclose(cos_advice(s, estimand="ATC").units.variance, sigma)


def test_plots_show_what_they_say():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    s, (_, axes) = study(), plt.subplots(1, 3)
    w = cos_weights(s, estimand="ATO")
    ax = cw.plot_arm_means(w, axes[0])
    shown = {line.get_label(): line.get_xdata() for line in ax.get_lines()}
    z = (s.x - s.x.mean(0)) / s.x.std(0)
    assert_allclose(shown["treated, all"], z[s.treat].mean(0))
    assert_allclose(shown["controls, weighted"], np.average(z[~s.treat], axis=0, weights=w.in_order[~s.treat]))
    ax = cw.plot_clusters(w, axes[1])
    treated = s.n_treated > 0
    areas = ax.collections[1].get_sizes()
    assert_allclose(areas / areas.sum(), cluster_sums(w.in_order, s.starts)[treated] / w.in_order[s.treat].sum())
    positions = [ax.collections[i].get_offsets()[:, 0].mean() for i in (0, 2)]
    assert positions[0] > positions[1]
    assert cos_advice(s).plot(axes[2]) is axes[2]
    by_unit = study(schools().assign(late=lambda f: (f["age"] > 0).astype(int)))
    with pytest.raises(InputError, match="for whole clusters"):
        cw.plot_clusters(cw.unadjusted_weights(by_unit))
    plt.close("all")


def test_the_outcome_model_knows_what_was_balanced():
    s = study()
    cluster, unit = cos_weights(s, "cluster", icc=0.1, lam=1.0), cos_weights(s, icc=0.1, lam=1.0)
    only = study(covs=["size", "urban"])
    assert_allclose(cluster.estimate().std_error, cos_weights(only, "cluster", icc=0.1, lam=1.0).estimate().std_error, rtol=1e-10)
    assert unit.estimate().std_error < cluster.estimate().std_error
    assert "cluster covariates" in cluster.estimate().explain() and METHODS["cos"].knows({"cluster_means": True}) == "covariates and cluster means"


def test_bounds_in_any_form_and_advice_without_outcome():
    s = study()
    assert_allclose(cos_weights(s, "cluster", icc=0.1, lam=1.0, bounds=np.array([0, np.inf])).weights, cos_weights(s, "cluster", icc=0.1, lam=1.0).weights)
    with pytest.raises(InputError, match="cluster_bounds instead"):
        cos_weights(s, "cluster", icc=0.1, lam=1.0, bounds=np.array([0, 5]))
    with pytest.raises(InputError, match="residual variances of an outcome, and the study has none"):
        cos_advice(study(outcome=None))


def test_other_methods_still_say_who_can():
    with pytest.raises(InputError, match="cos_weights"):
        cw.hierarchical_weights(study())
    unit_level = study(schools().assign(late=lambda f: (f["age"] > 0).astype(int)))
    with pytest.raises(InputError) as error, warnings.catch_warnings():
        cw.hierarchical_weights(unit_level, estimand="ATO")
    assert "COS" not in str(error.value)
    assert balancing_weights(study(), tolerance="auto").solution.certificate.ok


# --- simulation and size ------------------------------------------------------------------------------------------


def test_order_of_the_published_simulation():
    from clusterweights.simulate import summer_school_data
    covs = ["reading", "math", "black", "hispanic", "female", "free_lunch", "ell", "novice", "attendance", "turnover", "reading_proficient",
            "math_proficient", "minority", "enrolment"]
    def errors(seed, overlap):
        s = Study(summer_school_data(seed, overlap=overlap), treat="treat", outcome="outcome", cluster="cluster", covs=covs)
        made = cw.unadjusted_weights(s), cos_weights(s), cos_weights(s, estimand="ATO")
        return [np.average(s.outcome[s.treat], weights=w.in_order[s.treat]) - np.average(s.outcome[~s.treat], weights=w.in_order[~s.treat]) - 0.3
                for w in made]
    poor, good = (np.abs(np.mean([errors(seed, c) for seed in range(30)], axis=0)) for c in (1.0, 7.5))
    assert poor[0] > 0.3 and poor[0] > poor[1] > poor[2] and poor[1] < 0.06 and poor[2] < 0.02
    assert (good[1:] < 0.012).all()


@pytest.mark.parametrize("icc", [0.0, 0.016, 0.2, 1.0])
def test_many_clusters_are_solved_and_certified(icc):
    rng = np.random.default_rng(3)
    sizes = rng.integers(5, 60, 400)
    x = rng.normal(size=(sizes.sum(), 10)) + 0.5 * np.repeat(rng.normal(size=(400, 10)), sizes, axis=0)
    found = solve_cos(x, np.r_[0, np.cumsum(sizes)], np.full(10, 0.2), 3000.0, 1.2, icc, solver="structured")
    assert found.certificate.ok and found.weights.min() >= 0
    assert_allclose(found.weights.sum(), 3000, rtol=1e-10)
