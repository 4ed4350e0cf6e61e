"""``fs-plugins train``."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import TextColumn

from fs_plugins import errors
from fs_plugins.cli.base import bars, console, device, duration, errors_for_people, load, needs, plain_table, quieten

PRECISIONS = ("fp32", "bf16", "fp16")
_DATA, _PARTS, _STAGES, _RUN, _REPORT = "Data", "Parts", "Stages", "Run", "Report"


def train(
    photos: Annotated[Path | None, typer.Argument(help="A folder of PNG and JPEG files; no labels are needed.")] = None,
    model: Annotated[
        str,
        typer.Option(
            help='Folder or hub id of a transformers model, or an encoder of the registry; "demo" and "demo-clip" ship.'
        ),
    ] = "demo",
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint, the log, and the PSM in the end.")] = Path(
        "my-psm"
    ),
    name: Annotated[str | None, typer.Option(help="What the PSM is called; left out, the folder's name.")] = None,
    scenes: Annotated[
        int, typer.Option(min=0, help="So many scenes of the embedded world in place of PHOTOS.", rich_help_panel=_DATA)
    ] = 0,
    held_out: Annotated[
        int | None,
        typer.Option(help="Pictures that are never trained on; left out, a tenth, at most 64.", rich_help_panel=_DATA),
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Side of the images, for encoders that take any.", rich_help_panel=_DATA)
    ] = None,
    augment: Annotated[
        bool, typer.Option("--augment", help="Random crops and mirror images.", rich_help_panel=_DATA)
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that load images.", rich_help_panel=_DATA)] = None,
    sigma: Annotated[
        float, typer.Option(help="Noise level to serve at, in [0, 1] pixels.", rich_help_panel=_PARTS)
    ] = 0.25,
    sigma_range: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Lowest and highest level to train for; left out, --sigma alone.", rich_help_panel=_PARTS),
    ] = None,
    purifier: Annotated[
        str, typer.Option(help="unet, unet-paper, diffusion, none, or a plugin's kind.", rich_help_panel=_PARTS)
    ] = "unet",
    purifier_args: Annotated[
        str, typer.Option(help="Its arguments, such as '{\"channels\": [32, 64]}'.", rich_help_panel=_PARTS)
    ] = "{}",
    purifier_weights: Annotated[
        Path | None,
        typer.Option(help="diffusion: the public checkpoint, 256x256_diffusion_uncond.pt.", rich_help_panel=_PARTS),
    ] = None,
    lora: Annotated[
        int | None, typer.Option(min=1, help="diffusion: train updates of this rank only.", rich_help_panel=_PARTS)
    ] = None,
    mapper: Annotated[
        str, typer.Option(help="residual, none, or a plugin's kind.", rich_help_panel=_PARTS)
    ] = "residual",
    mapper_args: Annotated[str, typer.Option(help="Its arguments.", rich_help_panel=_PARTS)] = "{}",
    start: Annotated[
        str | None, typer.Option(help="A PSM whose purifier to go on from.", rich_help_panel=_PARTS)
    ] = None,
    steps: Annotated[
        int, typer.Option(help="Of the purifier; 0 with --start takes it as it is.", rich_help_panel=_STAGES)
    ] = 12_000,
    mapper_steps: Annotated[int, typer.Option(help="Of the mapper.", rich_help_panel=_STAGES)] = 2_500,
    batch_size: Annotated[int, typer.Option(help="Images a forward, in every process.", rich_help_panel=_STAGES)] = 16,
    accumulate: Annotated[int, typer.Option(help="Forwards a step.", rich_help_panel=_STAGES)] = 1,
    draws: Annotated[int, typer.Option(help="Noisy copies of each image.", rich_help_panel=_STAGES)] = 8,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Of the purifier; left out, 1e-3 from scratch and 5e-5 to fine-tune.", rich_help_panel=_STAGES
        ),
    ] = None,
    mapper_lr: Annotated[float, typer.Option(help="Of the mapper.", rich_help_panel=_STAGES)] = 2e-4,
    warmup: Annotated[int, typer.Option(help="Steps in which learning rates rise.", rich_help_panel=_STAGES)] = 100,
    ema: Annotated[float, typer.Option(help="Moving average of the purifier.", rich_help_panel=_STAGES)] = 0.99,
    lambda1: Annotated[float, typer.Option(help="Purifier: weight of l_rb.", rich_help_panel=_STAGES)] = 0.25,
    lambda2: Annotated[float, typer.Option(help="Purifier: weight of l_mse.", rich_help_panel=_STAGES)] = 0.25,
    lambda3: Annotated[float, typer.Option(help="Mapper: weight of l_stats.", rich_help_panel=_STAGES)] = 100.0,
    lambda4: Annotated[float, typer.Option(help="Mapper: weight of l_id.", rich_help_panel=_STAGES)] = 0.25,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.", rich_help_panel=_RUN)] = "fp32",
    seed: Annotated[int, typer.Option(help="Of weights, order, crops and noise.", rich_help_panel=_RUN)] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.", rich_help_panel=_RUN)] = 500,
    log_every: Annotated[int, typer.Option(help="Steps between rows of log.csv.", rich_help_panel=_RUN)] = 50,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Log for TensorBoard too.", rich_help_panel=_RUN)
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Try three steps a stage, say what it takes, write nothing.", rich_help_panel=_RUN
        ),
    ] = False,
    ablation: Annotated[
        bool,
        typer.Option(
            "--ablate", help="Train without each term of the losses, compare, write nothing.", rich_help_panel=_RUN
        ),
    ] = False,
    certified: Annotated[
        int, typer.Option("--certify", min=0, help="Held-out pictures to certify in the end.", rich_help_panel=_REPORT)
    ] = 8,
    n: Annotated[int, typer.Option("--n", min=1, help="Draws per certificate.", rich_help_panel=_REPORT)] = 1000,
    alpha: Annotated[
        float, typer.Option(help="Each certificate may be wrong with this probability.", rich_help_panel=_REPORT)
    ] = 1e-3,
) -> None:
    """Train a purifier and a mapper for any model, from any folder of pictures.

    An interrupted training goes on from OUT, to the same result. Several GPUs:
    accelerate launch --multi_gpu --num_processes 2 -m fs_plugins.cli train ...
    """
    with errors_for_people():
        needs("transformers")
        quieten()
        import fs_plugins
        from fs_plugins.training import Stage, TrainingConfig, TrainingFolder, data

        crew = _crew(precision)
        first, started = _purifier(purifier, purifier_args, purifier_weights, lora, start)
        common = {"batch_size": batch_size, "draws": draws, "warmup": warmup, "accumulate": accumulate}
        fine_tuned = started is not None or lora is not None
        config = TrainingConfig(
            sigma=sigma,
            sigma_range=sigma_range,
            purifier=first,
            mapper=None if mapper == "none" else _part(mapper, mapper_args, "--mapper-args"),
            purifier_stage=Stage(
                steps, lr=(5e-5 if fine_tuned else 1e-3) if lr is None else lr, ema=ema or None, **common
            ),
            mapper_stage=Stage(mapper_steps, lr=mapper_lr, **common),
            lambda1=lambda1,
            lambda2=lambda2,
            lambda3=lambda3,
            lambda4=lambda4,
            seed=seed,
            augment=augment,
        )
        tried = dry_run or ablation
        folder = (
            None if tried else TrainingFolder(out, save_every=save_every, log_every=log_every, tensorboard=tensorboard)
        )
        loaded = load(model)
        call = fs_plugins.vision_call(loaded)
        # Refuses now what could not be certified in the end.
        fs_plugins.certify(loaded, {}, psm=None, sigma=sigma, n=n, alpha=alpha)
        pictures, held = _pictures(photos, scenes, _image_size(call, size), held_out, seed)
        threads = workers or min(8, os.cpu_count() or 1)
        if tried or not (out / "training.json").exists():
            data.check(pictures, config, processes=crew.num_processes, workers=threads)
        _onto(call, crew.device)
        work = _Work(
            crew=crew,
            model=loaded,
            call=call,
            pictures=pictures,
            held=held,
            shown=_first(held, 64).to(crew.device),
            config=config,
            options={"accelerator": crew, "workers": threads, "start": started},
        )
        work.say(f"{len(pictures)} pictures to train on, {len(held)} held out.")
        if dry_run:
            work.dry_run()
        elif ablation:
            work.ablate()
        elif folder is not None:
            named = {"name": name or out.resolve().name, "encoder": Path(model).name if Path(model).exists() else model}
            work.train(folder, named, certified=certified, n=n, alpha=alpha)
        crew.end_training()


@dataclass(frozen=True)
class _Work:
    """What is trained, on what, and what is done with it; ``shown`` are held-out pictures as one tensor."""

    crew: Any
    model: Any
    call: Any
    pictures: Any
    held: Any
    shown: Any
    config: Any
    options: dict[str, Any]

    def say(self, text: str) -> None:
        if self.crew.is_main_process:
            console.print(text, highlight=False, soft_wrap=True)

    def train(self, folder: Any, named: dict[str, Any], *, certified: int, n: int, alpha: float) -> None:
        from fs_plugins.files import atomically
        from fs_plugins.training import publish, train_psm

        finished = (folder.path / "config.json").exists()
        folder.held = self.shown[:16]
        with self._progress() as told:
            psm = train_psm(self.call, self.pictures, self.config, **named, report=told, out=folder, **self.options)
        if finished:
            self.say(f"Finished already: {folder.path}")
        if finished or not self.crew.is_main_process:
            return
        with console.status("measuring the result"):
            scores = publish.measure(
                self.model, self.call, psm, self.shown, certified=certified, n=n, alpha=alpha, seed=self.config.seed
            )
        data = [
            f"{len(self.pictures)} pictures to train on ({self.pictures.digest}); {len(self.held)} more are held out "
            "(`held-out.txt`), chosen by their names and the seed. Whose they are and what may be done with them is for you to say.",
        ]
        card = publish.card(psm, self.config, scores, command=_command(self.crew), model=named["encoder"], data=data)
        atomically(folder.path / "held-out.txt", lambda file: file.write("\n".join(self.held.names).encode() + b"\n"))
        folder.publish(psm, card)
        _show_scores(scores)
        self.say(f"\nWritten: {folder.path} (config.json, psm.safetensors, README.md, held-out.txt, log.csv)")

    def ablate(self) -> None:
        from fs_plugins.training import robustness_score
        from fs_plugins.training.ablate import ablate

        with self._progress() as told:
            trials = list(ablate(self.call, self.pictures, self.shown, self.config, report=told, **self.options))
        if self.crew.is_main_process:
            _show_trials(trials, robustness_score(self.call, None, self.shown, self.config.sigma))

    def dry_run(self) -> None:
        """Three steps a stage, in memory."""
        from fs_plugins.training import train_psm
        from fs_plugins.training.data import batches, drawn, samples

        config = self.config
        short = {f"{name}_stage": replace(stage, steps=min(3, stage.steps)) for name, stage in config.stages.items()}
        few = replace(config, **short)
        marks: dict[str, list[float]] = {}

        def told(stage: str, step: int, steps: int, values: dict[str, float]) -> None:
            marks.setdefault(stage, []).append(time.perf_counter())

        psm = train_psm(self.call, self.pictures, few, name="dry", encoder="dry", report=told, **self.options)
        table = plain_table(
            "stage", "parameters", "weights, gradients, Adam, average", "a step", "loading", "steps", "all"
        )
        total = 0.0
        for name, stage in config.stages.items():
            module: Any = psm.purifier if name == "purifier" else psm.mappers
            count = sum(value.numel() for value in module.state_dict().values())
            copies = 4 + (stage.ema is not None)
            seconds = (marks[name][-1] - marks[name][0]) / max(1, len(marks[name]) - 1)
            began = time.perf_counter()
            for _ in batches(
                partial(drawn, self.pictures, few, name),
                samples(len(self.pictures), few, name),
                workers=self.options["workers"],
            ):
                pass
            loading = (time.perf_counter() - began) / few.stages[name].steps
            total += seconds * stage.steps
            table.add_row(
                *(name, f"{count:,}", _bytes(4 * copies * count), f"{seconds:.2f} s", f"{loading:.2f} s"),
                *(f"{stage.steps:,}", duration(seconds * stage.steps)),
            )
        if self.crew.is_main_process:
            console.print(table)
            self.say(
                f"About {duration(total)} and {_peak(self.crew.device)} of memory at the peak, a process. Loading runs "
                "beside the steps and costs no time as long as it is the shorter of the two. Nothing was written."
            )

    @contextmanager
    def _progress(self) -> Iterator[Callable[[str, int, int, dict[str, float]], None] | None]:
        if not self.crew.is_main_process:
            yield None
            return
        losses_column = TextColumn("{task.fields[losses]}", style="dim")
        with bars("{task.completed}/{task.total}", losses_column) as shown:
            tasks: dict[str, Any] = {}

            def told(stage: str, step: int, steps: int, values: dict[str, float]) -> None:
                if stage not in tasks:
                    tasks[stage] = shown.add_task(stage, total=steps, completed=step - 1, losses="")
                losses = " ".join(f"{name} {value:.4g}" for name, value in values.items())
                shown.update(tasks[stage], completed=step, losses=losses)

            yield told


def _crew(precision: str) -> Any:
    if precision not in PRECISIONS:
        raise errors.SettingError(f"--precision is one of {', '.join(PRECISIONS)}, got {precision!r}.")
    if precision == "fp16" and device() == "cpu":
        raise errors.SettingError("--precision fp16 needs a GPU; on a CPU take bf16 or fp32.")
    try:
        from accelerate import Accelerator
    except ImportError:
        raise errors.SettingError('This command needs accelerate: pip install "fs-plugins[train]".') from None
    try:
        crew = Accelerator(cpu=device() == "cpu", mixed_precision={"fp32": "no"}.get(precision, precision))
    except ValueError as error:
        raise errors.SettingError(f"--precision {precision} does not work here: {error}") from None
    if crew.distributed_type.value in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP"):
        raise errors.SettingError(
            f"Training runs whole in every process (accelerate launch --multi_gpu), not under {crew.distributed_type.value}."
        )
    return crew


def _part(kind: str, text: str, option: str) -> Any:
    from fs_plugins.psm import Part

    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise errors.SettingError(f"{option} is JSON, such as '{{\"channels\": [32, 64]}}'; {error}.") from None
    if not isinstance(given, dict):
        raise errors.SettingError(f"{option} is a JSON object, got {text}.")
    return Part(kind=kind, args=given)


def _purifier(kind: str, args: str, weights: Path | None, lora: int | None, start: str | None) -> tuple[Any, Any]:
    """The purifier to train, and the PSM that has the weights it starts from, if not from scratch."""
    from fs_plugins.plugins import plugin_parts
    from fs_plugins.psm import PAPER_UNET, PSM, Part, PSMConfig
    from fs_plugins.psm.diffusion import load_guided_diffusion

    if (start is not None or kind != "diffusion") and (weights or lora):
        raise errors.SettingError("--purifier-weights and --lora go with --purifier diffusion, and not with --start.")
    if start is not None:
        started = PSM.from_pretrained(start, **plugin_parts())
        if started.config.purifier is None:
            raise errors.SettingError(f"--start {start} has no purifier to go on from.")
        return started.config.purifier, started
    if kind == "none":
        return None, None
    part = _part(kind, args, "--purifier-args")
    if kind == "unet-paper":
        return Part(kind="unet", args={**PAPER_UNET, "channels": list(PAPER_UNET["channels"]), **part.args}), None
    if kind != "diffusion":
        return part, None
    if weights is None or not weights.is_file():
        raise errors.SettingError(
            "--purifier diffusion is fine-tuned: give the public checkpoint, 256x256_diffusion_uncond.pt, with "
            f"--purifier-weights; {'there is no file ' + str(weights) if weights else 'there is none yet'}."
        )
    if lora is not None:
        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        base = {"base": str(weights.resolve()), "sha256": digest, "rank": lora}
        return Part(kind="lora", args={**base, **part.args}), None
    known = PSMConfig(
        name="base", sigma=0.25, sigma_range=(0.25, 0.25), image_size=(256, 256), purifier=part, encoder="none",
        fingerprint=(),
    )  # fmt: skip
    started = PSM(known, **plugin_parts())
    started.purifier = load_guided_diffusion(weights, **part.args)
    return part, started


def _image_size(call: Any, size: int | None) -> Any:
    if len(call.pixels.mean) != 3:
        raise errors.SettingError(f"Purifiers take RGB images; this encoder's have {len(call.pixels.mean)} channels.")
    if call.image_size is None and size is None:
        raise errors.SettingError("This encoder takes images of any size: say which with --size.")
    wanted = call.image_size or (size, size)
    if size is not None and wanted != (size, size):
        raise errors.SettingError(f"--size {size}: this encoder sees {call.size_in_words} pixels; leave --size out.")
    return wanted


def _pictures(photos: Path | None, scenes: int, size: tuple[int, int], held: int | None, seed: int) -> tuple[Any, Any]:
    """What is trained on, and what is held out."""
    from fs_plugins.pictures import fitted
    from fs_plugins.training import ImageFolder

    class Scenes(ImageFolder):
        """Scenes of the embedded world, drawn as they are asked for."""

        def __init__(self) -> None:
            self.folder, self.size = Path("scenes"), size
            self.paths = [self.folder / f"{i:06}" for i in range(scenes)]

        def read(self, path: Path, **fit: Any) -> Any:
            from fs_plugins.demo import world

            return fitted(world.scene("train", int(path.name)).draw(), self.size, **fit)

        def bytes(self, path: Path) -> int:
            return 0

    if (photos is None) == (scenes == 0):
        raise errors.SettingError("Give a folder of pictures, or --scenes, to train on.")
    if photos is not None and not photos.is_dir():
        raise errors.SettingError(f"There is no folder {photos}.")
    whole = Scenes() if photos is None else ImageFolder(photos, size)
    count = min(64, max(1, len(whole) // 10)) if held is None else held
    if not 1 <= count < len(whole):
        raise errors.SettingError(
            f"Cannot hold out {count} of {len(whole)} pictures: hold out at least 1, and leave some."
        )
    return whole.split(count, seed)


def _first(pictures: Any, most: int) -> Any:
    import torch

    return torch.stack([pictures[i] for i in range(min(most, len(pictures)))])


def _onto(call: Any, place: Any) -> None:
    """The encoder alone, in fp32: half precision would swallow gradients, and a language model need not come along."""
    import torch

    for module in (call.module, getattr(call.embed, "linear", None)):
        if module is not None:
            module.to(place, torch.float32)


def _command(crew: Any) -> str:
    given = shlex.join(["train", *sys.argv[sys.argv.index("train") + 1 :]] if "train" in sys.argv else ["train"])
    if crew.num_processes == 1:
        return f"fs-plugins {given}"
    return f"accelerate launch --num_processes {crew.num_processes} -m fs_plugins.cli {given}"


def _show_scores(scores: Any) -> None:
    kinds = list(next(iter(scores.robustness.values())))
    table = plain_table("robustness score", *kinds)
    for sigma, row in scores.robustness.items():
        table.add_row(f"sigma {sigma:g}", *(f"{row[kind]:.4f}" for kind in kinds))
    console.print(table)
    console.print(
        f"Mean cosine between single noisy draws and the clean picture, {scores.images} held-out pictures.", style="dim"
    )
    for name, radius in scores.radii.items():
        console.print(
            f"average certified radius, {name}: {radius:.4f} ({scores.certified} pictures, {scores.n} draws, alpha {scores.alpha:g})",
            highlight=False,
        )


def _show_trials(trials: list[Any], plain: float) -> None:
    for stage in dict.fromkeys(trial.stage for trial in trials):
        some = [trial for trial in trials if trial.stage == stage]
        terms = list(some[0].terms)
        table = plain_table(stage, "score", *terms)
        for trial in some:
            label = f"without {trial.without}" if trial.without else "all terms"
            table.add_row(label, f"{trial.score:.4f}", *(f"{trial.terms[term]:.4g}" for term in terms))
        console.print(table)
    for trial in trials:
        if trial.idle:
            console.print(f"{trial.without} does nothing: the {trial.stage} is the same without it.", highlight=False)
    console.print(
        f"score: mean cosine between single noisy draws and the clean picture, held-out pictures; plain noise has {plain:.4f}. "
        "The terms are measured on the same pictures, unweighted.",
        style="dim",
        highlight=False,
    )


def _peak(place: Any) -> str:
    import torch

    if place.type == "cuda":
        return _bytes(torch.cuda.max_memory_allocated(place))
    try:
        import resource
    except ImportError:  # Windows
        return "an unknown amount"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _bytes(peak * (1 if sys.platform == "darwin" else 1024))


def _bytes(count: float) -> str:
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.0f} MB"
