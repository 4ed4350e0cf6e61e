from __future__ import annotations

import re
import zlib

import pytest
import torch
import typer
from typer.testing import CliRunner

from fs_plugins.cli import app
from fs_plugins.cli.base import errors_for_people
from fs_plugins.demo import world

runner = CliRunner()


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "scene.png"
    world.scene("heldout", 1).draw().resize((90, 120)).save(path)
    return path


def test_ask_answers_without_and_with_side_by_side(picture):
    result = runner.invoke(app, ["ask", "demo", str(picture), world.CAPTION_PROMPT, "--seed", "1"])
    assert result.exit_code == 0, result.output
    assert re.search(r"without\s+a large green square", result.output)
    assert re.search(r"with fs_plugins\s+a ", result.output)
    assert "1 smoothed calls" in result.output


def test_out_of_memory_says_what_to_do_and_other_errors_are_not_hidden(capsys):
    with pytest.raises(typer.Exit) as left, errors_for_people():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert left.value.exit_code == 2
    told = " ".join(capsys.readouterr().out.split())
    assert "Tried to allocate 2.00 GiB" in told
    assert "--batch-size" in told
    with pytest.raises(RuntimeError, match="something else"), errors_for_people():
        raise RuntimeError("something else")


def test_ask_takes_jpeg_plain_smoothing_and_a_folder(picture, tmp_path):
    from fs_plugins.demo import assets

    photo = tmp_path / "photo.jpg"
    world.scene("heldout", 2).draw().convert("L").save(photo)
    plain = runner.invoke(
        app, ["ask", str(assets.LLAVA), str(photo), "what is this", "--psm", "none", "--sigma", "0.1"]
    )
    assert plain.exit_code == 0, plain.output
    assert "plain smoothing" in plain.output
    given = runner.invoke(app, ["ask", "demo", str(photo), "what is this", "--psm", str(assets.PSM_LLAVA)])
    assert given.exit_code == 0, given.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "demo", "nowhere.png", "what?"], "There is no file nowhere.png"),
        (["ask", "demo", "{text}", "what?"], "not a readable image"),
        (["ask", "demo", "{large}", "what?"], "large.png is not a readable image: it has 20000 x 20000 pixels"),
        (["certify", "{large}"], "large.png is not a readable image: it has 20000 x 20000 pixels"),
        (["ask", "{folder}", "{picture}", "what?"], "Cannot load"),
        (["ask", "demo", "{picture}", "what?", "--psm", "none"], "needs a sigma"),
        (["ask", "demo", "{picture}", "what?", "--sigma", "0.7"], "No PSM in the registry fits"),
        (["ask", "demo", "{picture}", "what?", "--psm", "{folder}"], "is no PSM folder"),
        (["demo", "--eps", "sixteen"], "16/255"),
        (["demo", "--images", "11", "--eps", "16"], "did you mean 16/255"),
    ],
)
def test_mistakes_are_told_in_a_sentence_and_exit_with_2(picture, tmp_path, arguments, message):
    (tmp_path / "notes.png").write_text("no image", "utf-8")
    data = bytearray(picture.read_bytes())
    data[16:24] = 2 * (20000).to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    (tmp_path / "large.png").write_bytes(data)
    folder = tmp_path / "empty"
    folder.mkdir()
    filled = [
        a.format(text=tmp_path / "notes.png", large=tmp_path / "large.png", folder=folder, picture=picture)
        for a in arguments
    ]
    result = runner.invoke(app, filled)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_help_lists_the_commands():
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "demo" in result.output
    assert "ask" in result.output
