"""What the page shows is what the library gives, and the programs and command lines beside it give the same."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
from dataclasses import dataclass, replace
from threading import Event

import pytest
import torch
from typer.testing import CliRunner

import fs_plugins
from fs_plugins import AnswerCertificate, Certificate, PredictionCertificate, SettingError, pictures
from fs_plugins.cli import app
from fs_plugins.hf.chat import compare
from fs_plugins.playground import proving, reproduce
from fs_plugins.playground.attacking import Attacked, Frame
from fs_plugins.playground.engine import Heard, Playground, Visitor, Waiting
from fs_plugins.playground.live import Stopped
from fs_plugins.playground.models import Models
from fs_plugins.playground.pictures import aim, rounded
from fs_plugins.playground.proving import Progress, Proven, SoFar
from fs_plugins.playground.state import State

QUICK = State(steps=3, draws=40, servings=20, choices="star, bolt, ring", shape="star", seed=5, n0=2)


def last(run):
    *_, found = run
    return found


def library(playground, state, steps):
    """The attack by the library alone."""
    subject, size = playground.models.get(state.model), playground.models.about(state.model).size
    victim = subject.call
    if state.adaptive:
        victim = fs_plugins.smoothers(subject.call, psm=subject.psm, sigma=0.25, n0=state.n0)[0]
    target = aim(state, size)
    found = fs_plugins.attacks.attack(
        victim,
        playground.picture(state).image[None],
        target and target.image[None],
        method=state.attack,
        eps=state.eps / 255,
        step_size=state.step_size / 255,
        steps=steps,
        seed=state.seed,
    )
    return rounded(found[0])


@dataclass(frozen=True)
class Visit:
    """One walk through the page."""

    state: State
    attacked: Attacked
    heard: Heard
    news: list[object]
    proven: Proven


@pytest.fixture(scope="module")
def visit(models) -> Visit:
    playground, state = Playground(models), replace(QUICK, adaptive=True, choices="")
    clean = playground.picture(state)
    attacked = last(playground.attack(state, clean, Visitor("a", Event())))
    heard = last(playground.answers(state, clean, attacked.image, Visitor("a", Event())))
    *news, proven = playground.proof(state, clean, Visitor("a", Event()))
    return Visit(state, attacked, heard, news, proven)


@pytest.mark.parametrize(
    "state",
    [
        QUICK,
        replace(QUICK, attack="m-attack", adaptive=True),
        replace(QUICK, attack="foa"),
        replace(QUICK, target="none"),
    ],
    ids=["attackvlm", "m-attack", "foa", "away"],
)
def test_an_attack_is_the_librarys_and_its_frames_lead_there(playground, visitor, state):
    clean = playground.picture(state)
    *frames, found = playground.attack(state, clean, visitor)
    assert isinstance(found, Attacked)
    assert all(isinstance(frame, Frame) for frame in frames)
    assert [frame.step for frame in frames] == sorted({frame.step for frame in frames})
    assert torch.equal(found.image, library(playground, state, 3))
    assert 0 < float((found.image - clean.image).abs().max()) <= 16.001 / 255


@pytest.mark.parametrize("method", ["attackvlm", "m-attack"])
def test_a_stopped_attack_is_one_of_fewer_steps(playground, visitor, method):
    state = replace(QUICK, steps=400, attack=method)
    run = playground.attack(state, playground.picture(state), visitor)
    for frame in run:
        if isinstance(frame, Frame) and frame.step >= 2:
            visitor.stop.set()
            break
    found = last(run)
    assert 2 <= found.steps < 400
    assert torch.equal(found.image, library(playground, state, found.steps))
    assert len(playground.line) == 0


def test_a_run_that_is_dropped_frees_its_place(playground, visitor):
    state = replace(QUICK, steps=400)
    run = playground.attack(state, playground.picture(state), visitor)
    next(run)
    run.close()
    assert len(playground.line) == 0


def test_others_wait_and_are_told(playground):
    state = replace(QUICK, steps=400)
    first = playground.attack(state, playground.picture(state), Visitor("a", Event()))
    next(first)
    second = playground.attack(QUICK, playground.picture(QUICK), Visitor("b", Event()))
    assert next(second) == Waiting(1)
    first.close()
    assert last(second).steps == 3


def test_the_draws_shown_are_those_that_were_served(playground, visit):
    subject = playground.models.get("")
    smoother = fs_plugins.smoothers(subject.call, psm=subject.psm, n0=2, seed=5)[0]
    served = smoother.smooth(visit.attacked.image[None])
    call, purified = smoother.call, visit.heard.views.purified
    units = torch.nn.functional.normalize(call.embed(smoother.mapped(call.encode(purified))), dim=-1)
    mean = torch.nn.functional.normalize(units.mean(0), dim=-1)
    assert torch.allclose(mean, torch.nn.functional.normalize(call.embed(served)[0], dim=-1), atol=1e-5)
    assert visit.heard.views.noisy.shape == (2, 3, 64, 64)


def test_what_is_said_is_timed_and_the_cosines_are_between_pictures(visit):
    assert visit.heard.clean.answer.smoothed.seconds > 0
    assert visit.heard.clean.caption.smoothed.text == "a large yellow star in the middle"
    assert 0 < visit.heard.cosines.without < visit.heard.cosines.smoothed <= 1


def test_without_an_attack_one_picture_is_asked_about(playground, visitor):
    found = last(playground.answers(QUICK, playground.picture(QUICK), None, visitor))
    assert found.attacked is None
    assert found.cosines is None
    subject, shown = playground.models.get(""), playground.picture(QUICK).shown
    alone = compare(subject.model, subject.processor, shown, QUICK.question, seed=5, n0=2, psm=subject.psm)
    assert found.clean.answer.without.text == alone.without.text == "star"
    assert found.clean.answer.smoothed.text == alone.smoothed.text


def test_a_proof_tightens_into_the_librarys(playground, visit):
    subject, clean = playground.models.get(""), playground.picture(visit.state)
    certificate = fs_plugins.certify(subject.model, clean.image[None], n=40, seed=5)[0]
    assert visit.proven.features == certificate
    seen = [one for one in visit.news if isinstance(one, SoFar)]
    assert [one.draws for one in seen] == sorted(one.draws for one in seen)
    assert seen[-1] == SoFar(certificate, 40)
    assert Certificate.from_json(visit.proven.to_json()) == certificate
    assert proving.curve(certificate, 0.5).startswith(b"\x89PNG")


def test_what_is_promised_is_said_with_its_numbers(visit):
    assert visit.proven.answer is None
    told = " ".join(proving.sentences(visit.proven, moved=9.0))
    radius = visit.proven.features.radius()
    assert (f"{radius:.3f}" if radius else "nothing is promised") in told
    assert "9.00, outside" in told


def test_a_stopped_proof_proves_nothing(playground, visitor):
    run = playground.proof(replace(QUICK, draws=2000), playground.picture(QUICK), visitor)
    next(run)
    visitor.stop.set()
    with pytest.raises(Stopped):
        list(run)


def numbers(state, playground, steps):
    """What the program beside the page prints."""
    facts = playground.models.about(state.model)
    code = reproduce.python(state, facts, playground.models.sigma(state), "auto", steps)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "reproduce", "exec"), {})
    return printed.getvalue()


def test_the_program_beside_the_page_gives_the_same(playground, visit):
    printed = numbers(visit.state, playground, visit.attacked.steps)
    said = re.findall(r"Answer\(text='([^']*)'", printed)
    heard = visit.heard
    expected = [heard.clean.answer, heard.clean.caption, heard.attacked.answer, heard.attacked.caption]
    assert said == [text for one in expected for text in (one.without.text, one.smoothed.text)]
    assert str(visit.proven.features) in printed


def test_a_question_is_never_code(playground):
    state = replace(
        QUICK,
        source="upload",
        question="\"; import os; os._exit(1) #'$(reboot)`",
        choices="it's, a \\ b",
        attack="none",
    )
    facts = playground.models.about("")
    parsed = ast.parse(reproduce.python(state, facts, 0.25, "auto", 0))
    assert "pathlib" in [node.module for node in ast.walk(parsed) if isinstance(node, ast.ImportFrom)]
    assert state.question in [node.value for node in ast.walk(parsed) if isinstance(node, ast.Constant)]
    assert state.question in shlex.split(reproduce.shell(state, facts, 0.25, "auto", 0))


def test_a_zero_shot_model_takes_the_nearest_choice_as_does_its_program(playground, visitor):
    state = replace(QUICK, model="demo-clip", question="a large yellow {} in the middle")
    clean = playground.picture(state)
    attacked = last(playground.attack(state, clean, visitor))
    heard = last(playground.answers(state, clean, attacked.image, Visitor("a", Event())))
    *news, proven = playground.proof(state, clean, Visitor("a", Event()))
    assert any(isinstance(one, Progress) for one in news)
    assert PredictionCertificate.from_json(proven.to_json().splitlines()[1]) == proven.answer
    assert heard.clean.caption is None
    printed = numbers(state, playground, attacked.steps).splitlines()
    expected = [one for said in (heard.clean, heard.attacked) for one in (said.answer.without, said.answer.smoothed)]
    assert [one.text.partition(" (")[0] for one in expected] == printed[:4]
    assert printed[4:] == [str(proven.features), str(proven.answer)]


@pytest.fixture
def saved(playground, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / reproduce.SAVED).write_bytes(pictures.png(playground.picture(QUICK).shown))
    return tmp_path


def told(line):
    return CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False).stdout


def test_the_command_lines_give_the_same(playground, visit, saved):
    lines = reproduce.shell(visit.state, playground.models.about(""), 0.25, "auto", 0).splitlines()
    assert [shlex.split(line)[:2] for line in lines] == [["fs-plugins", "ask"], ["fs-plugins", "certify"]]
    assert visit.heard.clean.answer.smoothed.text in told(lines[0])
    told(lines[1])
    rows = (saved / "runs/feature/certificates.jsonl").read_text("utf-8").splitlines()
    assert f'"mean": {visit.proven.features.mean}' in rows[-1]


@pytest.mark.slow
def test_an_answers_proof_is_that_of_program_and_command_line(playground, visitor, saved):
    *news, proven = playground.proof(QUICK, playground.picture(QUICK), visitor)
    assert any(isinstance(one, Progress) for one in news)
    assert AnswerCertificate.from_json(proven.to_json().splitlines()[1]) == proven.answer
    assert str(proven.answer) in numbers(replace(QUICK, attack="none"), playground, 0)
    told(reproduce.shell(QUICK, playground.models.about(""), 0.25, "auto", 0).splitlines()[2])
    rows = (saved / "runs/answer/answers.jsonl").read_text("utf-8").splitlines()
    assert f'"probability": {proven.answer.probability}' in rows[-1]


def test_a_picture_can_be_attacked_where_the_command_line_has_it(playground):
    told = reproduce.shell(QUICK, playground.models.about(""), 0.25, "auto", 3)
    assert told.count("attacked.png") == 1
    assert "--question" not in reproduce.shell(replace(QUICK, choices=""), playground.models.about(""), 0.25, "auto", 0)


def test_models_that_the_page_was_not_started_with_are_not_loaded(playground):
    with pytest.raises(SettingError, match="This page has no model"):
        playground.picture(State(model="/etc"))
    with pytest.raises(SettingError, match="name one"):
        Models([])


def test_noise_that_the_psm_does_not_allow_is_refused(playground, visitor):
    assert playground.models.sigma(State(sigma=0.5)) == 0.5
    with pytest.raises(SettingError, match="sigma"):
        next(playground.attack(replace(QUICK, sigma=0.9), playground.picture(QUICK), visitor))


def test_one_model_is_in_memory(models):
    first = models.get("demo")
    assert models.get("") is first
    models.get("demo-clip")
    assert models.get("demo") is not first
