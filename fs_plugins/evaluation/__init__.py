"""Asking models and scoring what they say."""

from fs_plugins.evaluation.answers import ask
from fs_plugins.evaluation.metrics import Estimate, mean, proportion

__all__ = ["Estimate", "ask", "mean", "proportion"]
