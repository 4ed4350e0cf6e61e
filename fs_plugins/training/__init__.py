"""Self-supervised PSM training: two stages, the paper's losses, any image folder."""

from fs_plugins.training.data import ImageFolder
from fs_plugins.training.psm import Stage, TrainingConfig, robustness_score, train_psm

__all__ = ["ImageFolder", "Stage", "TrainingConfig", "robustness_score", "train_psm"]
