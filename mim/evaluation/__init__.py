"""How good frozen features are: k-NN, a linear probe and label-free health numbers, over tensors alone."""

from mim.evaluation.features import Pool, extract, pooled_features
from mim.evaluation.health import feature_std, health_message, rankme
from mim.evaluation.knn import knn_accuracy
from mim.evaluation.logistic import linear_accuracy, logistic_regression, standardise
from mim.evaluation.probe import probe, probe_seeds
from mim.evaluation.splits import stratified_split

__all__ = [
    "Pool",
    "extract",
    "feature_std",
    "health_message",
    "knn_accuracy",
    "linear_accuracy",
    "logistic_regression",
    "pooled_features",
    "probe",
    "probe_seeds",
    "rankme",
    "standardise",
    "stratified_split",
]
