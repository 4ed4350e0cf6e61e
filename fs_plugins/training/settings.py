"""All that ``fs-plugins train`` can be told, each knob once: for flags, ``--config`` and Python alike."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fs_plugins.files import real, spelled
from fs_plugins.settings import knob

_DATA, _PARTS, _STAGES, _RUN, _REPORT, _HUB = "Data", "Parts", "Stages", "Run", "Report", "Hub"
_ADVERSARIAL = "Adversarial stage"


@dataclass(frozen=True)
class Settings:
    """What is trained, on what, for how long, and what is measured in the end; None means what each knob says."""

    photos: Path | None = knob(None, "A folder of PNG and JPEG files; no labels are needed.")
    model: str = knob(
        "demo",
        "Folder or hub id of a transformers model, or an encoder of the registry; "
        '"demo", "demo-clip" and "photo-vlm" ship.',
    )
    processor: str | None = knob(None, "Folder or hub id of the model's processor, where none is beside the model.")
    out: Path = knob(Path("my-psm"), "Folder for the checkpoint, the log, and the PSM in the end.")
    name: str | None = knob(None, "What the PSM is called; left out, the folder's name.")
    scenes: int = knob(0, "So many scenes of the embedded world in place of PHOTOS.", panel=_DATA, least=0)
    held_out: int | None = knob(None, "Pictures that are never trained on; left out, a tenth, at most 64.", panel=_DATA)
    size: int | None = knob(None, "Side of the images, for encoders that take any.", panel=_DATA, least=1)
    augment: bool = knob(False, "Random crops and mirror images.", panel=_DATA)
    workers: int | None = knob(None, "Threads that load images.", panel=_DATA, least=1)
    sigma: float = knob(0.25, "Noise level to serve at, in [0, 1] pixels.", panel=_PARTS)
    sigma_range: tuple[float, float] | None = knob(
        None, "Lowest and highest level to train for; left out, --sigma alone.", panel=_PARTS
    )
    purifier: str = knob(
        "unet",
        "unet, unet-paper, bottleneck, diffusion, none, or a plugin's kind; several, with commas, are a cascade.",
        panel=_PARTS,
    )
    purifier_args: str = knob(
        "{}", "Its arguments, such as '{\"channels\": [32, 64]}'; of a cascade, a list of them.", panel=_PARTS
    )
    times: int = knob(
        1, "How often the purifier has its turn on what it made before, with the same weights.", panel=_PARTS, least=1
    )
    purifier_weights: Path | None = knob(
        None, "diffusion: the public checkpoint, 256x256_diffusion_uncond.pt.", panel=_PARTS
    )
    lora: int | None = knob(None, "diffusion: train updates of this rank only.", panel=_PARTS, least=1)
    mapper: str = knob("residual", "residual, none, or a plugin's kind.", panel=_PARTS)
    mapper_args: str = knob("{}", "Its arguments.", panel=_PARTS)
    start: str | None = knob(
        None, "What purifier to go on from: its name in the registry, or a PSM's folder or hub id.", panel=_PARTS
    )
    steps: int = knob(12_000, "Of the purifier; 0 with --start takes it as it is.", panel=_STAGES)
    mapper_steps: int = knob(2_500, "Of the mapper.", panel=_STAGES)
    batch_size: int = knob(16, "Images a forward, in every process.", panel=_STAGES)
    accumulate: int = knob(1, "Forwards a step.", panel=_STAGES)
    draws: int = knob(8, "Noisy copies of each image.", panel=_STAGES)
    lr: float | None = knob(None, "Of the purifier; left out, 1e-3 from scratch and 5e-5 to fine-tune.", panel=_STAGES)
    mapper_lr: float = knob(2e-4, "Of the mapper.", panel=_STAGES)
    warmup: int = knob(100, "Steps in which learning rates rise.", panel=_STAGES)
    ema: float = knob(0.99, "Moving average of the purifier; 0 for none.", panel=_STAGES)
    lambda1: float = knob(0.25, "Purifier: weight of l_rb.", panel=_STAGES)
    lambda2: float = knob(0.25, "Purifier: weight of l_mse.", panel=_STAGES)
    lambda3: float = knob(100.0, "Mapper: weight of l_stats.", panel=_STAGES)
    lambda4: float = knob(0.25, "Mapper: weight of l_id.", panel=_STAGES)
    adversarial: bool = knob(
        False, "A last stage: all parts against an attacker who knows of them.", panel=_ADVERSARIAL
    )
    adversarial_steps: int = knob(6_000, "Its steps, a batch each.", panel=_ADVERSARIAL)
    adversarial_lr: float = knob(5e-4, "Its learning rate.", panel=_ADVERSARIAL)
    passes: int = knob(4, "Of the attack, a batch.", panel=_ADVERSARIAL)
    update_every: int = knob(1, "Passes an update of the weights.", panel=_ADVERSARIAL)
    norm: str = knob("linf", "Of the attack: linf or l2.", panel=_ADVERSARIAL)
    eps: str = knob("16/255", "Its largest radius, in [0, 1] pixels.", panel=_ADVERSARIAL)
    ramp: float = knob(0.15, "Share of its steps in which the radius grows.", panel=_ADVERSARIAL)
    targeted: float = knob(0.0, "Share of pictures that are pulled towards others.", panel=_ADVERSARIAL)
    ask: str | None = knob(
        None, "Questions to the model, with | between them, whose answers shall stay.", panel=_ADVERSARIAL
    )
    reader: float = knob(
        0.0, "Share of batches that ask a small net, which learned from the model's answers, in its place.",
        panel=_ADVERSARIAL,
    )  # fmt: skip
    classes: str | None = knob(
        None,
        "Class names, with commas between them, whose zero-shot scores shall stay; a classifier's own need none.",
        panel=_ADVERSARIAL,
    )
    prompt: str = knob("a photo of a {}", "What a class is called in a sentence.", panel=_ADVERSARIAL)
    lambda_adv: float = knob(0.5, "Weight of l_adv, of features.", panel=_ADVERSARIAL)
    lambda_say: float = knob(1.0, "Weight of l_say, of answers.", panel=_ADVERSARIAL)
    lambda_pixels: float = knob(0.02, "Weight of l_mse there.", panel=_ADVERSARIAL)
    precision: str = knob("fp32", "fp32, bf16 or fp16.", panel=_RUN)
    seed: int = knob(0, "Of weights, order, crops and noise.", panel=_RUN)
    save_every: int = knob(500, "Steps between checkpoints.", panel=_RUN)
    log_every: int = knob(50, "Steps between rows of log.csv.", panel=_RUN)
    tensorboard: bool = knob(False, "Log for TensorBoard too.", panel=_RUN)
    dry_run: bool = knob(False, "Try three steps a stage, say what it takes, write nothing.", panel=_RUN)
    ablate: bool = knob(False, "Train without each term of the losses, compare, write nothing.", panel=_RUN)
    certify: int = knob(8, "Held-out pictures to certify in the end.", panel=_REPORT, least=0)
    n: int = knob(1000, "Draws per certificate.", panel=_REPORT, flag="--n", least=1)
    alpha: float = knob(1e-3, "Each certificate may be wrong with this probability.", panel=_REPORT)
    push: str | None = knob(
        None, "Push the finished PSM there, owner/name on the hub; whether that may be is checked first.", panel=_HUB
    )
    private: bool = knob(False, "If that repository has to be made, make it private.", panel=_HUB)
    license: str | None = knob(None, "Of the PSM, for its card, by the hub's name: apache-2.0, mit ...", panel=_HUB)

    @property
    def title(self) -> str:
        """What the PSM is called."""
        return spelled(self.name or real(self.out).name)

    @property
    def encoder(self) -> str:
        """What its configuration says it was trained for."""
        return spelled(Path(self.model).name if os.path.exists(self.model) else self.model)
