"""Puts registry.yaml, which lives at the top of the repository, inside the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRegistry(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copy2("registry.yaml", Path(self.build_lib) / "fs_plugins" / "registry.yaml")


setup(cmdclass={"build_py": BuildWithRegistry})
