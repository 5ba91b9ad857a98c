"""Weights for treated and untreated people in clusters: global and local balance, and an honest effect."""

__version__ = "0.1.0"

from clusterweights.balancing import balancing_weights
from clusterweights.by_cluster import ClusterEffects, cluster_effects
from clusterweights.comparison import Agreement, Comparison, agreement, compare
from clusterweights.core import (ClusterWeightsError, ClusterWeightsWarning, DroppedUnitsWarning, EstimationError,
                                 FewClustersWarning, InfeasibleError, InputError, NotConvergedWarning, OverlapWarning, SolverError)
from clusterweights.framework import Balance, Decomposition, balance_of, decompose, plot_overlap, worst_case
from clusterweights.hierarchical import hierarchical_weights
from clusterweights.inference import Estimate
from clusterweights.ipw import ipw_weights, propensity_scores
from clusterweights.outcomes import OutcomeModel
from clusterweights.resampling import Bootstrap, WildClusterTest, bootstrap, wild_cluster_test
from clusterweights.sensitivity import Sensitivity, sensitivity_analysis
from clusterweights.study import Study
from clusterweights.weights import Feasibility, Weights, feasibility, unadjusted_weights

__all__ = ["Agreement", "Balance", "Bootstrap", "ClusterEffects", "ClusterWeightsError", "ClusterWeightsWarning", "Comparison", "Decomposition", "DroppedUnitsWarning", "Estimate",
           "EstimationError", "Feasibility", "FewClustersWarning", "InfeasibleError", "InputError", "NotConvergedWarning", "OutcomeModel",
           "OverlapWarning", "Sensitivity", "SolverError", "Study", "Weights", "WildClusterTest", "agreement", "balance_of", "balancing_weights", "bootstrap", "cluster_effects",
           "compare", "decompose", "feasibility", "hierarchical_weights", "ipw_weights", "plot_overlap", "propensity_scores", "sensitivity_analysis",
           "unadjusted_weights", "wild_cluster_test", "worst_case"]
