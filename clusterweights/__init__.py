"""Weights for treated and untreated people in clusters: global and local balance, and an honest effect."""

__version__ = "0.1.0"

from clusterweights.balancing import balancing_weights
from clusterweights.by_cluster import ClusterEffects, cluster_effects
from clusterweights.comparison import Agreement, Comparison, agreement, compare
from clusterweights.core import (ClusterWeightsError, ClusterWeightsWarning, DroppedUnitsWarning, EstimationError,
                                 FewClustersWarning, InfeasibleError, InputError, NotConvergedWarning, OverlapWarning, SolverError)
from clusterweights.cos import CosAdvice, cos_advice, cos_features, cos_weights, plot_arm_means, plot_clusters
from clusterweights.framework import Balance, Decomposition, balance_of, decompose, plot_overlap, worst_case
from clusterweights.hierarchical import hierarchical_weights
from clusterweights.inference import Estimate
from clusterweights.ipw import ipw_weights, propensity_scores
from clusterweights.mundlak import ClusterStatistics, cluster_statistics, decompose_by_statistics, mundlak_scores, mundlak_weights, plot_statistics
from clusterweights.outcomes import OutcomeModel
from clusterweights.resampling import Bootstrap, WildClusterTest, bootstrap, wild_cluster_test
from clusterweights.sensitivity import Sensitivity, sensitivity_analysis
from clusterweights.softcal import cross_fitted_lam, softcal_estimate, softcal_weights
from clusterweights.study import Study
from clusterweights.trial import (Trial, balance_test, intracluster_correlation, pair_clusters, pair_effect, randomisation_test,
                                  trial_effect, trial_power, two_stage_effects)
from clusterweights.weights import Feasibility, Weights, feasibility, unadjusted_weights

__all__ = ["Agreement", "Balance", "Bootstrap", "ClusterEffects", "ClusterStatistics", "ClusterWeightsError", "ClusterWeightsWarning", "Comparison",
           "CosAdvice", "Decomposition", "DroppedUnitsWarning", "Estimate", "EstimationError", "Feasibility", "FewClustersWarning",
           "InfeasibleError", "InputError", "NotConvergedWarning", "OutcomeModel", "OverlapWarning", "Sensitivity", "SolverError", "Study", "Trial",
           "Weights", "WildClusterTest", "agreement", "balance_of", "balance_test", "balancing_weights", "bootstrap", "cluster_effects",
           "cluster_statistics", "compare", "cos_advice", "cos_features", "cos_weights", "cross_fitted_lam", "decompose", "decompose_by_statistics",
           "feasibility", "hierarchical_weights", "intracluster_correlation", "ipw_weights", "mundlak_scores", "mundlak_weights", "pair_clusters",
           "pair_effect", "plot_arm_means", "plot_clusters", "plot_overlap", "plot_statistics", "propensity_scores", "randomisation_test",
           "sensitivity_analysis", "softcal_estimate", "softcal_weights", "trial_effect", "trial_power", "two_stage_effects", "unadjusted_weights",
           "wild_cluster_test", "worst_case"]
