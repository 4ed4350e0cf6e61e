"""The page behind an address: local unless told otherwise, and asking nobody else for anything."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from tempfile import TemporaryDirectory
from typing import Any

from fs_plugins.errors import SettingError
from fs_plugins.playground.engine import Playground
from fs_plugins.playground.models import Models
from fs_plugins.playground.pictures import MOST_BYTES

DEFAULT_MODELS = ("demo", "demo-clip")
SESSIONS = 100
"""Visitors that are remembered; of more, those who came first are forgotten."""
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; font-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; worker-src 'self' blob:; connect-src 'self'; object-src 'none'; "
    "base-uri 'self'; form-action 'self'"
)
"""What a browser may fetch for the page: from its server alone. gradio's own scripts are inline."""
CSS = """
.fs-row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(7rem, 22%), 1fr)); gap: .5rem; }
figure { margin: .5rem 0; }
figure img { width: 100%; max-width: 16rem; height: auto; image-rendering: pixelated; border-radius: 4px; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; }
.fs-table { overflow-x: auto; }
.fs-table table { border-collapse: collapse; width: 100%; }
.fs-table caption { text-align: left; font-weight: 600; }
.fs-table th, .fs-table td { text-align: left; vertical-align: top; padding: .3rem .5rem; overflow-wrap: anywhere;
  border-bottom: 1px solid var(--border-color-primary); }
.fs-plot { width: 100%; max-width: 40rem; height: auto; background: white; border-radius: 4px; }
#status { position: sticky; top: 0; z-index: 5; background: var(--body-background-fill); }
.fs-status { font-weight: 600; margin: 0; padding: .4rem 0; }
.fs-wrong { color: var(--error-text-color, #b3261e); }
.fs-progress progress { width: 100%; }
.fs-links a { margin-right: 1rem; text-decoration: underline; }
"""


class Policy:
    """Puts ``POLICY`` on every answer; an ASGI middleware."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = {
                    b"content-security-policy": POLICY.encode(),
                    b"x-content-type-options": b"nosniff",
                    b"referrer-policy": b"no-referrer",
                }
                message = {**message, "headers": [*message.get("headers", ()), *extra.items()]}
            await send(message)

        await self.app(scope, receive, sent if scope["type"] == "http" else send)


def serve(
    models: Iterable[str] = DEFAULT_MODELS,
    *,
    psm: str = "auto",
    host: str | None = None,
    port: int | None = None,
    share: bool = False,
    ready: Callable[[str], object],
) -> None:
    """Load the models and serve the page, until Ctrl-C.

    Args:
        models, psm: as ``Models`` takes them.
        host, port: where to listen; left out, GRADIO_SERVER_NAME and GRADIO_SERVER_PORT, or else 127.0.0.1 and the
            first free port from 7860 on.
        share: whether the page gets an address for everybody, by gradio's tunnel.
        ready: told the page's address once it is served.

    Raises:
        FSPluginsError: a model cannot be loaded or smoothed.
        SettingError: the address cannot be had.
    """
    playground = Playground(Models(models, psm))
    with TemporaryDirectory(prefix="fs-plugins-playground-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads go with the server
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        from fs_plugins.playground.page import Page

        blocks = Page(playground).blocks
        try:
            ready(_launched(blocks, host, port, share))
            blocks.block_thread()
        finally:
            blocks.close(verbose=False)


def _launched(blocks: Any, host: str | None, port: int | None, share: bool) -> str:
    import gradio
    from starlette.middleware import Middleware

    plain = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none is fetched
    try:
        _, local, public = blocks.launch(
            server_name=host,
            server_port=port,
            share=share,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=MOST_BYTES,
            state_session_capacity=SESSIONS,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            theme=gradio.themes.Default(**plain),
            css=CSS,
            app_kwargs={"middleware": [Middleware(Policy)]},
        )
    except OSError as error:
        raise SettingError(f"Cannot serve at host {host!r}, port {port}: {error}") from None
    return str(public or local)
