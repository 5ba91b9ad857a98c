"""Certificates by hand, optima by hand and by scipy, and what happens when a library or the problem fails."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from helpers import four
from numpy.testing import assert_allclose, assert_array_equal
from scipy.optimize import minimize

from clusterweights import InfeasibleError, InputError, SolverError, core, qp
from clusterweights.qp import (BlockSums, Constraint, Problem, block_bounds, certify, closest, exact_means, exact_totals, solve,
                               with_tolerance)

WHOLE = np.array([0, 4])


def row(x, value, unit=10.0, name="age", tolerance=0.0):
    sums = BlockSums(np.array(x, float)[:, None], WHOLE, np.ones(1))
    return Constraint(sums, np.array([[value]], float), "balance", [name], unit, tolerance)


def residuals(problem, w, *multipliers):
    c = certify(problem, np.array(w, float), [np.array([[v]], float) for v in multipliers])
    return [c.equality, c.bounds, c.stationarity, c.gap]


# --- certificate --------------------------------------------------------------------------------------------------


def test_the_certificate_of_the_optimum_is_zero():
    assert_allclose(residuals(four(), [2.5] * 4, -2.5), 0, atol=1e-15)


def test_each_residual_of_the_certificate_by_hand():
    assert_allclose(residuals(four(), [2.75] * 4, -2.5), [1 / 21, 0, 1 / 11, 2.625 / 15.125], atol=1e-15)
    assert_allclose(residuals(four(), [2.5] * 4, -2.0), [0, 0, 0.2, 0.5 / 12.5], atol=1e-15)
    assert residuals(four(), [-1, 4, 4, 3], -2.5)[1] == pytest.approx(1 / 3)
    assert residuals(four(upper=2.5), [3, 2.5, 2.5, 2], -2.5)[1] == pytest.approx(0.2)


def test_the_certificate_sees_every_constraint():
    problem = four(extra=(row([-1, 1, -1, 1], 5),))
    assert residuals(problem, [2.5] * 4, 0.0, -2.5)[0] == pytest.approx(5 / 15)


def test_the_certificate_of_a_tolerance_by_hand():
    "The row may miss 5 by 0.2 × 10, so it ends at 3: weights 2.5 ∓ 0.75, multipliers -0.75 and -2.5."
    problem = four(extra=(row([-1, 1, -1, 1], 5, tolerance=0.2),))
    assert_allclose(residuals(problem, [1.75, 3.25, 1.75, 3.25], -0.75, -2.5), 0, atol=1e-15)
    assert residuals(problem, [1.9, 3.1, 1.9, 3.1], -0.6, -2.5)[0] == pytest.approx(0.6 / 15)
    exact = replace(problem, constraints=(row([-1, 1, -1, 1], 3), problem.constraints[1]))
    assert residuals(exact, [1.9, 3.1, 1.9, 3.1], -0.6, -2.5)[0] == pytest.approx(0.6 / 13)


def test_a_multiplier_for_a_tolerance_that_is_not_used_up_opens_a_gap():
    problem = four(extra=(row([-1, 1, -1, 1], 0, tolerance=0.2),))
    assert_allclose(residuals(problem, [2.5] * 4, 0.0, -2.5), 0, atol=1e-15)
    assert residuals(problem, [2.5] * 4, 0.1, -2.5)[3] == pytest.approx((0.1 * 2 + 4 * 0.1**2 / 2) / 12.5)


# --- optima -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["structured", "piqp", "osqp"])
def test_bounds_by_hand(solver):
    ridge = np.array([1, 1, 1, 9.0])
    assert_allclose(solve(four(lower=2.0, ridge=ridge), solver).weights, [8 / 3] * 3 + [2], atol=1e-12)
    assert_allclose(solve(four(upper=3.0, ridge=ridge), solver).weights, [3, 3, 3, 1], atol=1e-12)


@pytest.mark.parametrize("solver", ["structured", "piqp", "osqp"])
@pytest.mark.parametrize("value, tolerance, weights", [
    (5, 0.2, [1.75, 3.25, 1.75, 3.25]), (-5, 0.2, [3.25, 1.75, 3.25, 1.75]), (5, 0.0, [1.25, 3.75, 1.25, 3.75]), (5, 0.7, [2.5] * 4)])
def test_tolerances_by_hand(solver, value, tolerance, weights):
    solution = solve(four(extra=(row([-1, 1, -1, 1], value, tolerance=tolerance),)), solver)
    assert_allclose(solution.weights, weights, atol=1e-12)
    assert solution.tolerance == tolerance
    assert solution.certificate.ok
    assert solution.multipliers[0].item() == pytest.approx(2.5 - weights[1], abs=1e-9)
    assert solution.objective == pytest.approx(np.square(weights).sum() / 2)


def random_problem(tolerance=0.0, bounds=(0, np.inf), max_share=None):
    rng, starts, total = np.random.default_rng(8), np.array([0, 6, 14]), np.array([3.0, 5.0])
    x, mean = rng.normal(size=(14, 2)), rng.normal(size=(2, 2)) / 4
    lower, upper = block_bounds(bounds, max_share, starts, total)
    means = exact_means(x, mean, total, spread=np.array([1.0, 2.0]))
    problem = Problem(BlockSums(x, starts, 1 / total), mean, np.linspace(0.02, 0.1, 14), (means, exact_totals(starts, total)), lower, upper)
    return with_tolerance(problem, tolerance)


@pytest.mark.parametrize("options", [
    {}, {"tolerance": 0.02}, {"bounds": (0.05, 1.6)}, {"max_share": 0.35}, {"tolerance": 0.05, "max_share": 0.3, "bounds": (-0.1, 2)}])
def test_optima_are_those_of_a_general_optimiser(options):
    problem, block, total = random_problem(**options), np.repeat([0, 1], [6, 8]), np.array([3.0, 5.0])
    x, mean = problem.balance.x, problem.target
    allowed = options.get("tolerance", 0.0) * 8 * np.array([1.0, 2.0])
    low, high = options.get("bounds", (0, np.inf))
    high = np.minimum(high, options.get("max_share", 1.0) * total[block])

    def loss(w):
        local = [w[block == g] @ x[block == g] / total[g] - mean[g] for g in (0, 1)]
        return 0.5 * (np.square(local).sum() + (problem.ridge * w**2).sum())

    def totals(w):
        return [w[block == g].sum() - total[g] for g in (0, 1)]

    def miss(w):
        return w @ x - total @ mean

    rules = [{"type": "eq", "fun": totals}]
    if allowed.any():
        rules.append({"type": "ineq", "fun": lambda w: np.r_[allowed - miss(w), allowed + miss(w)]})
    else:
        rules.append({"type": "eq", "fun": miss})
    found = minimize(loss, total[block] / np.array([6, 8])[block], method="SLSQP", bounds=[(low, h) for h in high], constraints=rules,
                     options={"ftol": 1e-13, "maxiter": 1000})
    assert found.success
    assert_allclose(solve(problem).weights, found.x, atol=2e-5)


@pytest.mark.parametrize("upper, rough", [(np.inf, [0, 3, 3, 4.0]), (3.0, [3, 2, 2, 3.0])])
def test_polishing_frees_what_was_wrongly_fixed(upper, rough):
    scaled = qp._scale(four(upper=upper))
    p, *_, steps = qp._polish(scaled, np.array(rough), np.zeros(1))
    assert_allclose(p * scaled.sigma, 2.5, atol=1e-12)
    assert steps > 1


@pytest.mark.parametrize("rough", [[1.25, 3.75, 1.25, 3.75], [1.75, 3.25, 1.75, 3.25], [3.25, 1.75, 3.25, 1.75]])
def test_polishing_finds_which_tolerances_are_used_up(rough):
    scaled = qp._scale(four(extra=(row([-1, 1, -1, 1], 5, tolerance=0.2),)))
    assert_allclose(qp._polish(scaled, np.array(rough), np.zeros(2))[0] * scaled.sigma, [1.75, 3.25, 1.75, 3.25], atol=1e-12)


# --- infeasible problems ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("unit, expected", [(10.0, 3.0), (5.0, 6.0)])
def test_the_closest_weights_by_hand(sign, unit, expected):
    "All weight on the extreme unit gives 10; the target is 40: a miss of 30, of which `unit` makes one."
    problem = four(extra=(row([sign, 0, 0.5, -sign], sign * 40, unit), row([0, 0, 1, 0], 0, unit, name="income")))
    found = closest(problem)
    assert found.distance == pytest.approx(expected)
    assert found.names == ["age"]
    assert_allclose(np.abs(found.direction), [1, 0], atol=1e-9)
    assert_allclose(found.weights, [10, 0, 0, 0], atol=1e-8)
    with pytest.raises(InfeasibleError) as e:
        solve(problem)
    assert e.value.distance == pytest.approx(expected)
    assert e.value.names == ["age"]
    assert_allclose(e.value.weights, [10, 0, 0, 0], atol=1e-8)
    assert_array_equal(e.value.direction, found.direction)
    assert "'age'" in str(e.value)
    assert "income" not in str(e.value)


def test_the_direction_is_the_combination_that_cannot_be_reached():
    "The units reach no more than age + income = 20 (in tens: 2), the target is 20 + 20."
    found = closest(four(extra=(row([0, 2, 0, 0], 20), row([0, 0, 2, 0], 20, name="income"))))
    assert found.distance == pytest.approx(1)
    assert found.names == ["age", "income"]
    assert found.direction[0] == pytest.approx(found.direction[1])
    assert_allclose(found.weights, [0, 5, 5, 0], atol=1e-8)


def test_the_closest_weights_put_tolerances_aside():
    assert closest(four(extra=(row([1, 0, 0, -1], 40, tolerance=5.0),))).distance == pytest.approx(3)


def test_a_feasible_problem_has_distance_zero():
    assert closest(four(extra=(row([1, 0, 0, -1], 5),))).distance == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("tolerance", [0.0, 2.9])
def test_barely_infeasible_is_infeasible(tolerance):
    with pytest.raises(InfeasibleError):
        solve(four(extra=(row([1, 0, 0, -1], 10.01 + 10 * tolerance, tolerance=tolerance),)))


def test_barely_feasible_is_solved():
    assert_allclose(solve(four(extra=(row([1, 0, 0, -1], 9.99),))).weights, [9.99, 0.005, 0.005, 0], atol=1e-9)


def test_totals_beyond_the_bounds_are_named():
    starts, total = np.array([0, 2, 4]), np.array([3.0, 9.0])
    problem = Problem(BlockSums(np.zeros((4, 1)), starts, np.ones(2)), np.zeros((2, 1)), np.ones(4),
                      (exact_totals(starts, total, ["oak", "elm"]),), 0.0, 4.0)
    assert closest(problem).names == ["elm"]
    with pytest.raises(InfeasibleError, match="'elm'. Widen the bounds") as e:
        solve(problem)
    assert e.value.distance is None


def test_the_automatic_tolerance_is_just_enough():
    problem = with_tolerance(four(extra=(row([1, 0, 0, -1], 40),)), "auto")
    solution = solve(problem)
    assert solution.tolerance == pytest.approx(3.03)
    assert solution.weights @ [1, 0, 0, -1] == pytest.approx(40 - 30.3)
    assert solve(with_tolerance(four(extra=(row([1, 0, 0, -1], 5),)), "auto")).tolerance == 0


@pytest.mark.parametrize("tolerance", [-0.1, np.inf, np.nan, "some", None])
def test_tolerances_are_numbers_from_zero(tolerance):
    with pytest.raises(InputError, match="must be 'auto' or a number"):
        with_tolerance(four(), tolerance)


def test_totals_are_never_loosened():
    loose = with_tolerance(four(extra=(row([1, 0, 0, -1], 5),)), 0.5)
    assert [c.tolerance for c in loose.constraints] == [0.5, 0.0]
    assert [c.slack.item() for c in loose.constraints] == [5.0, 0.0]


# --- bounds -------------------------------------------------------------------------------------------------------


def test_bounds_of_blocks_by_hand():
    starts, total = np.array([0, 2, 5]), np.array([10.0, 4.0])
    lower, upper = block_bounds((0.5, 3), 0.5, starts, total)
    assert_array_equal(lower, [0.5] * 5)
    assert_array_equal(upper, [3, 3, 2, 2, 2])
    with pytest.raises(InputError, match="less than the lower bound"):
        block_bounds((2.5, np.inf), 0.5, starts, total)            # two of a total of 4, at most
    assert_array_equal(block_bounds((0, np.inf), None, starts, total)[1], np.full(5, np.inf))


@pytest.mark.parametrize("bounds", [(3, 1), (0,), "x", None, (np.nan, 1), (0, np.nan), (np.inf, np.inf)])
def test_bounds_are_two_ordered_numbers(bounds):
    with pytest.raises(InputError, match="bounds="):
        block_bounds(bounds, None, np.array([0, 1]), np.ones(1))


@pytest.mark.parametrize("share", [0, -0.1, 1.1, np.nan, "half"])
def test_a_share_lies_above_zero_and_at_most_at_one(share):
    with pytest.raises(InputError, match="max_share="):
        block_bounds((0, 1), share, np.array([0, 1]), np.ones(1))


# --- when libraries fail ------------------------------------------------------------------------------------------


def fails(scaled):
    return qp._Rough(np.full(4, np.nan), np.zeros(1), "numerics", 1)


@pytest.fixture
def only_libraries(monkeypatch):
    "Our own solver gives up, and the libraries are what the test puts in their place."
    monkeypatch.setattr(qp, "_own", lambda problem, start: (None, "stopped"))
    return lambda **libraries: monkeypatch.setattr(qp, "_LIBRARIES", qp._LIBRARIES | libraries)


def test_the_libraries_step_in(only_libraries):
    solution = solve(four())
    assert solution.solver == "piqp"
    assert_allclose(solution.weights, 2.5, atol=1e-12)


def test_the_second_library_steps_in(only_libraries):
    only_libraries(piqp=fails)
    solution = solve(four())
    assert solution.solver == "osqp"
    assert_allclose(solution.weights, 2.5, atol=1e-12)


def test_no_answer_at_all_is_an_error(only_libraries):
    only_libraries(piqp=fails, osqp=fails)
    with pytest.raises(SolverError, match="structured: stopped; piqp: numerics; osqp: numerics") as e:
        solve(four())
    assert e.value.solution is None


def test_sums_over_different_blocks_are_left_to_the_libraries():
    halves, thirds = (BlockSums(np.ones((6, 1)), np.arange(0, 7, size), np.ones(6 // size)) for size in (3, 2))
    problem = Problem(halves, np.array([[1.0], [3.0]]), np.ones(6), (Constraint(thirds, np.array([[1.0], [1], [2]]), "total", range(3)),))
    assert solve(problem).solver == "piqp"
    with pytest.raises(SolverError, match="different partitions"):
        solve(problem, "structured")


@pytest.mark.parametrize("missing", ["piqp", "osqp"])
def test_a_library_that_is_not_installed(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)  # an import then fails
    assert solve(four()).solver == "structured"
    with pytest.raises(InputError, match=f"{missing} is not installed"):
        solve(four(), missing)
    monkeypatch.setattr(qp, "_own", lambda problem, start: (None, "stopped"))
    assert solve(four()).solver == ({"piqp", "osqp"} - {missing}).pop()


def test_an_answer_without_certificate_is_an_error(monkeypatch):
    monkeypatch.setitem(core.TOLERANCES, "gap", -1.0)
    with pytest.raises(SolverError) as e:
        solve(four())
    assert_allclose(e.value.solution.weights, 2.5, atol=1e-9)


def test_a_library_that_wrongly_says_infeasible_is_not_believed(only_libraries):
    def wrong(scaled):
        return qp._Rough(np.zeros(4), np.zeros(1), "primal infeasible", 1)
    only_libraries(piqp=wrong)
    assert solve(four()).solver == "osqp"


@pytest.mark.parametrize("solver", ["pipq", None, 3])
def test_unknown_solvers_are_refused(solver):
    with pytest.raises(InputError, match="Unknown solver"):
        solve(four(), solver)


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [
    lambda p: replace(p, balance=BlockSums(np.full((4, 1), np.nan), WHOLE, np.ones(1))),
    lambda p: replace(p, target=np.array([[np.nan]])),
    lambda p: replace(p, ridge=np.array([1, 1, 1, np.inf])),
    lambda p: replace(p, constraints=(row([1, 0, 0, 0], np.inf), *p.constraints)),
], ids=["features", "target", "ridge", "value"])
def test_numbers_that_are_none_are_refused_everywhere(change):
    with pytest.raises(InputError, match="NaN or infinite"):
        change(four())


def test_a_ridge_must_be_positive():
    with pytest.raises(InputError, match="ridge"):
        four(ridge=np.array([1, 1, 1, 0.0]))


@pytest.mark.parametrize("starts", [[0, 3], [1, 4], [0, 2, 2, 4]])
def test_blocks_must_cover_all_units(starts):
    with pytest.raises(InputError, match="Blocks must cover"):
        replace(four(), balance=BlockSums(np.zeros((4, 1)), np.array(starts), np.ones(len(starts) - 1)))
