"""What visitors send is looked at by its content and within bounds."""

from __future__ import annotations

import struct
import zlib

import pytest
import torch
from PIL import Image

from fs_plugins import SettingError
from fs_plugins.demo import world
from fs_plugins.playground import pictures
from fs_plugins.playground.pictures import MOST_PIXELS, Picture, digest, picture, rounded, uploaded
from fs_plugins.playground.state import State

SIZE = (64, 64)


def sent(folder, name, content):
    (folder / name).write_bytes(content)
    return folder / name


def test_a_jpeg_that_lies_on_its_side_is_turned_up(tmp_path):
    lying = Image.new("RGB", (40, 20), "red")
    lying.paste("blue", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    lying.save(tmp_path / "phone.jpg", exif=exif, quality=95)
    upright = uploaded(tmp_path / "phone.jpg")
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 4))[2] > 200 > upright.getpixel((10, 36))[2]
    assert not upright.getexif()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("picture.png", b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>"),
        ("<img src=x onerror=alert(1)>.png", b"<html><script>alert(1)</script></html>"),
        ("picture.jpg", b"GIF89a" + b"\0" * 40),
        ("picture.png", b"\x89PNG\r\n\x1a\n" + b"\0" * 40),
        ("picture.png", b""),
    ],
)
def test_what_is_neither_png_nor_jpeg_is_refused_without_its_name(tmp_path, name, content):
    with pytest.raises(SettingError) as refused:
        uploaded(sent(tmp_path, name, content))
    assert str(tmp_path) not in str(refused.value)
    assert "<" not in str(refused.value)


def test_a_small_file_of_many_pixels_is_not_decoded(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", MOST_PIXELS, 2, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(SettingError, match="the limit here"):
        uploaded(sent(tmp_path, "bomb.png", bomb))


def test_a_large_file_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MOST_BYTES", 10)
    with pytest.raises(SettingError, match="larger than"):
        uploaded(sent(tmp_path, "large.png", b"\0" * 11))


def test_a_link_knows_an_uploaded_picture_again():
    one, other = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    state = State(source="upload", upload=digest(one))
    assert picture(state, SIZE, one).shown.getpixel((3, 3)) == (255, 0, 0)
    for wrong in (None, other):
        with pytest.raises(SettingError, match="Upload it again"):
            picture(state, SIZE, wrong)


def test_a_scene_has_the_attributes_that_were_chosen():
    found = picture(State(shape="ring", colour="blue", size="small", side="left", background=3), SIZE, None)
    assert found.about == "Drawn: a small blue ring on the left."
    scene = world.drawn("ring", "blue", "small", "left", 3)
    assert torch.equal(found.image, pictures.to_unit(scene.draw()))
    blue = found.image[2] - found.image[0] > 0.35
    assert blue[:, :32].sum() > 50 > blue[:, 40:].sum()


def test_only_photographs_that_there_are_are_opened(monkeypatch):
    monkeypatch.setattr(pictures, "photographs", dict)
    with pytest.raises(SettingError, match="no photograph"):
        picture(State(source="photo", photo="../../secret"), SIZE, None)


def test_rounding_stays_within_whole_255ths():
    clean = rounded(torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)))
    moved = (clean + 16 / 255 * torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1)).sign()).clamp(0, 1)
    kept = rounded(moved * 0.999)
    assert float((rounded(moved) - clean).abs().max() * 255) < 16.001
    assert torch.equal(rounded(kept), kept)
    assert torch.equal(rounded(Picture(kept, "").image), kept)
