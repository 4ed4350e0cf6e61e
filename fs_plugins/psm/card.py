"""A PSM's model card in the hub's words: the YAML head that its pages and searches read, and what a PSM is.

text = headed(text, head("my-psm", base_model="owner/model", license="apache-2.0", results=[figure(...)]))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

    from fs_plugins.psm.bundle import PSMConfig

LIBRARY = "fs-plugins"
TAGS = (LIBRARY, "feature-space-smoothing", "certified-robustness")
ROBUSTNESS, RADIUS = "robustness_score", "average_certified_radius"
"""Metrics: the mean cosine between features of single noisy draws and of the clean picture; l2, in [0, 1] pixels."""


def head(
    name: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    results: Sequence[EvalResult] = (),
    tags: Sequence[str] = (),
) -> ModelCardData:
    """The head of a card.

    Args:
        name: the PSM's.
        base_model: what it serves: a model of the hub, or an encoder that ships, by its name in the registry.
        license: of its weights, by the hub's name for it, such as ``apache-2.0``.
        results: its figures; see ``figure``.
        tags: further ones than ``TAGS``.
    """
    from huggingface_hub import ModelCardData

    return ModelCardData(
        license=license,
        library_name=LIBRARY,
        tags=[*TAGS, *tags],
        base_model=base_model,
        model_name=name if results else None,
        eval_results=list(results) or None,
    )


def figure(
    metric: str, value: float, name: str, *, data: str, task: str = "image-feature-extraction", **args: Any
) -> EvalResult:
    """A figure of a card's text, as its head says it.

    Args:
        metric: its kind in one word, such as ``ROBUSTNESS``, or the hub's ``psnr``.
        value: with as many digits as the text has.
        name: the metric in words.
        data: what it was measured on, in words.
        task: the hub's name for what is done.
        args: what else decides it, such as ``sigma``.
    """
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type=task,
        dataset_type="imagefolder",
        dataset_name=data,
        dataset_config=data,  # by which figures of other data are kept apart
        metric_type=metric,
        metric_name=name,
        metric_value=value,
        metric_args=args or None,
    )


def headed(text: str, data: ModelCardData) -> str:
    """A card's text with this head, in place of any that it has."""
    from huggingface_hub import ModelCard

    body = ModelCard(text).text if text.startswith("---\n") else text
    return f"---\n{data.to_yaml(line_break=chr(10))}\n---\n\n{body.lstrip()}"


def about(config: PSMConfig, encoder: str, psm: str) -> list[str]:
    """What a PSM is and how it is used, in lines of Markdown.

    Args:
        encoder: whose it is for.
        psm: what ``enable`` is told.
    """
    readouts = ", ".join(f"`{spec.name}`" for spec in config.readouts) or "none (the purifier serves any)"
    low, high = config.sigma_range
    size = "{}x{}".format(*config.image_size) if config.image_size else "any number of"
    return [
        f"# {config.name}",
        "",
        f"A PSM (purifier and smoothness mapper, arXiv 2601.16200) for the vision encoder of `{encoder}`: readouts "
        f"with a mapper: {readouts}; {size} pixels; sigma {low:g}"
        + (f" to {high:g}, served at {config.sigma:g}" if low < high else "")
        + ", in [0, 1] pixel units.",
        "",
        f'    fs_plugins.enable(model, psm="{psm}")',
    ]


def short(config: PSMConfig, psm: str) -> str:
    """A card for where nobody wrote one: what the PSM is for.

    Args:
        psm: what ``enable`` is told.
    """
    return headed("\n".join([*about(config, config.encoder, psm), ""]), head(config.name))
