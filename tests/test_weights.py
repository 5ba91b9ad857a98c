"""What methods promise about weights, whom they keep, what they report, and how they are used again."""

import copy
import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from helpers import PUPILS, pupils, residuals_by_refitting, schools
from numpy.testing import assert_allclose, assert_array_equal
from scipy.optimize import minimize

import clusterweights as cw
from clusterweights import EstimationError, FewClustersWarning, InfeasibleError, InputError, Study
from clusterweights.balancing import solve_balancing
from clusterweights.datasets import late_entry_study, load_late_entry
from clusterweights.hierarchical import solve_hierarchical
from clusterweights.weights import METHODS, resolve_lam

pytestmark = pytest.mark.filterwarnings("error::clusterweights.core.ClusterWeightsWarning")

COVS = ["age", "income"]
FRAME = schools(seed=2)
FUNCTIONS = {"unadjusted": cw.unadjusted_weights, "balancing": cw.balancing_weights, "hierarchical": cw.hierarchical_weights}


def study(frame=FRAME, **changes):
    return Study(frame, **({"treat": "late", "outcome": "score", "cluster": "school", "covs": COVS} | changes))


def with_one_armed_schools():
    "Six schools of twelve pupils: four have both arms, school 4 only late pupils, school 5 none."
    frame = schools(6, 12, seed=2)
    return frame.assign(late=np.select([frame["school"] == 4, frame["school"] == 5], [1, 0], frame["late"]))


# --- known answers ------------------------------------------------------------------------------------------------


def test_balancing_weights_are_those_of_least_norm():
    "With bounds that do not bind, least variable weights solve two linear equations: total and means."
    late = FRAME["late"] == 1
    controls, mean = FRAME.loc[~late, COVS].to_numpy(), FRAME.loc[late, COVS].mean().to_numpy()
    w = solve_balancing(controls, mean, late.sum(), bounds=(-np.inf, np.inf)).weights
    rows = np.column_stack([np.ones((~late).sum()), controls]).T
    assert_allclose(w, np.linalg.pinv(rows) @ (late.sum() * np.r_[1.0, mean]), atol=1e-10)


def test_distances_are_in_standard_deviations():
    x = np.array([[0.0], [2.0]] * 10)          # standard deviation 1, mean 1, largest 2
    for scale in (1, 100):
        with pytest.raises(InfeasibleError) as e:
            solve_balancing(scale * x, np.array([scale * 5.0]), 7)
        assert e.value.distance == pytest.approx(3)
        assert solve_balancing(scale * x, np.array([scale * 5.0]), 7, tolerance="auto").tolerance == pytest.approx(3.03)


@pytest.mark.parametrize("scaling", ["means", "sums"])
def test_hierarchical_weights_are_those_of_a_general_optimiser(scaling):
    rng = np.random.default_rng(4)
    x, starts, block = rng.normal(size=(12, 2)), np.array([0, 5, 12]), np.repeat([0, 1], [5, 7])
    mean, total, lam = rng.normal(size=(2, 2)) / 3, np.array([2.0, 7.0]), 0.6

    def loss(w):
        out = 0
        for g in (0, 1):
            miss = w[block == g] @ x[block == g] - total[g] * mean[g]
            price = lam * (w[block == g] ** 2).sum()
            if scaling == "means":
                out += ((miss / total[g]) ** 2).sum() + price / total[g] ** 2
            else:
                out += (miss**2).sum() + price / ((block == g).sum() + total[g])
        return out

    def misses(w):
        return np.r_[w @ x - total @ mean, w[block == 0].sum() - 2, w[block == 1].sum() - 7]

    found = minimize(loss, total[block] / np.bincount(block)[block], method="SLSQP", bounds=[(0, None)] * 12,
                     constraints={"type": "eq", "fun": misses}, options={"ftol": 1e-15, "maxiter": 1000})
    assert_allclose(solve_hierarchical(x, starts, mean, total, lam, scaling=scaling).weights, found.x, atol=1e-5)


def test_an_unknown_scaling_is_refused():
    with pytest.raises(InputError, match="Did you mean 'means'"):
        solve_hierarchical(np.zeros((2, 1)), np.array([0, 1, 2]), np.zeros((2, 1)), np.ones(2), 1.0, scaling="mean")


def test_hierarchical_weights_keep_their_promises():
    w = cw.hierarchical_weights(study(), lam=2.0).weights
    late = FRAME["late"] == 1
    assert_allclose(w[~late] @ FRAME.loc[~late, COVS], FRAME.loc[late, COVS].sum(), atol=1e-9)
    assert_allclose(pd.Series(w[~late]).groupby(FRAME.loc[~late, "school"].to_numpy()).sum(), FRAME.loc[late].groupby("school").size())
    assert (w >= 0).all()


def test_a_tolerance_and_a_share_are_used_but_not_exceeded():
    w = cw.balancing_weights(study(), tolerance=0.05, max_share=0.05).weights
    late = FRAME["late"] == 1
    gap = np.abs(np.average(FRAME[~late][COVS], axis=0, weights=w[~late]) - FRAME.loc[late, COVS].mean()) / FRAME[COVS].std(ddof=0)
    assert gap.max() == pytest.approx(0.05, abs=1e-9)
    assert w[~late].max() <= 0.05 * late.sum() * (1 + 1e-12)
    assert w[~late].sum() == pytest.approx(late.sum())


# --- estimands ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_effect_on_controls_mirrors_that_on_the_treated(name):
    mirrored = study(FRAME.assign(late=1 - FRAME["late"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cw.OverlapWarning)
        here, there = FUNCTIONS[name](study(), estimand="ATC"), FUNCTIONS[name](mirrored, estimand="ATT")
    assert_allclose(here.weights, there.weights, atol=1e-10)
    a, b = here.estimate(), there.estimate()
    assert_allclose([a.estimate, a.std_error], [-b.estimate, b.std_error], rtol=1e-9)
    assert a.term == "ATC"


@pytest.mark.parametrize("name, options", [("balancing", {}), ("hierarchical", {"lam": 0.7, "standardize": False})])
def test_weights_for_all_are_those_of_controls_for_a_treated_copy_of_everybody(name, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cw.OverlapWarning)
        both = FUNCTIONS[name](study(), estimand="ATE", **options).weights
        for arm in (0, 1):
            part = FRAME[FRAME["late"] == arm]
            stacked = pd.concat([part.assign(late=0), FRAME.assign(late=1)], ignore_index=True)
            assert_allclose(both[part.index], FUNCTIONS[name](study(stacked), **options).weights[:len(part)], atol=1e-9)


def test_other_names_of_the_effect_on_the_treated():
    assert cw.balancing_weights(study(), estimand="atet").estimand == "ATT"
    with pytest.raises(InputError, match="it offers 'ATT', 'ATC', 'ATE' and 'ATO'"):
        cw.balancing_weights(study(), estimand="ATX")


def test_clusters_can_count_the_same():
    uneven = FRAME.iloc[[*range(0, 24), *range(24, 30), *range(36, 45)]]
    w = cw.unadjusted_weights(study(uneven), cluster_weight="clusters")
    means = uneven[uneven["late"] == 1].groupby("school")["score"].mean()
    assert w.estimate().mean_treated == pytest.approx(means.mean())
    assert w.weights[uneven["late"] == 1].sum() == pytest.approx((uneven["late"] == 1).sum())


def test_lam_can_differ_between_arms():
    lam = {"controls": 2.0, "treated": 0.5}
    both = cw.hierarchical_weights(study(), lam, estimand="ATE", standardize=False)
    assert both.params["lam"] == lam
    for arm, value in lam.items():
        alone = cw.hierarchical_weights(study(), value, estimand="ATE", standardize=False).in_order
        mask = both.weighted_arms[arm]
        assert_allclose(both.in_order[mask], alone[mask], atol=1e-12)
    with pytest.raises(InputError, match="weighted arms are 'controls'"):
        cw.hierarchical_weights(study(), lam)


# --- sampling weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimand", ["ATT", "ATE"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_sampling_weight_of_two_is_a_unit_twice(name, estimand):
    "For a method with lam, the price of uneven weights is per unit of mean sampling weight 1."
    times = 1 + np.arange(len(FRAME)) % 3
    weighted = study(FRAME.assign(times=times), sampling_weights="times")
    repeated = study(FRAME.loc[FRAME.index.repeat(times)].reset_index(drop=True))
    options = ({"lam": 0.5}, {"lam": 0.5 * times.mean()}) if name == "hierarchical" else ({}, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cw.OverlapWarning)
        once, often = (FUNCTIONS[name](s, estimand=estimand, **o) for s, o in zip((weighted, repeated), options))
    sums = pd.Series(often.weights).groupby(np.repeat(FRAME.index, times)).sum()
    assert_allclose(once.weights * times.mean(), sums, atol=1e-9)
    assert_allclose(once.factor, once.weights / (times / times.mean()))
    assert once.estimate().estimate == pytest.approx(often.estimate().estimate, rel=1e-9)


# --- surveys and targets from outside -----------------------------------------------------------------------------


def survey(**changes):
    "Those who are late answered; the scores of the others are not known."
    frame = FRAME.assign(score=FRAME["score"].where(FRAME["late"] == 1))
    return Study.survey(frame, **({"outcome": "score", "cluster": "school", "covs": COVS} | changes))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_respondents_are_weighted_like_the_treated_of_everybody(name):
    options = {"lam": 1.0} if name == "hierarchical" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cw.OverlapWarning)
        answers = FUNCTIONS[name](survey(), **options)
        everybody = FUNCTIONS[name](study(), estimand="ATE", **options)
    late = FRAME["late"].to_numpy() == 1
    assert_allclose(answers.weights, np.where(late, everybody.weights, 0), atol=1e-10)
    e = answers.estimate()
    assert e.term == "mean"
    assert e.estimate == pytest.approx(everybody.estimate().mean_treated)
    y, w = FRAME.loc[late, "score"].to_numpy(), answers.weights[late]
    if name == "unadjusted":
        residuals = (y - y.mean()) * len(y) / (len(y) - 1)
    else:
        residuals = residuals_by_refitting(FRAME, cluster=name == "hierarchical")[late]
    assert e.std_error == pytest.approx(np.sqrt(((w / w.sum()) ** 2 * residuals**2).sum()), rel=1e-8)


def test_a_total_is_the_mean_times_the_population():
    totals = {"N": 1000.0, "age": 150.0, "income": 600.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cw.OverlapWarning)
        w = cw.balancing_weights(survey(totals=totals), estimand="total")
    used = w.weights > 0
    assert_allclose([w.weights.sum(), *(w.weights @ FRAME[COVS])], list(totals.values()), rtol=1e-9)
    assert w.estimate().estimate == pytest.approx((w.weights[used] * FRAME.loc[used, "score"]).sum(), rel=1e-9)
    mean = cw.balancing_weights(survey(totals=totals), estimand="mean").estimate()
    assert w.estimate().std_error == pytest.approx(1000 * mean.std_error)


@pytest.mark.parametrize("name, options", [("balancing", {}), ("hierarchical", {"lam": 1.0})])
def test_the_study_itself_as_a_target_from_outside(name, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cw.OverlapWarning)
        inside = FUNCTIONS[name](study(), estimand="ATE", **options)
        outside = FUNCTIONS[name](study(), estimand="ATE", target=FRAME.sample(frac=1, random_state=1), **options)
    assert_allclose(outside.weights, inside.weights, atol=1e-10)


def test_means_as_a_target_from_outside():
    goal = {"income": 0.5, "age": 0.2}
    w = cw.balancing_weights(study(), estimand="ATE", target=goal).weights
    for arm in (0, 1):
        mask = FRAME["late"] == arm
        assert_allclose(np.average(FRAME.loc[mask, list(goal)], axis=0, weights=w[mask]), list(goal.values()), atol=1e-10)
        assert w[mask].sum() == pytest.approx(len(FRAME))
    with pytest.raises(InputError, match="estimand='ATE'"):
        cw.balancing_weights(study(), target=goal)
    with pytest.raises(InputError, match="has no clusters"):
        cw.hierarchical_weights(study(), lam=1.0, estimand="ATE", target=goal)


@pytest.mark.parametrize("population, options", [
    (lambda: study(), {"estimand": "ATE", "target": {"age": 0.2, "income": 0.5}}),
    (lambda: survey(totals={"N": 1000.0, "age": 150.0, "income": 600.0}), {"estimand": "mean"})], ids=["means", "totals"])
def test_clusters_cannot_count_the_same_where_the_target_has_none(population, options):
    with pytest.raises(InputError, match="cluster_weight"):
        cw.balancing_weights(population(), cluster_weight="clusters", **options)


# --- units that are left out --------------------------------------------------------------------------------------


def test_left_out_clusters_change_nothing():
    frame = with_one_armed_schools()
    part = frame[frame["school"] < 4]
    with pytest.warns(cw.DroppedUnitsWarning) as caught:
        whole = cw.hierarchical_weights(study(frame), standardize=False)
    [message] = [str(w.message) for w in caught]
    assert "12 of 28 treated units were left out, and 1 cluster with them: no controls in cluster (12 units)." in message
    assert "16 of 28 treated units, in 4 of the 5 clusters" in message
    assert caught[0].filename == __file__
    some = cw.hierarchical_weights(study(part), standardize=False)
    assert_allclose(whole.weights, np.r_[some.weights, np.zeros(24)], atol=1e-10)
    assert whole.params["lam"] == pytest.approx(some.params["lam"], rel=1e-12)
    a, b = whole.estimate(), some.estimate()
    assert_allclose([a.estimate, a.std_error, a.mean_treated], [b.estimate, b.std_error, b.mean_treated], rtol=1e-9)
    assert_allclose(whole.balance().l2, some.balance().l2, rtol=1e-7, atol=1e-12)
    with_weight = (some.weights[part["late"] == 0] > 0).sum()
    assert f"32 kept of 44, {with_weight} with weight" in str(whole.summary())


def test_frames_are_in_the_order_of_the_caller():
    mixed = PUPILS.sample(frac=1, random_state=3).reset_index(drop=True)
    with pytest.warns(cw.ClusterWeightsWarning):
        out = cw.hierarchical_weights(pupils(mixed), lam=1.0).to_frame()
    assert list(out["cluster"]) == list(mixed["school"])
    assert list(out["treated"]) == list(mixed["late"] == 1)
    assert list(out["reason"]) == list(mixed["school"].map({"b": "no treated in cluster", "c": "no controls in cluster"}).fillna(""))
    assert list(out["kept"]) == list(out["reason"] == "")
    assert (out.loc[~out["kept"], "weight"] == 0).all()


def test_frames_keep_rows_with_missing_values():
    gaps = FRAME.assign(age=FRAME["age"].where(FRAME.index != 7))
    with pytest.warns(cw.DroppedUnitsWarning):
        dropped = study(gaps, missing="drop")
    weights = cw.balancing_weights(dropped)
    out, others = weights.to_frame(), FRAME.index != 7
    assert len(out) == len(FRAME)
    assert (out.loc[7, "weight"], out.loc[7, "kept"], out.loc[7, "reason"]) == (0, False, "missing")
    assert out.loc[7, "cluster"] is None or pd.isna(out.loc[7, "cluster"])
    assert (out.loc[others, "reason"] == "").all()
    assert_allclose(out.loc[others, "weight"], cw.balancing_weights(study(FRAME[others])).weights, atol=1e-12)


def test_clusters_to_leave_out_make_it_feasible():
    "The late pupils of schools 1 and 3 are older than any of their schoolmates, by more than the other schools can make good."
    old = FRAME["school"].isin([1, 3]) & (FRAME["late"] == 1)
    frame = FRAME.assign(age=np.where(old, 9.0, FRAME["age"]))
    with pytest.raises(InfeasibleError, match="Leaving out") as e:
        cw.hierarchical_weights(study(frame), lam=1.0)
    assert "age" in e.value.names
    assert e.value.clusters
    assert set(e.value.clusters) <= {1, 3}
    assert len(e.value.direction) == len(COVS)
    rest = frame[~frame["school"].isin(e.value.clusters)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cw.OverlapWarning)
        assert cw.hierarchical_weights(study(rest), lam=1.0).status == "certified"


def test_a_single_weighted_unit_is_worth_a_warning():
    frame = pd.DataFrame({"school": [0] * 15 + [1] * 15, "late": ([1] * 3 + [0] * 12) * 2, "score": np.arange(30.0),
                          "age": ([2.0, 2, 2] + [0.0] * 11 + [4.0]) * 2})
    with pytest.warns(cw.OverlapWarning, match="25% of the weight of the controls") as caught:
        cw.balancing_weights(pupils(frame))
    assert caught[0].filename == __file__
    frame.loc[[14, 29], "age"] = 25.0
    cw.balancing_weights(pupils(frame))


# --- estimates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("estimand", ["ATT", "ATC", "ATE"])
def test_standard_errors_from_their_definition(name, estimand):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cw.OverlapWarning)
        weights = FUNCTIONS[name](study(), estimand=estimand)
    late, y = FRAME["late"].to_numpy() == 1, FRAME["score"].to_numpy()
    if name == "unadjusted":
        residuals = np.zeros(len(y))
        for arm in (late, ~late):
            residuals[arm] = (y[arm] - y[arm].mean()) * arm.sum() / (arm.sum() - 1)
    else:
        residuals = residuals_by_refitting(FRAME, cluster=name == "hierarchical")
    variance = sum((weights.weights[i] / weights.weights[late == late[i]].sum()) ** 2 * residuals[i] ** 2 for i in range(len(y)))
    e, w = weights.estimate(), weights.weights
    assert e.std_error == pytest.approx(np.sqrt(variance), rel=1e-8)
    assert e.estimate == pytest.approx(np.average(y[late], weights=w[late]) - np.average(y[~late], weights=w[~late]), rel=1e-12)
    assert e.term == estimand


def test_subgroups_from_their_definition():
    group = np.where(np.arange(len(FRAME)) % 2, "odd", "even")
    weights = cw.balancing_weights(study())
    out = weights.estimate(by=group).set_index("group")
    y, late, residuals = FRAME["score"].to_numpy(), FRAME["late"].to_numpy() == 1, residuals_by_refitting(FRAME)
    for name in ("even", "odd"):
        means, covariates, variance = [], [], 0.0
        for arm in (late, ~late):
            used = arm & (group == name)
            w, r = weights.weights[used], residuals[used]
            means.append(np.average(y[used], weights=w))
            covariates.append(np.average(FRAME.loc[used, COVS], axis=0, weights=w))
            variance += ((w / w.sum()) ** 2 * (r - np.average(r, weights=w)) ** 2).sum()
        pooled = sum(FRAME.loc[arm & (group == name), COVS].var() for arm in (late, ~late)) / 2
        assert out.loc[name, "estimate"] == pytest.approx(means[0] - means[1])
        assert out.loc[name, "std_error"] == pytest.approx(np.sqrt(variance), rel=1e-8)
        assert out.loc[name, "units"] == ((weights.weights > 0) & (group == name)).sum()
        assert out.loc[name, "largest_smd"] == pytest.approx((np.abs(covariates[0] - covariates[1]) / np.sqrt(pooled)).max())


def test_outcomes_by_name_and_by_values():
    frame = FRAME.assign(later=3 * FRAME["score"] + FRAME["age"])
    two = cw.balancing_weights(study(frame, outcome=["score", "later"]))
    assert two.estimate() == two.estimate("score")
    alone = cw.balancing_weights(study(frame, outcome="later")).estimate()
    assert_allclose([two.estimate("later").estimate, two.estimate("later").std_error], [alone.estimate, alone.std_error], rtol=1e-12)
    assert two.estimate(frame["later"]) == two.estimate("later")
    with pytest.raises(InputError, match="Did you mean 'later'"):
        two.estimate("latter")
    with pytest.raises(InputError, match="1 missing or infinite"):
        two.estimate(frame["later"].where(frame.index > 0))


def test_no_outcome_is_no_estimate():
    with pytest.raises(InputError, match="has no outcome"):
        cw.balancing_weights(study(outcome=None)).estimate()


def test_an_outcome_that_covariates_explain_has_no_standard_error():
    constant = study(FRAME.assign(score=5.0))
    with pytest.raises(EstimationError, match="does not vary"):
        cw.balancing_weights(constant).estimate()


# --- lam ----------------------------------------------------------------------------------------------------------


def test_lam_is_the_unexplained_share_of_the_weighted_arm():
    for estimand, arms in {"ATT": {"controls": 0}, "ATC": {"treated": 1}, "ATE": {"controls": 0, "treated": 1}}.items():
        found = resolve_lam(study(), estimand, "auto", within=True)
        assert list(found) == list(arms)
        for arm, late in arms.items():
            part = FRAME[FRAME["late"] == late]
            assert found[arm] == pytest.approx(1 - sm.OLS(part["score"], sm.add_constant(part[COVS])).fit().rsquared, rel=1e-10)


def test_lam_leaves_out_what_the_method_leaves_out():
    frame = with_one_armed_schools()
    within = resolve_lam(study(frame), "ATT", "auto", within=True)
    assert within["controls"] == pytest.approx(resolve_lam(study(frame[frame["school"] < 4]), "ATT", "auto", within=True)["controls"])
    assert within["controls"] != pytest.approx(resolve_lam(study(frame), "ATT", "auto", within=False)["controls"])


def test_lam_cannot_be_found_without_unexplained_outcome():
    with pytest.raises(EstimationError, match="predict it perfectly"):
        resolve_lam(study(FRAME.assign(score=2 * FRAME["age"])), "ATT", "auto", within=True)
    with pytest.raises(InputError, match="study has none"):
        resolve_lam(study(outcome=None), "ATT", "auto", within=True)


@pytest.mark.parametrize("lam", [0, -1, np.inf, np.nan, True, "some", None, [1.0]])
def test_lam_is_a_positive_number(lam):
    with pytest.raises(InputError, match="positive number, 'auto' or 'balance'"):
        resolve_lam(study(), "ATT", lam, within=True)


# --- the object ---------------------------------------------------------------------------------------------------


def test_the_recipe_can_be_repeated():
    late = late_entry_study()
    assert cw.balancing_weights(late, solver="osqp").refit(late).solution.solver == "osqp"
    tiny = Study(load_late_entry().assign(born=lambda f: f["born"] / 1e4), treat="late", outcome="math", cluster="school",
                 covs=["female", "born"])
    w = cw.hierarchical_weights(tiny, lam=1.0, standardize=False)
    assert_allclose(w.refit(tiny).weights, w.weights, atol=1e-12)
    assert w.refit(tiny, lam=3.0).params["lam"] == 3.0


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("estimand", ["ATT", "ATE"])
def test_every_option_is_remembered(name, estimand):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cw.OverlapWarning)
        w = FUNCTIONS[name](study(), estimand=estimand)
        assert set(w.params) == set(METHODS[name].options)
        assert_array_equal(w.refit(study()).weights, w.weights)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))], ids=["copied", "pickled"])
def test_copies_are_equal_and_read_only(twin):
    w = cw.hierarchical_weights(study())
    other = twin(w)
    assert_array_equal(other.weights, w.weights)
    assert other.estimate() == w.estimate()
    for weights in (w, other):
        with pytest.raises(ValueError, match="read-only"):
            weights.in_order[0] = 5.0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_method_refuses_what_is_no_study_and_what_is_no_option(name):
    with pytest.raises(InputError, match="takes a Study, not DataFrame"):
        FUNCTIONS[name](FRAME)
    with pytest.raises(InputError, match="has no option 'estimant'. Did you mean 'estimand'"):
        FUNCTIONS[name](study(), estimant="ATT")
    whole = study(FRAME.assign(late=FRAME["school"] % 2))
    if METHODS[name].whole_clusters:
        with pytest.warns(FewClustersWarning, match="degrees of freedom"):
            assert FUNCTIONS[name](whole).estimate().vcov == "CR2, counts clusters"
    else:
        with pytest.raises(InputError, match="never varies within 'school'.*unadjusted_weights"):
            FUNCTIONS[name](whole)
