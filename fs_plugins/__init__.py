"""Certified robustness for multimodal models as a plugin: feature-space smoothing of the vision encoder."""

from fs_plugins.api import SmoothingHandle, Status, certify, certify_predictions, disable, enable, status, vision_call
from fs_plugins.certificates import Certificate, PredictionCertificate
from fs_plugins.errors import (
    FSPluginsError,
    FSPluginsWarning,
    JudgeError,
    ModelError,
    PixelError,
    PluginError,
    PSMError,
    RegistryError,
    SettingError,
)
from fs_plugins.hooks import hookimpl
from fs_plugins.patch import SmoothingEvent
from fs_plugins.psm import PSM
from fs_plugins.smoothing import FeatureSmoother
from fs_plugins.towers import swap_encoder
from fs_plugins.vision import Field, PixelSpace, Readout, VisionCall

__version__ = "0.1.0"

__all__ = [
    "PSM",
    "Certificate",
    "FSPluginsError",
    "FSPluginsWarning",
    "FeatureSmoother",
    "Field",
    "JudgeError",
    "ModelError",
    "PSMError",
    "PixelError",
    "PixelSpace",
    "PluginError",
    "PredictionCertificate",
    "Readout",
    "RegistryError",
    "SettingError",
    "SmoothingEvent",
    "SmoothingHandle",
    "Status",
    "VisionCall",
    "certify",
    "certify_predictions",
    "disable",
    "enable",
    "hookimpl",
    "status",
    "swap_encoder",
    "vision_call",
]
