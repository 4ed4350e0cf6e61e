"""The scripts that trained what ships: ``python -m tools.world --help``."""
