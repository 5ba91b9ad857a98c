"""The balancing problem as general solvers want it, in several scalings, and what PIQP and OSQP make of it."""

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from clusterweights.qp import BlockSums, Problem

SCALINGS = ("sum", "mean", "sum, ridge", "mean, ridge", "dense")


@dataclass(frozen=True)
class Matrices:
    """Minimise ½ u'Qu + q'u subject to |A u − value| ≤ slack and lower ≤ u ≤ upper.

    quadratic, linear : Q and q. rows : A. The first entries of u are the weights, divided by `unit` (n,)."""
    quadratic: sparse.csc_matrix | np.ndarray
    linear: np.ndarray
    rows: sparse.csc_matrix | np.ndarray
    value: np.ndarray
    slack: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    unit: np.ndarray


def formulate(problem: Problem, scaling: str) -> Matrices:
    """The problem in scaled weights, whose ridge is the same for every unit. The rows of constraints have length 1.

    scaling : "sum" (weights add up to about one in each block of the balance rows) or "mean" (they are about one). Imbalances are variables of their
    own, which keeps the matrices sparse; with ", ridge" they are scaled so that the quadratic term is the identity. "dense" is "sum" without
    imbalances: the quadratic term is a full (n, n) matrix."""
    root, scale = np.sqrt(problem.ridge), problem.balance.scale[problem.balance.block]
    price = float(np.median(root) if "mean" in scaling else np.median(root / scale))
    build = _dense if scaling == "dense" else _sparse
    return build(problem, price / root, price, price if "ridge" in scaling else 1.0)


def _sparse(problem: Problem, unit: np.ndarray, price: float, measure: float) -> Matrices:
    "With imbalances, divided by `measure`, as variables of their own. price : the root of the ridge of a scaled weight."
    n, target = problem.n, np.concatenate([value.ravel() for _, value in problem.penalties])
    m = len(target)
    penalised = sparse.vstack([sums.matrix() for sums, _ in problem.penalties]) @ sparse.diags(unit / measure)
    rows, values, slack = [sparse.hstack([penalised, -sparse.eye(m)])], [target / measure], [np.zeros(m)]
    for c in problem.constraints:
        row, value = _on_imbalances(problem, c.sums, c.value, measure) or _on_weights(c.sums, c.value, unit, m)
        length = np.sqrt(np.asarray(row.multiply(row).sum(axis=1)).ravel())
        rows.append(sparse.diags(1 / length) @ row)
        values.append(value / length)
        slack.append(c.slack.ravel() / length)
    return Matrices(sparse.diags(np.r_[np.full(n, (price / measure)**2), np.ones(m)], format="csc"), np.zeros(n + m),
                    sparse.vstack(rows, format="csc"), np.concatenate(values), np.concatenate(slack),
                    np.r_[np.broadcast_to(problem.lower, n) / unit, np.full(m, -np.inf)],
                    np.r_[np.broadcast_to(problem.upper, n) / unit, np.full(m, np.inf)], unit)


def _on_weights(sums: BlockSums, value: np.ndarray, unit: np.ndarray, m: int) -> tuple[sparse.spmatrix, np.ndarray]:
    "The rows of `sums` on weights and m imbalances, and their value."
    return sparse.hstack([sums.matrix() @ sparse.diags(unit), sparse.csc_matrix((value.size, m))]), value.ravel()


def _on_imbalances(problem: Problem, sums: BlockSums, value: np.ndarray, measure: float) -> tuple[sparse.spmatrix, np.ndarray] | None:
    """An overall sum as a combination of penalised sums by cluster of the same columns, and its value; None if there are none.

    Σ_i γ_i x_i = Σ_g (imbalance_g + target_g) / scale_g: an entry for each cluster instead of one for each unit."""
    before, total = problem.n, problem.n + sum(target.size for _, target in problem.penalties)
    for s, target in problem.penalties:
        if len(sums.scale) == 1 < len(s.scale) and s.x.shape == sums.x.shape and np.array_equal(s.x, sums.x):
            factor, d = sums.scale[0] / s.scale, s.x.shape[1]
            sides = [sparse.csc_matrix((d, width)) for width in (before, total - before - target.size)]
            return sparse.hstack([sides[0], measure * sparse.kron(factor[None], sparse.eye(d)), sides[1]]), value.ravel() - factor @ target
        before += target.size
    return None


def _dense(problem: Problem, unit: np.ndarray, price: float, _: float) -> Matrices:
    "Without imbalances, all matrices full."
    penalised = np.concatenate([sums.matrix().toarray() for sums, _ in problem.penalties]) * unit
    target = np.concatenate([value.ravel() for _, value in problem.penalties])
    quadratic = penalised.T @ penalised
    quadratic[np.diag_indices(problem.n)] += price**2
    rows = np.concatenate([c.sums.matrix().toarray() for c in problem.constraints]) * unit
    length = np.sqrt((rows**2).sum(axis=1))
    return Matrices(quadratic, -penalised.T @ target, rows / length[:, None], np.concatenate([c.value.ravel() for c in problem.constraints]) / length,
                    np.concatenate([c.slack.ravel() for c in problem.constraints]) / length, problem.lower / unit, problem.upper / unit, unit)


def by_piqp(m: Matrices) -> tuple[np.ndarray, str, int]:
    "Weights, what the solver says about them, and its iterations. Its tolerance is 1e-8 by default."
    import piqp
    full = isinstance(m.rows, np.ndarray)
    solver, rows, exact = piqp.DenseSolver() if full else piqp.SparseSolver(), m.rows if full else m.rows.tocsr(), m.slack == 0
    part = (lambda keep: rows[keep]) if full else (lambda keep: rows[keep].tocsc())
    within = (None, None, None) if exact.all() else (part(~exact), (m.value - m.slack)[~exact], (m.value + m.slack)[~exact])
    solver.setup(m.quadratic, m.linear, part(exact), m.value[exact], *within, m.lower, m.upper)
    status = solver.solve()
    return solver.result.x[:len(m.unit)] * m.unit, status.name.removeprefix("PIQP_").lower().replace("_", " "), solver.result.info.iter


def by_osqp(m: Matrices, **settings) -> tuple[np.ndarray, str, int]:
    "Weights, what the solver says about them, and its iterations; at its defaults but for `settings`."
    import osqp
    n, size = len(m.unit), len(m.linear)
    solver = osqp.OSQP()
    solver.setup(sparse.csc_matrix(m.quadratic), m.linear, sparse.vstack([m.rows, sparse.eye(n, size)], format="csc"),
                 np.r_[m.value - m.slack, m.lower[:n]], np.r_[m.value + m.slack, m.upper[:n]], verbose=False, **settings)
    result = solver.solve(raise_error=False)
    return result.x[:n] * m.unit, result.info.status, result.info.iter
