"""Purifier and smoothness mapper: the trained pair that sharpens a smoothed encoder."""

from fs_plugins.psm.bundle import PSM, Part, PSMConfig, ReadoutSpec
from fs_plugins.psm.mapper import ResidualMapper
from fs_plugins.psm.protocols import Calibrates, Denoises, Mapper, Purifier
from fs_plugins.psm.purifier import PAPER_UNET, UNetPurifier

__all__ = [
    "PAPER_UNET",
    "PSM",
    "Calibrates",
    "Denoises",
    "Mapper",
    "PSMConfig",
    "Part",
    "Purifier",
    "ReadoutSpec",
    "ResidualMapper",
    "UNetPurifier",
]
