"""Asking models and scoring what they say."""

from fs_plugins.evaluation.datasets import Dataset, Sample, open_dataset
from fs_plugins.evaluation.judges import Judge, judge
from fs_plugins.evaluation.metrics import Estimate, mean, proportion

__all__ = ["Dataset", "Estimate", "Judge", "Sample", "judge", "mean", "open_dataset", "proportion"]
