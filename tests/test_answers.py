"""What a model says, as probabilities: of a head over classes, and word by word of a language model."""

from __future__ import annotations

import math

import pytest
import torch
from support import TinyEncoder, tiny_call
from torch import nn

from fs_plugins.answers import Answers, Classes, Spoken


def spoken(rows, said, image, images=2):
    return Spoken(torch.tensor(rows).log(), torch.tensor(said), torch.tensor(image), images)


def test_likelihood_and_divergence_are_sums_over_each_images_own_places():
    one = spoken([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]], [0, 1, 0], [0, 0, 1])
    other = spoken([[0.2, 0.8], [0.25, 0.75], [0.5, 0.5]], [0, 1, 0], [0, 0, 1])
    torch.testing.assert_close(one.likelihood(), torch.tensor([0.5 * 0.75, 0.9]).log())
    wanted = [
        0.2 * math.log(0.2 / 0.5) + 0.8 * math.log(0.8 / 0.5),
        0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1),
    ]
    torch.testing.assert_close(one.divergence(other), torch.tensor(wanted))
    assert one.divergence(one).abs().max() == 0


def test_an_answer_is_kept_where_all_its_words_are_the_likeliest():
    rows = [[0.6, 0.4], [0.3, 0.7], [0.6, 0.4], [0.6, 0.4]]
    assert spoken(rows, [0, 1, 0, 1], [0, 0, 1, 1], images=3).kept().tolist() == [True, False, True]


def test_an_image_without_an_answer_counts_nothing():
    one = spoken([[0.5, 0.5]], [0], [1], images=3)
    torch.testing.assert_close(one.likelihood(), torch.tensor([0.0, math.log(0.5), 0.0]))


def test_classes_are_those_of_the_head_and_name_what_makes_them():
    call = tiny_call(TinyEncoder())
    images = torch.rand(3, 3, 8, 8)
    output = call.look(images)
    embedded = call.embed(call.encode(images))
    head = nn.Linear(embedded.shape[1], 4)
    answers = Classes(call, head)
    assert isinstance(answers, Answers)
    assert answers.modules == (head,)
    given = answers.given(output, range(3))
    assert torch.equal(given, head(embedded).argmax(-1))
    found = answers.spoken(output, given)
    torch.testing.assert_close(found.likelihood(), head(embedded).log_softmax(-1).amax(-1))
    found.likelihood().sum().backward()
    assert head.weight.grad is not None
    assert not isinstance(head, Answers)


def test_a_model_goes_on_from_what_its_encoder_is_said_to_have_shown(llava):
    from support import llava_inputs

    import fs_plugins

    call = fs_plugins.vision_call(llava)
    one, other = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    wanted, before = (llava(**llava_inputs(images)).logits for images in (other, one))
    handle = fs_plugins.enable(llava, psm=None, sigma=0.25, seed=0)
    with call.showing(call.look(other)):
        torch.testing.assert_close(llava(**llava_inputs(one)).logits, wanted)
        assert handle.status().vision[0].calls == 0
    handle.disable()
    assert "forward" not in vars(call.module)
    torch.testing.assert_close(llava(**llava_inputs(one)).logits, before)
    with pytest.raises(ZeroDivisionError), call.showing(None):
        raise ZeroDivisionError
    assert "forward" not in vars(call.module)
