"""The page, made with gradio: three steps, a proof, and a link to each state. What it does is the engine's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from threading import Event, Lock
from typing import Any

import gradio as gr
from markupsafe import Markup
from PIL import Image

from fs_plugins.demo import world
from fs_plugins.errors import FSPluginsError
from fs_plugins.pictures import png, to_pil
from fs_plugins.playground import html, proving, reproduce, shown
from fs_plugins.playground.attacking import Attacked, Frame
from fs_plugins.playground.engine import Heard, Playground, Visitor, Waiting
from fs_plugins.playground.live import Stopped
from fs_plugins.playground.pictures import Picture, digest, named, photographs, uploaded
from fs_plugins.playground.proving import Progress, Proven, SoFar
from fs_plugins.playground.state import AWAY, MOST, State, read
from fs_plugins.settings import build

KEPT = 3600
"""Seconds after which what somebody has uploaded is forgotten, once they have left."""
SWEPT = 600
"""Seconds between looks for files that nobody has read."""
FOLLOW = """(made) => {
    const found = /href="([^"]*)"/.exec(made);
    if (found) history.replaceState(null, "", found[1].replaceAll("&amp;", "&"));
}"""
"""What a browser does with a new link: its address bar has it too, so that a reload comes back to the same state."""
_ATTACKED_BY = ("model", "source", "shape", "colour", "size", "side", "background", "photo", "upload", "attack",
                "adaptive", "eps", "steps", "target", "sigma", "n0", "seed")  # fmt: skip
"""What an attacked picture depends on."""

OF_ANY_PICTURE = ("What is in this image?", "")
"""Question and choices, where the picture is none of the drawn ones."""

News = Mapping[Any, Any]
"""Components of the page and what they are to show."""


@dataclass(frozen=True, eq=False)
class Visit:
    """What a visitor has, beside what the page is set to.

    Args:
        sent: the uploaded picture.
        attacked: the attacked one, and what it was made of.
    """

    sent: Image.Image | None = None
    attacked: tuple[State, Attacked] | None = None

    def moved(self, state: State) -> Attacked | None:
        """The attacked picture, if it is the state's and any step was made."""
        if self.attacked is None or any(getattr(self.attacked[0], one) != getattr(state, one) for one in _ATTACKED_BY):
            return None
        return self.attacked[1] if self.attacked[1].steps else None


class Runs:
    """Who has runs under way, so that they can be stopped: a tab's are known by its session."""

    def __init__(self) -> None:
        self._stops: dict[str, set[Event]] = {}
        self._lock = Lock()

    @contextmanager
    def begun(self, request: gr.Request) -> Iterator[Visitor]:
        """A run of whoever asked."""
        session, stop = str(request.session_hash), Event()
        with self._lock:
            self._stops.setdefault(session, set()).add(stop)
        try:
            yield Visitor(str(request.client.host if request.client else session), stop)
        finally:
            with self._lock:
                self._stops[session].discard(stop)
                if not self._stops[session]:
                    del self._stops[session]

    def stop(self, request: gr.Request) -> None:
        """End the runs of a tab."""
        with self._lock:
            for stop in self._stops.get(str(request.session_hash), ()):
                stop.set()


class Page:
    """The components, and what happens to them.

    Args:
        playground: what does it.
    """

    def __init__(self, playground: Playground) -> None:
        self.playground, self.runs = playground, Runs()
        self.models = playground.models
        with gr.Blocks(
            title="fs-plugins playground", analytics_enabled=False, delete_cache=(SWEPT, KEPT)
        ) as self.blocks:
            self._lay_out()
            self._connect()
        # Runs wait in a line of their own, which knows people; gradio's only carries them.
        self.blocks.queue(default_concurrency_limit=32, max_size=64)

    def _lay_out(self) -> None:
        first = self.models.about("")
        self.visit = gr.State(Visit(), time_to_live=KEPT)
        gr.HTML(html.heading())
        self.status = gr.HTML(html.status("The page is coming."), elem_id="status")
        self.controls: dict[str, Any] = {}
        self._model()
        with gr.Row(equal_height=False):
            with gr.Column(min_width=300):
                self._picture_step()
            with gr.Column(min_width=300):
                self._attack_step()
            with gr.Column(min_width=300):
                self._answer_step(first.sigmas, first.sigma)
        self._proof_panel()
        self._share_panel()

    def _model(self) -> None:
        self.controls["model"] = gr.Dropdown(
            list(self.models.names),
            value=self.models.names[0],
            label="Model",
            visible=len(self.models.names) > 1,
            elem_id="model",
        )
        self.notes = gr.HTML(self._notes(State()))

    def _picture_step(self) -> None:
        gr.Markdown("## 1. Picture")
        known = photographs()
        sources = [("Draw", "scene"), *([("Photograph", "photo")] if known else []), ("Upload", "upload")]
        add, default = self.controls, State()
        add["source"] = gr.Radio(sources, value=default.source, label="From", elem_id="source")
        with gr.Group(visible=True) as self.drawing:
            for name, choices in (
                ("shape", world.CLASSES),
                ("colour", tuple(world.COLOURS)),
                ("size", tuple(world.SIZES)),
                ("side", tuple(world.PLACES)),
            ):
                value = getattr(default, name)
                add[name] = gr.Dropdown(list(choices), value=value, label=name.capitalize(), elem_id=name)
            add["background"] = gr.Number(
                0, label="Background number", minimum=0, maximum=MOST["background"], precision=0, elem_id="background"
            )
        listed = [(named(one), name) for name, one in known.items()]
        add["photo"] = gr.Dropdown(
            [("Choose one", ""), *listed], value="", label="Photograph", visible=False, elem_id="photo"
        )
        self.upload = gr.UploadButton(
            "Choose a PNG or JPEG, at most 10 MB",
            file_types=[".png", ".jpg", ".jpeg"],
            visible=False,
            elem_id="upload",
        )
        self.picture = gr.HTML(elem_id="picture")

    def _attack_step(self) -> None:
        gr.Markdown("## 2. Attack")
        add, default = self.controls, State()
        names = [("None", "none"), ("AttackVLM", "attackvlm"), ("M-Attack", "m-attack"), ("FOA-Attack", "foa")]
        add["attack"] = gr.Radio(names, value=default.attack, label="Method", elem_id="attack")
        add["adaptive"] = gr.Checkbox(
            default.adaptive, label="The attacker knows of the smoothing (adaptive)", elem_id="adaptive"
        )
        add["eps"] = gr.Slider(
            1,
            MOST["eps"],
            value=default.eps,
            step=1,
            label="Each pixel value moves by at most, in 255ths",
            elem_id="eps",
        )
        add["steps"] = gr.Slider(1, MOST["steps"], value=default.steps, step=1, label="Steps", elem_id="steps")
        targets = [("away from itself", AWAY), *((name, name) for name in world.CLASSES)]
        targets += [(named(one), name) for name, one in photographs().items()]
        add["target"] = gr.Dropdown(targets, value=default.target, label="To be taken for", elem_id="target")
        with gr.Row():
            self.attack = gr.Button("Attack", variant="primary", elem_id="run-attack")
            self.stop_attack = gr.Button("Stop the attack", variant="stop", elem_id="stop-attack")
        self.attacked = gr.HTML(elem_id="attacked")

    def _answer_step(self, sigmas: tuple[float, float], sigma: float) -> None:
        gr.Markdown("## 3. Answers")
        add, default = self.controls, State()
        add["question"] = gr.Textbox(default.question, label="Question", max_length=500, elem_id="question")
        add["choices"] = gr.Textbox(
            default.choices, label="Choices for the proof of the answer", max_length=500, elem_id="choices"
        )
        low, high = sigmas
        add["sigma"] = gr.Slider(
            low,
            high,
            value=sigma,
            step=0.01,
            label="Noise sigma, in [0, 1] pixels",
            interactive=low < high,
            elem_id="sigma",
        )
        add["n0"] = gr.Slider(1, MOST["n0"], value=default.n0, step=1, label="Noisy draws n0", elem_id="n0")
        add["seed"] = gr.Number(
            default.seed, label="Seed", minimum=0, maximum=MOST["seed"], precision=0, elem_id="seed"
        )
        with gr.Row():
            self.ask = gr.Button("Ask", variant="primary", elem_id="run-ask")
            self.stop_ask = gr.Button("Stop asking", variant="stop", elem_id="stop-ask")
        self.answers = gr.HTML(elem_id="answers")

    def _proof_panel(self) -> None:
        gr.Markdown("## Proof")
        add, default = self.controls, State()
        with gr.Row():
            add["draws"] = gr.Slider(
                20, MOST["draws"], value=default.draws, step=10, label="Draws for the feature", elem_id="draws"
            )
            add["servings"] = gr.Slider(
                20,
                MOST["servings"],
                value=default.servings,
                step=10,
                label="Servings for the answer",
                elem_id="servings",
            )
        with gr.Row():
            self.certify = gr.Button("Certify the picture", variant="primary", elem_id="run-certify")
            self.stop_certify = gr.Button("Stop certifying", variant="stop", elem_id="stop-certify")
        self.proof = gr.HTML(elem_id="proof")

    def _share_panel(self) -> None:
        gr.Markdown("## Share and reproduce")
        self.link = gr.HTML(elem_id="link")
        self.saves = gr.HTML(elem_id="saves")
        with gr.Accordion("The same in Python and on the command line", open=False):
            self.python = gr.Code(language="python", label="Python", interactive=False, elem_id="python")
            self.shell = gr.Code(language="shell", label="Command line", interactive=False, elem_id="shell")

    @property
    def _set(self) -> list[Any]:
        return [self.visit, *self.controls.values()]

    @property
    def _shown(self) -> list[Any]:
        """What changes with what the page is set to."""
        return [
            self.visit, self.status, self.notes, self.drawing, self.upload, self.picture, self.attacked, self.answers,
            self.proof, self.link, self.saves, self.python, self.shell, *self.controls.values(),
        ]  # fmt: skip

    def _connect(self) -> None:
        private: dict[str, Any] = {"api_visibility": "private"}
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", **private}
        self.blocks.load(self._arrive, None, self._shown, **quick)
        for name, control in self.controls.items():
            if name != "upload":
                change = {"model": self._switch, "source": self._turn}.get(name, self._change)
                control.input(change, self._set, self._shown, trigger_mode="always_last", **quick)
        self.upload.upload(self._receive, [self.upload, *self._set], self._shown, **quick)
        kept = [self.visit, self.status, self.saves, self.python, self.shell]
        for button, stop, run, place in (
            (self.attack, self.stop_attack, self._attack, self.attacked),
            (self.ask, self.stop_ask, self._ask, self.answers),
            (self.certify, self.stop_certify, self._certify, self.proof),
        ):
            button.click(run, self._set, [*kept, place], show_progress="hidden", **private)
            stop.click(self._stop, None, None, **quick)
        self.link.change(None, self.link, None, js=FOLLOW, **quick)
        self.blocks.unload(self.runs.stop)

    # What happens.

    def _arrive(self, request: gr.Request) -> News:
        """Somebody opens the page, by a link or not."""
        try:
            state = read(dict(request.query_params))
            self.models.sigma(state)
            return self._settled(Visit(), state, request)
        except FSPluginsError as error:
            return {**self._settled(Visit(), State(), request), self.status: html.status(str(error), "wrong")}

    def _change(self, request: gr.Request, visit: Visit, *values: Any) -> News:
        """A control was moved."""
        try:
            state = self._state(visit, values)
            return {**self._view(visit, state, request), self.status: html.status("Ready.")}
        except FSPluginsError as error:
            return {self.status: html.status(str(error), "wrong")}

    def _turn(self, request: gr.Request, visit: Visit, *values: Any) -> News:
        """Pictures of another kind: unless somebody has asked something else, another question fits them."""
        given = dict(zip(self.controls, values, strict=True))
        drawn = (State().question, State().choices)
        old, new = (drawn, OF_ANY_PICTURE) if given["source"] != "scene" else (OF_ANY_PICTURE, drawn)
        if (given["question"], given["choices"]) != old:
            return self._change(request, visit, *values)
        given["question"], given["choices"] = new
        changed = {self.controls[name]: given[name] for name in ("question", "choices")}
        return {**self._change(request, visit, *given.values()), **changed}

    def _switch(self, request: gr.Request, visit: Visit, *values: Any) -> News:
        """Another model: other noise levels, and another way to be asked."""
        try:
            given = dict(zip(self.controls, values, strict=True))
            facts = self.models.about(given["model"])
            state = self._state(visit, list({**given, "sigma": None}.values()))
            return self._settled(visit, replace(state, question=_usual_question(state, facts.talks)), request)
        except FSPluginsError as error:
            return {self.status: html.status(str(error), "wrong")}

    def _receive(self, request: gr.Request, path: str | None, visit: Visit, *values: Any) -> News:
        """A file has come. It is read, and is gone."""
        try:
            if path is None:
                return {self.status: html.status("No file came.", "wrong")}
            visit = Visit(uploaded(Path(path)))
            state = self._state(visit, values)
            return {**self._view(visit, state, request), self.status: html.status("Uploaded.")}
        except FSPluginsError as error:
            return {self.status: html.status(str(error), "wrong")}
        finally:
            if path is not None:
                Path(path).unlink(missing_ok=True)

    def _stop(self, request: gr.Request) -> None:
        self.runs.stop(request)

    def _attack(self, request: gr.Request, visit: Visit, *values: Any) -> Iterator[News]:
        def run(state: State, clean: Picture, visitor: Visitor) -> Iterator[News]:
            if state.attack == "none":
                yield {self.status: html.status("Choose a method, then attack.", "wrong"), self.attacked: ""}
                return
            for news in self.playground.attack(state, clean, visitor):
                if isinstance(news, Waiting):
                    yield self._queued(news)
                elif isinstance(news, Frame):
                    told = f"Step {news.step} of {news.steps}"
                    yield {
                        self.status: html.status("Attacking."),
                        self.attacked: shown.moved(clean, news.image) + html.progress(told, news.step, news.steps),
                    }
                else:
                    yield self._fooled(replace(visit, attacked=(state, news)), state, clean, news)

        yield from self._told(visit, values, request, run)

    def _fooled(self, visit: Visit, state: State, clean: Picture, found: Attacked) -> News:
        told = (
            f"Attacked, {found.steps} steps." if found.steps == state.steps else f"Stopped after {found.steps} steps."
        )
        return {
            self.visit: visit,
            self.status: html.status(told),
            self.attacked: shown.moved(clean, found.image) if found.steps else "",
            **self._programs(visit, state, clean),
        }

    def _ask(self, request: gr.Request, visit: Visit, *values: Any) -> Iterator[News]:
        def run(state: State, clean: Picture, visitor: Visitor) -> Iterator[News]:
            moved = visit.moved(state)
            heard: Heard | None = None
            for news in self.playground.answers(state, clean, None if moved is None else moved.image, visitor):
                if isinstance(news, Waiting):
                    yield self._queued(news)
                else:
                    heard = news
                    yield {self.status: html.status("Asking."), self.answers: shown.said(heard)}
            if heard is not None:
                yield {self.status: html.status("Answered."), self.answers: shown.said(heard)}

        yield from self._told(visit, values, request, run)

    def _certify(self, request: gr.Request, visit: Visit, *values: Any) -> Iterator[News]:
        def run(state: State, clean: Picture, visitor: Visitor) -> Iterator[News]:
            limit, drawn = 0.0, Markup()
            for news in self.playground.proof(state, clean, visitor):
                if isinstance(news, Waiting):
                    yield self._queued(news)
                elif isinstance(news, SoFar):
                    limit = max(limit, shown.reach(news.certificate))
                    drawn = shown.curve(news.certificate, limit)
                    told = f"{news.draws} of {state.draws} draws; nothing is promised before the last"
                    yield {
                        self.status: html.status("Certifying the feature."),
                        self.proof: drawn + html.progress(told, news.draws, state.draws),
                    }
                elif isinstance(news, Progress):
                    told = f"{news.draws} draws for the answer"
                    yield {
                        self.status: html.status("Certifying the answer."),
                        self.proof: drawn + html.progress(told, 0, 0),
                    }
                else:
                    yield self._proven(visit, state, clean, news, max(limit, shown.reach(news.features)))

        yield from self._told(visit, values, request, run)

    def _proven(self, visit: Visit, state: State, clean: Picture, found: Proven, limit: float) -> News:
        moved = visit.moved(state)
        far = None if moved is None else proving.distance(moved.image, clean.image)
        saved = html.download(
            "certificate.jsonl", found.to_json().encode(), "application/jsonl", "Save the certificates"
        )
        return {
            self.status: html.status("Certified."),
            self.proof: shown.curve(found.features, limit)
            + html.sentences(proving.sentences(found, far))
            + html.links([saved]),
        }

    def _told(
        self,
        visit: Visit,
        values: tuple[Any, ...],
        request: gr.Request,
        run: Callable[[State, Picture, Visitor], Iterator[News]],
    ) -> Iterator[News]:
        """A run whose faults are messages, never a dead page."""
        try:
            with self.runs.begun(request) as visitor:
                state = self._state(visit, values)
                yield {self.status: html.status("Beginning.")}
                yield from run(state, self.playground.picture(state, visit.sent), visitor)
        except Stopped:
            yield {self.status: html.status("Stopped.")}
        except FSPluginsError as error:
            yield {self.status: html.status(str(error), "wrong")}
        except Exception:
            logging.getLogger(__name__).exception("A run of the page failed.")
            yield {self.status: html.status("This run failed on the server; the page goes on. Try again.", "wrong")}

    # What is shown.

    def _state(self, visit: Visit, values: Any) -> State:
        """What the controls say.

        Raises:
            SettingError: values that no state has.
        """
        given = {name: value for name, value in zip(self.controls, values, strict=True) if value is not None}
        given["model"] = "" if given.get("model") == self.models.names[0] else given.get("model", "")
        if given.get("sigma") == self.models.about(given["model"]).sigma:
            del given["sigma"]
        if given.get("source") == "upload" and visit.sent is not None:
            given["upload"] = digest(visit.sent)
        known = {one.name for one in fields(State)}
        return build(State, {name: value for name, value in given.items() if name in known}, "This page's settings")

    def _settled(self, visit: Visit, state: State, request: gr.Request) -> News:
        """Everything as a state has it."""
        facts = self.models.about(state.model)
        low, high = facts.sigmas
        news: dict[Any, Any] = {
            control: gr.update(value=getattr(state, name)) for name, control in self.controls.items()
        }
        sigma = facts.sigma if state.sigma is None else state.sigma
        news[self.controls["model"]] = gr.update(value=facts.name)
        news[self.controls["sigma"]] = gr.update(minimum=low, maximum=high, value=sigma, interactive=low < high)
        label = "Question" if facts.talks else "A sentence, with {} where the choices go"
        news[self.controls["question"]] = gr.update(value=state.question, label=label)
        try:
            view = self._view(visit, state, request)
        except FSPluginsError as error:
            view = {**self._visible(state), self.status: html.status(str(error), "wrong")}
        return {**news, self.status: html.status("Ready."), self.notes: self._notes(state), **view}

    def _visible(self, state: State) -> dict[Any, Any]:
        return {
            self.drawing: gr.update(visible=state.source == "scene"),
            self.controls["photo"]: gr.update(visible=state.source == "photo"),
            self.upload: gr.update(visible=state.source == "upload"),
        }

    def _view(self, visit: Visit, state: State, request: gr.Request) -> dict[Any, Any]:
        """The picture of a state, its link and its programs; what is of another picture goes.

        Raises:
            SettingError: there is no such picture.
        """
        news = self._visible(state)
        if (state.source == "upload" and visit.sent is None) or (state.source == "photo" and not state.photo):
            return {**news, self.visit: visit, self.picture: "", self.attacked: "", self.answers: "", self.proof: ""}
        clean = self.playground.picture(state, visit.sent)
        news |= {
            self.visit: visit,
            self.picture: html.image(clean.shown, clean.about, clean.about),
            self.link: html.link(str(request.request.base_url), state.query()),
            **self._programs(visit, state, clean),
        }
        if visit.moved(state) is None:
            news |= {self.attacked: "", self.answers: "", self.proof: ""}
        return news

    def _programs(self, visit: Visit, state: State, clean: Picture) -> dict[Any, Any]:
        facts, sigma, moved = self.models.about(state.model), self.models.sigma(state), visit.moved(state)
        steps = 0 if state.attack == "none" else state.steps if moved is None else moved.steps
        saves = [html.download(reproduce.SAVED, png(clean.shown), "image/png", "Save the picture")]
        if moved is not None:
            data = png(to_pil(moved.image))
            saves.append(html.download(reproduce.SAVED_ATTACKED, data, "image/png", "Save the attacked picture"))
        return {
            self.saves: html.links(saves),
            self.python: reproduce.python(state, facts, sigma, self.models.psm, steps),
            self.shell: reproduce.shell(state, facts, sigma, self.models.psm, 0 if moved is None else steps),
        }

    def _notes(self, state: State) -> Markup:
        notes = self.models.about(state.model).notes
        return html.sentences(notes) if notes else Markup()

    def _queued(self, news: Waiting) -> News:
        several = "1 run is" if news.ahead == 1 else f"{news.ahead} runs are"
        return {self.status: html.status(f"In the line: {several} served before yours.", "waiting")}


def _usual_question(state: State, talks: bool) -> str:
    """Of a picture's kind, or the sentence that choices are put into."""
    if state.source != "scene":
        return OF_ANY_PICTURE[0] if talks else "a photo of a {}"
    if talks:
        return State().question
    return world.drawn(state.shape, state.colour, state.size, state.side).caption.replace(state.shape, "{}")
