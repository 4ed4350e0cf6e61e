"""``python -m fs_plugins.playground``: the page on the models that ship, as a Space runs it.

GRADIO_SERVER_NAME and GRADIO_SERVER_PORT say where it listens; ``fs-plugins playground`` has options.
"""

from __future__ import annotations

import os

from fs_plugins.hf.load import quieten
from fs_plugins.playground.server import serve
from fs_plugins.terminal import Terminal


def main() -> None:
    """Serve the page until Ctrl-C."""
    quieten()
    if "SPACE_ID" in os.environ:  # whose proxy alone comes here, and says who sent it
        os.environ.setdefault("FORWARDED_ALLOW_IPS", "*")
    serve(ready=lambda address: Terminal().print(f"The playground is at {address}"))


if __name__ == "__main__":
    main()
