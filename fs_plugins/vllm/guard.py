"""What stands between vLLM and an image that goes around smoothing.

vLLM is several processes: one that takes requests, one for each engine, and workers that hold the model. Each calls
``install``, and in each it takes effect where that process comes by afterwards: settings are checked and dangerous
options refused before a worker starts, workers smooth what they load, engines ask their workers whether they did, and
so does, before the first request, whoever takes requests: it knows that smoothing was asked for, whatever the others
have been told.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import wrapt

from fs_plugins.errors import ModelError, SettingError
from fs_plugins.vllm import VARIABLE, counts
from fs_plugins.vllm.settings import Settings, parsed
from fs_plugins.vllm.worker import is_protected, protect

Original = Callable[..., Any]

NORMALISING = ("do_normalize", "do_rescale", "image_mean", "image_std", "rescale_factor")
"""Words of processors that change what a pixel means."""
ASKED = "fs_plugins_protected"
"""What a worker is asked by name."""
_WHERE = f"Is {VARIABLE} set on every machine, and fs-plugins installed there?"
_RAY = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"


def install(text: str) -> None:
    """Stand in the places of this process that images come by, as soon as vLLM has imported them.

    Raises:
        SettingError, PSMError: the settings cannot be used; see ``settings.parsed``.
    """
    settings = parsed(text)
    counts.prepare()
    copied = {one for one in os.environ.get(_RAY, "").split(",") if one} | {VARIABLE, counts.FOLDER}
    os.environ[_RAY] = ",".join(sorted(copied))
    guard = Guard(settings)
    for module, name, wrapper in (
        ("vllm.engine.arg_utils", "EngineArgs.create_engine_config", guard.configured),
        ("vllm.v1.worker.worker_base", "WorkerBase.__init__", guard.made),
        ("vllm.v1.executor.abstract", "Executor.__init__", guard.started),
        ("vllm.v1.engine.llm_engine", "LLMEngine.get_supported_tasks", guard.opening),
        ("vllm.v1.engine.async_llm", "AsyncLLM.get_supported_tasks", guard.opening_server),
        ("vllm.v1.engine.input_processor", "InputProcessor._get_mm_identifier", guard.named),
        ("vllm.multimodal.processing.inputs", "ProcessorInputs.__init__", guard.processed),
    ):
        wrapt.register_post_import_hook(partial(_stand, name, wrapper), module)
    wrapt.register_post_import_hook(counts.show, "vllm.v1.metrics.prometheus")


def _stand(name: str, wrapper: Callable[..., Any], module: Any) -> None:
    wrapt.wrap_function_wrapper(module, name, wrapper)


class Guard:
    """What is done at each place; the arguments are wrapt's: the original, whose method it is, its arguments."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.normalising: Mapping[str, Any] | None = None
        """What the server's own options say of it; None in processes that take no requests."""
        self.asked: WeakSet[Any] = WeakSet()
        """Engines whose workers have said that they smooth."""

    def configured(self, original: Original, args: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """The engine's whole configuration, before there is a worker."""
        config = original(*given, **named)
        check(config)
        multimodal = config.model_config.multimodal_config
        multimodal.mm_device_do_normalize = False  # pixels would come to the encoder as bytes
        self.normalising = normalising(multimodal.mm_processor_kwargs or {})
        return config

    def made(self, original: Original, worker: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A worker has been made; what it loads will be smoothed."""
        original(*given, **named)
        worker.load_model = partial(self._load, worker, worker.load_model)
        setattr(worker, ASKED, partial(is_protected, worker))

    def _load(self, worker: Any, load: Original, *given: Any, **named: Any) -> None:
        from vllm.logger import init_logger

        load(*given, **named)
        check(worker.vllm_config)
        handle = protect(worker, self.settings)
        init_logger("vllm.plugins.fs_plugins").info("%s", handle.status())

    def started(self, original: Original, executor: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        """An engine's workers have loaded the model."""
        original(*given, **named)
        agreed(executor.collective_rpc(ASKED))

    def opening(self, original: Original, engine: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Requests are about to be taken, by an engine that was made in Python."""
        if engine not in self.asked:
            with self._hearing(engine):
                agreed(engine.collective_rpc(ASKED))
        return original(*given, **named)

    async def opening_server(
        self, original: Original, engine: Any, given: tuple[Any, ...], named: dict[str, Any]
    ) -> Any:
        """Requests are about to be taken, by a server."""
        if engine not in self.asked:
            with self._hearing(engine):
                agreed(await engine.collective_rpc(ASKED))
        return await original(*given, **named)

    @contextmanager
    def _hearing(self, engine: Any) -> Iterator[None]:
        """Around a question to an engine's workers: whatever keeps them from answering is a refusal."""
        try:
            yield
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"The workers of vLLM do not say whether they smooth ({type(error).__name__}: {error}). {_WHERE}"
            ) from error
        self.asked.add(engine)

    def named(self, original: Original, processor: Any, given: tuple[Any, ...], named: dict[str, Any]) -> str:
        """What a picture's features are kept under: apart from those made otherwise, or from all others."""
        alone = "" if self.settings.share_draws else f"{secrets.token_hex(16)}:"
        return f"{self.settings.mark}:{alone}{original(*given, **named)}"

    def processed(self, original: Original, inputs: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A request's pictures are about to become pixels."""
        original(*given, **named)
        told = normalising(inputs.hf_processor_mm_kwargs)
        if self.normalising is not None and told != self.normalising:
            raise SettingError(
                f"mm_processor_kwargs of a request may not change how pixels are normalised ({', '.join(told)}): sigma "
                "would mean something else. Give such words to the server (--mm-processor-kwargs), for all requests."
            )


def agreed(told: Sequence[bool]) -> None:
    """Refuse to go on unless all workers smooth.

    Raises:
        ModelError: one does not, or there is none.
    """
    if not told or not all(told):
        raise ModelError(
            f"{told.count(False)} of {len(told)} workers of vLLM hold a model that is not smoothed. {_WHERE}"
        )


def normalising(told: Mapping[str, Any]) -> dict[str, Any]:
    """What a processor's arguments say of normalisation, also inside those of one modality."""
    found = {name: value for name, value in told.items() if name in NORMALISING}
    for name, value in told.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": one for inner, one in normalising(value).items()}
    return found


def check(config: Any) -> None:
    """Refuse what would serve images unsmoothed, or smooth something else than what is served.

    Args:
        config: vLLM's ``VllmConfig``.

    Raises:
        ModelError: the model looks at no images.
        SettingError: an option goes around the encoder, or changes it under our hands.
    """
    model = config.model_config
    multimodal = model.multimodal_config
    if multimodal is None or not any(multimodal.get_limit_per_prompt(one) for one in ("image", "video")):
        why = "by these options it is shown none" if multimodal is not None else "it reads text alone"
        raise ModelError(
            f"{model.model!r} looks at no images ({why}), so there is nothing to smooth. Unset {VARIABLE} to serve it."
        )
    compilation, lora = config.compilation_config, config.lora_config
    kept = getattr(config, "ec_transfer_config", None)
    given = kept is not None and kept.is_ec_consumer and not kept.is_ec_producer
    goes_around = {
        "An engine that only consumes (ec_role ec_consumer), whose --enable-mm-embeds vLLM switches on,": given,
        "--enable-mm-embeds": multimodal.enable_mm_embeds,
        "--enable-prompt-embeds": getattr(model, "enable_prompt_embeds", False),
    }
    changes = {
        "cudagraph_mm_encoder": getattr(compilation, "cudagraph_mm_encoder", False),
        "compile_mm_encoder": getattr(compilation, "compile_mm_encoder", False),
        "enable_tower_connector_lora": lora is not None and getattr(lora, "enable_tower_connector_lora", False),
        "VLLM_USE_RUST_FRONTEND": os.environ.get("VLLM_USE_RUST_FRONTEND", "0").lower() in ("1", "true"),
    }
    for option, on in goes_around.items():
        if on:
            raise SettingError(
                f"{option} lets a request bring embeddings of its own, which no encoder has made and nobody can "
                f"smooth. Leave it out, or unset {VARIABLE}."
            )
    for option, on in changes.items():
        if on:
            raise SettingError(
                f"{option} runs the vision encoder, or takes requests, in a way that smoothing cannot see. Switch it "
                f"off, or unset {VARIABLE}."
            )
