"""Self-supervised PSM training: two stages, the paper's losses, any image folder."""

from fs_plugins.training.config import Stage, TrainingConfig
from fs_plugins.training.data import ImageFolder
from fs_plugins.training.folder import TrainingFolder
from fs_plugins.training.psm import robustness_score, train_psm

__all__ = ["ImageFolder", "Stage", "TrainingConfig", "TrainingFolder", "robustness_score", "train_psm"]
