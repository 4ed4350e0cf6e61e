"""Every state is a link, and every link a state or a sentence."""

from __future__ import annotations

from urllib.parse import parse_qsl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fs_plugins import SettingError
from fs_plugins.demo import world
from fs_plugins.playground.state import LONGEST, MOST, State, read

STATES = st.builds(
    State,
    source=st.sampled_from(["scene", "photo", "upload"]),
    shape=st.sampled_from(world.CLASSES),
    colour=st.sampled_from(list(world.COLOURS)),
    background=st.integers(0, MOST["background"]),
    attack=st.sampled_from(["none", "attackvlm", "m-attack", "foa"]),
    adaptive=st.booleans(),
    eps=st.integers(1, MOST["eps"]),
    question=st.text(st.characters(codec="utf-8"), max_size=40),
    choices=st.text(st.characters(codec="utf-8"), max_size=40),
    sigma=st.none() | st.floats(0.001, 1),
    n0=st.integers(1, MOST["n0"]),
)


@given(STATES)
def test_a_state_is_a_link_and_back(state):
    assert read(dict(parse_qsl(state.query(), keep_blank_values=True))) == state


def test_a_link_says_only_what_differs_from_the_defaults():
    assert State().query() == ""
    assert State(adaptive=True, eps=8, question="a&b?").query() == "adaptive=true&eps=8&question=a%26b%3F"


def test_parameters_of_others_are_left_alone():
    assert read({"__theme": "dark", "utm_source": "x", "eps": "8"}) == State(eps=8)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eps", "0"),
        ("eps", "65"),
        ("eps", "much"),
        ("steps", "100000"),
        ("n0", "-1"),
        ("sigma", "nan"),
        ("attack", "nuke"),
        ("source", "file:///etc/passwd"),
        ("shape", "<b>star</b>"),
        ("adaptive", "perhaps"),
        ("question", "?" * (LONGEST + 1)),
        ("question", "\udcff"),
        ("seed", "1e99"),
    ],
)
def test_a_link_that_is_no_state_is_refused_in_words(name, value):
    with pytest.raises(SettingError, match=name):
        read({name: value})


def test_choices_are_between_commas():
    assert State(choices=" cat,dog , ,a fox").classes == ("cat", "dog", "a fox")
    assert State(choices="").classes == ()


def test_a_step_is_as_long_as_an_attack_takes_it():
    assert State(eps=16, steps=300).step_size == 1.0
    assert State(eps=16, steps=4).step_size == 10.0
