"""The page's state as a program and as command lines that give the same numbers."""

from __future__ import annotations

import shlex

from fs_plugins.demo.world import CAPTION_PROMPT, CLASSES
from fs_plugins.playground.models import Facts
from fs_plugins.playground.state import AWAY, State

SAVED, SAVED_ATTACKED = "picture.png", "attacked.png"
"""What the page calls its downloads, which command lines read."""


def python(state: State, facts: Facts, sigma: float, psm: str, steps: int) -> str:
    """A program that attacks, asks and certifies as the page does.

    Args:
        sigma: the noise level.
        psm: as the page was started with.
        steps: that the attack makes, or made before it was stopped; 0 for none.
    """
    smoothing = f"psm=psm, sigma={sigma!r}, seed={state.seed}"
    told = [*_loading(facts), f"psm = fs_plugins.smoothers(model, psm={psm!r}, sigma={sigma!r})[0].psm", ""]
    told += [*_clean(state, facts), ""]
    if steps:
        told += [*_attacked(state, facts, sigma, steps), ""]
    told += [*_answers(state, facts, smoothing, "clean, attacked" if steps else "clean,"), ""]
    told += _proofs(state, facts, smoothing)
    return "\n".join([*_imports(state, facts, bool(steps)), "", *told, ""])


def shell(state: State, facts: Facts, sigma: float, psm: str, steps: int) -> str:
    """The same on the command line, of the pictures that the page lets one save; attacks are Python's."""
    model = shlex.quote(facts.name)
    how = ["--psm", psm, "--sigma", repr(sigma), "--seed", str(state.seed)]
    draws = [*how, "--n", str(state.draws)]
    lines = []
    if facts.talks:
        for file in (SAVED, *([SAVED_ATTACKED] if steps else [])):
            lines.append(_line("ask", model, file, state.question, *how, "--n0", str(state.n0)))
    lines.append(_line("certify", SAVED, "--model", facts.name, *draws, "--out", "runs/feature"))
    if len(state.classes) > 1:
        kind = ["--ask", state.question, "--choices", state.choices, *how, "--n", str(state.servings)]
        if not facts.talks:
            kind = ["--classes", state.choices, "--prompt", state.question, *draws]
        lines.append(_line("certify", SAVED, "--model", facts.name, *kind, "--out", "runs/answer"))
    return "\n".join([*lines, ""])


def _line(*words: str) -> str:
    return shlex.join(["fs-plugins", *words])


def _imports(state: State, facts: Facts, attacks: bool) -> list[str]:
    aimed = attacks and state.target in CLASSES
    lines = ["from dataclasses import replace"] if aimed else []
    lines += ["from pathlib import Path"] if state.source == "upload" else []
    lines += [*([""] if lines else []), "import fs_plugins", "from fs_plugins import pictures"]
    if state.source == "scene" or aimed:
        lines += ["from fs_plugins.demo import world"]
    lines += [f"from fs_plugins.hf import {'compare, load_chat' if facts.talks else 'directions_of, load_model'}"]
    if not facts.talks:
        lines += ["from fs_plugins.hf.load import source"]
    if state.source == "photo" or (attacks and state.target not in (*CLASSES, AWAY)):
        lines += ["from fs_plugins.photos.photographs import held_out"]
    return lines


def _loading(facts: Facts) -> list[str]:
    if facts.talks:
        return [f"model, processor = load_chat({facts.name!r})"]
    return [f"model = load_model({facts.name!r})"]


def _clean(state: State, facts: Facts) -> list[str]:
    if state.source == "upload":
        return [f"clean = pictures.read(Path({SAVED!r}), {facts.size})[None]"]
    if state.source == "photo":
        return [f"clean = {_photograph(state.photo, facts)}"]
    attributes = ", ".join(repr(value) for value in (state.shape, state.colour, state.size, state.side))
    return [f"clean = pictures.fitted(world.drawn({attributes}, {state.background}).draw(), {facts.size})[None]"]


def _photograph(name: str, facts: Facts) -> str:
    return f"pictures.read(next(one.path for one in held_out() if one.name == {name!r}), {facts.size})[None]"


def _attacked(state: State, facts: Facts, sigma: float, steps: int) -> list[str]:
    lines, victim = [], "fs_plugins.vision_call(model)"
    if state.adaptive:
        victim = f"fs_plugins.smoothers(model, psm=psm, sigma={sigma!r}, n0={state.n0})[0]"
    if state.target == AWAY:
        lines += ["target = None"]
    elif state.target in CLASSES:
        scene = f"replace(world.scene('target', {state.background}), shape={state.target!r})"
        lines += [f"target = pictures.fitted({scene}.draw(), {facts.size})[None]"]
    else:
        lines += [f"target = {_photograph(state.target, facts)}"]
    return [
        *lines,
        "attacked = fs_plugins.attacks.attack(",
        f"    {victim},",
        "    clean,",
        "    target,",
        f"    method={state.attack!r},",
        f"    eps={state.eps} / 255,",
        f"    step_size={state.step_size!r} / 255,",
        f"    steps={steps},",
        f"    seed={state.seed},",
        ")",
        "attacked = pictures.to_unit(pictures.to_pil(attacked[0]))[None]  # in 8 bits",
    ]


def _answers(state: State, facts: Facts, smoothing: str, shown: str) -> list[str]:
    if facts.talks:
        questions = f"({state.question!r}, {CAPTION_PROMPT!r})"
        asked = f"pictures.to_pil(shown[0]), question, {smoothing}, n0={state.n0}"
        return [
            f"for shown in ({shown}):",
            f"    for question in {questions}:",
            f"        print(compare(model, processor, {asked}))",
        ]
    words = f"classes, prompt={state.question!r}, tokenizer=source({facts.name!r})"
    return [
        f"classes = {list(state.classes)!r}",
        f"classifier = fs_plugins.zero_shot(model, {words})",
        f"for shown in ({shown}):",
        "    print(classes[classifier(shown).argmax()])",
        f"    with fs_plugins.enable(model, {smoothing}, n0={state.n0}):",
        "        print(classes[classifier(shown).argmax()])",
    ]


def _proofs(state: State, facts: Facts, smoothing: str) -> list[str]:
    lines = [f"print(fs_plugins.certify(model, clean, n={state.draws}, {smoothing})[0])"]
    if len(state.classes) < 2:
        return lines
    if facts.talks:
        asked = f"model, processor, clean, {state.question!r}, classes={list(state.classes)!r}, n={state.servings}"
        return [*lines, f"print(fs_plugins.certify_answers({asked}, {smoothing})[0])"]
    return [
        *lines,
        f"directions = directions_of(model, source({facts.name!r}), classes, {state.question!r})",
        f"print(fs_plugins.certify_predictions(model, clean, directions, n={state.draws}, {smoothing})[0])",
    ]
