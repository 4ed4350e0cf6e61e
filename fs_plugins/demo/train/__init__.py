"""The scripts that trained what ships: ``python -m fs_plugins.demo.train --help``."""
