"""Running suites: attack each encoder once, ask every defence about the same pictures, write all down."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fs_plugins.errors import FSPluginsError
from fs_plugins.evaluation.captions import captions
from fs_plugins.evaluation.judges import Judge
from fs_plugins.evaluation.means import Means, Track
from fs_plugins.evaluation.plan import SHOWN, Plan, attacked_key
from fs_plugins.evaluation.record import Record
from fs_plugins.evaluation.served import ServedModel
from fs_plugins.evaluation.store import SHOWN as PICTURES
from fs_plugins.evaluation.store import Store
from fs_plugins.evaluation.subjects import Subject, size_of
from fs_plugins.evaluation.suites import CLEAN, NONE, TARGET
from fs_plugins.evaluation.tower import Found, Tower
from fs_plugins.noise import keyed, normal
from fs_plugins.smoothing import DEFAULT_CHUNK_SIZE, FeatureSmoother


@dataclass(frozen=True)
class Evaluation:
    """One run of suites on one model and its robust towers. What it finds is in the store's folder; see ``Results``.

    Args:
        load: a tower's name (``"none"`` is the model's own) -> the model with it; called once for each.
        plan: what is asked of which pictures.
        store: where everything is kept, and taken from.
        judge: compares captions.
        track: makes progress bars.
        batch_size, chunk_size, share: see ``Means``.
        wait: until all processes are here.
        served: who answers for the defence ``SERVED``.
    """

    load: Callable[[str], Subject]
    plan: Plan
    store: Store
    judge: Judge
    track: Track = field(default=lambda what, count: lambda done: None)
    batch_size: int = 32
    chunk_size: int = DEFAULT_CHUNK_SIZE
    share: tuple[int, int] = (0, 1)
    wait: Callable[[], None] = lambda: None
    served: ServedModel | None = None

    def run(self) -> None:
        """Do what is still to be done. ``Results`` then has something to show, also where a judge failed."""
        began, found, plan = time.time(), Found(), self.plan
        means = Means(self.store, self.track, self.batch_size, self.chunk_size, self.share)
        for tower in self._towers(found):
            try:
                subject = self.load(tower)
            except FSPluginsError as error:
                if tower == NONE.tower:
                    raise
                found.notes.append(f"The rows of the {tower} tower are left out: {error}")
                continue
            plan = replace(plan, tasks=subject.tasks)
            if tower == NONE.tower:
                self._keep(plan, found)
            Tower(tower, subject, plan, means, found, self.served).run()
            if self.share[0] == 0 and tower == NONE.tower:
                self._show(plan, subject)
            del subject  # before the next one is loaded
        self.wait()
        if self.share[0] == 0:
            self._show_views(plan, found.shown)
            self._keep(plan, found, time.time() - began)
            self._judge(plan)
            self._keep(plan, found, time.time() - began)

    def _towers(self, found: Found) -> list[str]:
        needed = self.plan.needed
        for tower in sorted(needed - set(self.plan.towers)):
            found.notes.append(f"There is no {tower} tower for this model, so its rows are left out.")
        return [tower for tower in self.plan.towers if tower in needed or tower == NONE.tower]

    def _keep(self, plan: Plan, found: Found, seconds: float | None = None) -> None:
        if self.share[0] == 0:
            took = None if seconds is None else round(seconds, 1)
            Record(plan, self.judge.name, tuple(found.notes), found.levels, took).write(self.store.folder)

    def _show(self, plan: Plan, subject: Subject) -> None:
        """The clean pictures, and what attacks aim at, of those that the report shows."""
        data, size = plan.dataset, size_of(subject.call)
        for sample in data.samples[:SHOWN]:
            self.store.keep_picture(f"{PICTURES}/clean", sample.image, data.image(sample, size))
            if sample.target or sample.image in data.aims:
                self.store.keep_picture(f"{PICTURES}/target", sample.image, data.target(sample, size))

    def _show_views(self, plan: Plan, smoother: FeatureSmoother | None) -> None:
        """One noisy, purified view of each attacked picture that the report shows, by the default defence."""
        if smoother is None:
            return
        cells = [cell for cell in plan.cells if cell[0].tower == NONE.tower and cell[1] not in (CLEAN, TARGET)]
        for key in dict.fromkeys(attacked_key(*cell) for cell in cells):
            found = {one.image: self.store.attacked(key, one.image) for one in plan.dataset.samples[:SHOWN]}
            attacked = {name: picture for name, picture in found.items() if picture is not None}
            if attacked:
                views = _views(smoother, torch.stack(list(attacked.values())), plan.setup.seed)
                for name, view in zip(attacked, views, strict=True):
                    self.store.keep_picture(f"{PICTURES}/purified/{key}", name, view)

    def _judge(self, plan: Plan) -> None:
        """Score the captions that have not been, against the clean picture's and the target's."""
        wanted = dict.fromkeys(
            (caption.said, reference)
            for (defence, condition), tasks in plan.cells.items()
            if "captioning" in tasks and condition != TARGET
            for caption in captions(self.store, defence, condition, tasks["captioning"])
            for reference in (caption.own, caption.aim)
        )
        known = self.store.scores(self.judge.name)
        left = [pair for pair in wanted if pair not in known]
        if not left:
            return
        advance = self.track(f"judging captions, {self.judge.name}", len(left))
        for (said, reference), score in zip(left, self.judge.scores(left), strict=True):
            self.store.score(self.judge.name, said, reference, score)
            advance(1)


@torch.no_grad()
def _views(smoother: FeatureSmoother, images: Tensor, seed: int) -> Tensor:
    device = smoother.call.device
    noise = normal(keyed(seed, "shown"), images.shape)
    return smoother.views(images.to(device), noise.to(device)).clamp(0, 1).cpu()
