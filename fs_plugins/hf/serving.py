"""``transformers serve`` for one model, all of whose pictures are smoothed.

transformers does the protocol, the templates and the generation. What is ours: the model is smoothed before there is a
server, and ``OneModel`` stands where transformers' handlers ask for a model by name. That place is theirs to move;
tests/hf/test_serving.py says what we rely on.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from socket import AF_INET6, SO_REUSEADDR, SOCK_STREAM, SOL_SOCKET, getaddrinfo, socket
from typing import TYPE_CHECKING, Any

from transformers.cli.serving.model_manager import ModelManager

from fs_plugins.api import SmoothingHandle, enable
from fs_plugins.errors import FSPluginsError, ModelError, SettingError
from fs_plugins.hf.dialogue import pixels_of
from fs_plugins.hf.load import load_chat

if TYPE_CHECKING:
    from fastapi import FastAPI

STATUS = "/fs-plugins/status"
"""The route that says what has been smoothed."""


@dataclass(frozen=True)
class Served:
    """A smoothed model, its processor, and the name that requests know it by."""

    name: str
    model: Any
    processor: Any
    handle: SmoothingHandle


def smoothed(
    name: str,
    *,
    processor: str | None = None,
    psm: str = "auto",
    sigma: float | None = None,
    n0: int = 4,
    seed: int | None = None,
) -> Served:
    """Load an image-text-to-text model and smooth it.

    Args:
        name, processor: as ``load_chat`` takes them.
        psm, sigma, n0, seed: as ``fs_plugins.enable`` takes them.

    Raises:
        ModelError: it cannot be loaded, nobody claims it, or it has no chat template.
        SettingError: a setting is out of range, or would smooth nothing.
        PSMError, RegistryError, PluginError: see ``fs_plugins.enable``.
    """
    model, found = load_chat(name, processor=processor)
    if not getattr(found, "chat_template", None):
        raise ModelError(
            f"The processor of {processor or name!r} has no chat template, so a server cannot put a conversation to "
            "this model. Save one beside it (chat_template.jinja), or name another with --processor."
        )
    handle = enable(model, psm=psm, sigma=sigma, n0=n0, seed=seed, processor=pixels_of(found))
    if not all(smoother.sigma for smoother in handle.smoothers):
        raise SettingError("sigma 0 adds no noise, and without noise nothing is smoothed. Give a sigma above 0.")
    return Served(name, model, found, handle)


class OneModel(ModelManager):
    """Hands out the model that is smoothed, and neither loads another nor lets this one go."""

    def __init__(self, served: Served) -> None:
        self.served = served
        super().__init__(force_model=served.name)

    def load_model_and_processor(
        self,
        model_id_and_revision: str,
        progress_callback: Callable[[dict[str, Any]], None] | None = None,
        tqdm_class: type | None = None,
        gguf_file: str | None = None,
    ) -> tuple[Any, Any]:
        """The model and its processor.

        Raises:
            SettingError: another one was asked for.
        """
        if gguf_file or model_id_and_revision != self.process_model_name(self.served.name):
            raise SettingError(f"This server has {self.served.name!r} alone; {model_id_and_revision!r} was asked for.")
        if progress_callback is not None:
            progress_callback({"status": "ready", "model": model_id_and_revision, "cached": True})
        return self.served.model, self.served.processor

    def _load_model(self, *args: Any, **kwargs: Any) -> Any:
        """Whichever way it comes to be called, what it would give is not smoothed.

        Raises:
            SettingError: always.
        """
        raise SettingError(f"This server has {self.served.name!r} alone and loads no other model.")

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # type: ignore[override]
        """What /v1/models lists: this model, not those in the hub's cache."""
        return [{"id": self.served.name, "object": "model", "created": 0, "owned_by": "fs_plugins"}]


def application(served: Served) -> FastAPI:
    """transformers' server, without continuous batching and compilation, and ``STATUS`` beside its routes.

    An FSPluginsError in a request (pixels that are none, another model) is answered with 400 and its sentence.
    """
    from fastapi.responses import JSONResponse
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import GenerationState

    manager, state = OneModel(served), GenerationState()
    app = build_server(
        manager,
        ChatCompletionHandler(manager, state),
        completion_handler=CompletionHandler(manager, state),
        response_handler=ResponseHandler(manager, state),
        transcription_handler=TranscriptionHandler(manager, state),
        generation_state=state,
    )

    @app.get(STATUS)
    def status() -> dict[str, Any]:
        return {"model": served.name, **asdict(served.handle.status())}

    @app.exception_handler(FSPluginsError)
    async def refuse(request: Any, error: Exception) -> JSONResponse:
        return JSONResponse({"error": {"message": str(error)}}, status_code=400)

    return app


def bound(host: str, port: int) -> socket:
    """A socket at this address that nobody listens at yet; port 0 is a free one.

    Raises:
        SettingError: the address is not this machine's, or taken.
    """
    made = None
    try:
        family, kind, protocol, _, address = getaddrinfo(host, port, type=SOCK_STREAM)[0]
        made = socket(family, kind, protocol)
        made.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        made.bind(address)
    except (OSError, ValueError) as error:  # ValueError: no host is called that
        if made is not None:
            made.close()
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SettingError(
            f"Cannot serve at host {host!r}, port {port}: {why}. Give another --host (127.0.0.1 is this machine alone) "
            "or --port (0 is any that is free)."
        ) from None
    return made


def address(at: socket) -> str:
    """Where a browser on this machine finds it."""
    host, port = at.getsockname()[:2]
    return f"http://[{host}]:{port}" if at.family == AF_INET6 else f"http://{host}:{port}"


def run(app: FastAPI, at: socket) -> None:
    """Serve until Ctrl-C, which lets requests that are under way end."""
    import uvicorn

    with suppress(KeyboardInterrupt):
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[at])
