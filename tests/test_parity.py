"""Parity with values computed by other software; each folder of reference/ says where its figures come from."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from clusterweights.hierarchical import solve_hierarchical

REFERENCE = Path(__file__).parent / "reference"


@pytest.fixture(scope="module")
def balancer():
    data = pd.read_csv(REFERENCE / "balancer" / "data.csv")
    exact = pd.read_csv(REFERENCE / "balancer" / "weights_exact.csv")
    assert (data["cluster"].diff().fillna(0) >= 0).all()
    return data, exact


@pytest.mark.parametrize("solver", ["structured", "piqp", "osqp"])
@pytest.mark.parametrize("lam", [1, 10])
def test_hierarchical_weights_of_balancer(balancer, lam, solver):
    data, exact = balancer
    covariates = [f"x{j}" for j in range(1, 6)]
    treated, controls = data[data["z"] == 1], data[data["z"] == 0]
    means = treated.groupby("cluster")[covariates].mean()
    starts = np.r_[0, np.cumsum(controls.groupby("cluster").size())]
    solution = solve_hierarchical(controls[covariates].to_numpy(), starts, means.to_numpy(),
                                  treated.groupby("cluster").size().to_numpy(float), lam, scaling="sums", solver=solver)
    expected = exact[f"multilevel_qp_lam{lam}_scale1_exact1"].to_numpy()[controls.index]
    np.testing.assert_allclose(solution.weights, expected, atol=1e-10)
