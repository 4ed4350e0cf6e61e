"""``python -m fs_plugins.cli``, for launchers that start modules."""

from fs_plugins.cli import main

main()
