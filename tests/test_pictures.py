"""Pictures: which files below a folder are some, and what every mode, depth and orientation of one shows."""

from __future__ import annotations

import inspect
import os
import random
import socket
import struct
import warnings
import zlib
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageDraw

from fs_plugins import pictures
from fs_plugins.certificates import pictures_of
from fs_plugins.errors import SettingError
from fs_plugins.evaluation import open_dataset
from fs_plugins.pictures import pictures_below, rgb, to_rgb, to_unit
from fs_plugins.training import ImageFolder


def photo(mode: str = "RGB", size: tuple[int, int] = (48, 32)) -> Image.Image:
    """Smooth, with a corner of its own colour; as grey (L) or RGB."""
    image = Image.merge("RGB", [Image.linear_gradient("L").resize(size).rotate(90 * i) for i in (0, 1, 2)])
    ImageDraw.Draw(image).rectangle((0, 0, 9, 5), fill=(230, 40, 90))
    return image.convert(mode)


def clear(image: Image.Image) -> Image.Image:
    """With an alpha of 0 at the left, which hides the corner, and of 255 elsewhere."""
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, 12, image.height))
    image.putalpha(alpha)
    return image


def white(image: Image.Image) -> Image.Image:
    image.paste(Image.new(image.mode, (12, image.height), "white"), (0, 0))
    return image


def sixteen(mode: str) -> Image.Image:
    values = np.asarray(photo("L"), dtype=">u2" if mode == "I;16B" else "<u2") * 257
    return Image.frombytes(mode, photo().size, values.astype(">u2" if mode == "I;16B" else "<u2").tobytes())


def palette() -> Image.Image:
    return photo().quantize(64)


def key(mode: str, colour: int | tuple[int, int, int]) -> Image.Image:
    image = photo(mode)
    image.info["transparency"] = colour
    return image


def without(image: Image.Image, colour: int | tuple[int, int, int]) -> Image.Image:
    """White where there is the colour."""
    pixels = np.array(image.convert("RGB"))
    pixels[(pixels == np.array(colour)).all(-1)] = 255
    return Image.fromarray(pixels)


GREY = photo("L").getpixel((1, 1))
CORNER = (230, 40, 90)
MODES = {
    "1": (lambda: photo("1"), lambda: photo("1").convert("RGB")),
    "L": (lambda: photo("L"), lambda: photo("L").convert("RGB")),
    "P": (palette, lambda: palette().convert("RGB")),
    "RGB": (photo, photo),
    "RGBX": (lambda: photo("RGBX"), photo),
    "CMYK": (lambda: photo("CMYK"), photo),
    "YCbCr": (lambda: photo("YCbCr"), photo),
    "HSV": (lambda: photo("HSV"), photo),
    "LAB": (lambda: photo("LAB"), photo),
    "I;16": (lambda: sixteen("I;16"), lambda: photo("L").convert("RGB")),
    "I;16L": (lambda: sixteen("I;16L"), lambda: photo("L").convert("RGB")),
    "I;16B": (lambda: sixteen("I;16B"), lambda: photo("L").convert("RGB")),
    "I;16N": (lambda: sixteen("I;16N"), lambda: photo("L").convert("RGB")),
    "I": (lambda: photo("L").convert("I"), lambda: photo("L").convert("RGB")),
    "F": (lambda: photo("L").convert("F"), lambda: photo("L").convert("RGB")),
    "RGBA": (lambda: clear(photo()), lambda: white(photo())),
    "RGBa": (lambda: clear(photo()).convert("RGBa"), lambda: white(photo())),
    "LA": (lambda: clear(photo("L")), lambda: white(photo("L")).convert("RGB")),
    "La": (lambda: clear(photo("L")).convert("La"), lambda: white(photo("L")).convert("RGB")),
    "PA": (lambda: clear(photo("L").convert("PA")), lambda: white(photo("L")).convert("RGB")),
    "L, a key colour": (lambda: key("L", GREY), lambda: without(photo("L"), GREY)),
    "RGB, a key colour": (lambda: key("RGB", CORNER), lambda: without(photo(), CORNER)),
}
"""A mode -> a picture in it, and what it has to look like: its twin of 8 bits."""
NEAR = {"HSV": 12, "YCbCr": 3, "LAB": 40, "JPEG": 16}
"""How far from its twin a colour may come back, of 255: through another colour space or a lossy format."""


def apart(found: Image.Image, twin: Image.Image) -> int:
    assert (found.mode, found.size) == ("RGB", twin.size)
    return int(np.abs(np.asarray(found).astype(int) - np.asarray(twin).astype(int)).max())


def test_every_mode_that_pillow_has_is_swept():
    assert {name.partition(",")[0] for name in MODES} >= set(Image.MODES)


@pytest.mark.parametrize("name", MODES)
def test_a_picture_of_any_mode_looks_like_its_twin_of_eight_bits(name):
    made, twin = MODES[name]
    image = made()
    assert apart(to_rgb(image), twin()) <= NEAR.get(name, 0)
    assert image.tobytes() == made().tobytes()
    assert image.mode == made().mode


BEST = {"PNG": {}, "JPEG": {"quality": 100, "subsampling": 0}}
"""A format -> settings with which Pillow writes it as near to the picture as it can."""


@pytest.mark.parametrize(
    ("form", "least"),
    [
        ("PNG", {"1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I;16B", "L, a key colour", "RGB, a key colour"}),
        ("JPEG", {"1", "L", "RGB", "RGBX", "CMYK", "YCbCr"}),
    ],
)
def test_so_does_every_mode_that_pillow_writes_into_a_file(form, least, tmp_path):
    written = set()
    keys = {name for name in MODES if "key" in name}
    for name in set(MODES) - ({"I"} if form == "PNG" else keys):  # Pillow 10 writes I's numbers as of 16 bits
        made, twin = MODES[name]
        path = tmp_path / f"{name}.{form.lower()}"
        try:
            made().save(path, form, **BEST[form])
        except OSError:
            continue  # Pillow writes no picture of this mode
        written.add(name)
        assert apart(rgb(path), twin()) <= max(NEAR.get(name, 0), NEAR.get(form, 0)), name
    assert written >= least


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(pixels: np.ndarray, depth: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of (H, W) or (H, W, channels) numbers, at a bit depth that Pillow itself may not write."""
    height, width = pixels.shape[:2]
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[pixels[0, 0].size]
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in pixels]
    else:
        bits = np.unpackbits(pixels.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
        rows = [np.packbits(row.reshape(-1)).tobytes() for row in bits]
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*one) for one in chunks) + body + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("mode", "depth"),
    [
        *(("L", depth) for depth in (1, 2, 4, 8, 16)),
        *((mode, depth) for mode in ("LA", "RGB", "RGBA") for depth in (8, 16)),
    ],
)
def test_every_depth_of_png_looks_like_its_twin_of_eight_bits(mode, depth, tmp_path):
    image = clear(photo(mode.removesuffix("A"))) if mode.endswith("A") else photo(mode)
    full = 2**depth - 1
    levels = np.rint(np.asarray(image).astype(float) / 255 * full).astype(int)
    (tmp_path / "a.png").write_bytes(png(levels, depth))
    twin = Image.fromarray(np.rint(levels / full * 255).astype(np.uint8))
    assert apart(rgb(tmp_path / "a.png"), to_rgb(twin)) == 0


def test_sixteen_bits_of_grey_are_rounded_to_the_nearest_of_eight():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    found = np.asarray(to_rgb(Image.fromarray(values)))[..., 0]
    assert (found == np.rint(values.astype(float) * 255 / 65535)).all()


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_key_colour_of_any_depth_of_grey_shows_white(depth, tmp_path):
    full = 2**depth - 1
    levels = np.rint(np.asarray(photo("L")).astype(float) / 255 * full).astype(int)
    key = int(levels[1, 1])
    levels[0, :2] = max(key - 1, 0), min(key + 1, full)  # near the key is not the key
    (tmp_path / "a.png").write_bytes(png(levels, depth, (b"tRNS", struct.pack(">H", key))))
    twin = np.where(levels == key, 255, np.rint(levels / full * 255)).astype(np.uint8)
    assert apart(rgb(tmp_path / "a.png"), Image.fromarray(twin).convert("RGB")) == 0


def test_a_key_colour_of_sixteen_bits_a_channel_shows_white(tmp_path):
    levels = np.asarray(photo()).astype(int) * 257
    chosen = struct.pack(">HHH", *(value * 257 for value in CORNER))
    (tmp_path / "a.png").write_bytes(png(levels, 16, (b"tRNS", chosen)))
    assert apart(rgb(tmp_path / "a.png"), without(photo(), CORNER)) == 0


@pytest.mark.parametrize("alpha", [0, 1, 100, 254, 255])
def test_what_is_half_transparent_is_mixed_with_white(alpha):
    found = to_rgb(Image.new("RGBA", (2, 2), (200, 0, 40, alpha))).getpixel((0, 0))
    assert np.allclose(found, [255 + (value - 255) * alpha / 255 for value in (200, 0, 40)], atol=1)


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (Image.fromarray(np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)), "is 1 white, or 255"),
        (Image.fromarray(np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)), "from -1 to 1"),
        (Image.fromarray(np.full((3, 4), np.nan, dtype=np.float32)), "nan"),
        (Image.fromarray(np.full((3, 4), 4000, dtype=np.int32)), "from 4000 to 4000"),
        (Image.fromarray(np.full((3, 4), -1, dtype=np.int32)), "from -1 to -1"),
        (Image.new("RGB", (0, 4)), "0 x 4 pixels"),
    ],
)
def test_numbers_whose_white_nobody_knows_are_refused(image, told):
    with pytest.raises(SettingError, match=told):
        to_rgb(image)


def turned(orientation: int) -> Image.Image:
    """The photo as a camera stores it that was held otherwise, with the EXIF that says so; EXIF 2.3, section 4.6.4."""
    stored = np.asarray(photo())
    if orientation >= 5:
        stored = stored.swapaxes(0, 1)
    if orientation in (3, 4, 6, 7):  # row 0 is at the bottom, or at the right
        stored = stored[::-1]
    if orientation in (2, 3, 7, 8):  # column 0 is at the right, or at the bottom
        stored = stored[:, ::-1]
    image = Image.fromarray(np.ascontiguousarray(stored))
    image.getexif()[ExifTags.Base.Orientation] = orientation
    return image


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[ExifTags.Base.Orientation] = orientation
    return found


SIZE = (32, 48)
READERS = {
    "ask": lambda path: to_unit(rgb(path)),
    "certify": lambda path: pictures_of([path], SIZE)[str(path)],
    "certify a folder": lambda path: next(iter(pictures_of([path.parent], SIZE).values())),
    "train": lambda path: ImageFolder(path.parent, SIZE)[0],
    "evaluate": lambda path: (found := open_dataset(path.parent, targets=aims(path))).image(found.samples[0], SIZE),
    "aim of evaluate": lambda path: (found := open_dataset(aims(path), targets=path.parent)).target(
        found.samples[0], SIZE
    ),
}
"""Who reads pictures -> a file, read as they do."""


def aims(path: Path) -> Path:
    folder = path.parent.parent / "aims"
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / "aim.png")
    return folder


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_turns_pictures_upright(reader, orientation, form, tmp_path):
    path = tmp_path / "photos" / f"a.{form.lower()}"
    path.parent.mkdir()
    turned(orientation).save(path, form, exif=exif(orientation), **BEST[form])
    found = READERS[reader](path)
    assert found.shape == (3, *SIZE)
    assert (found - to_unit(photo())).abs().max() <= NEAR["JPEG"] / 255 * (form == "JPEG")


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_shows_sixteen_bits_and_what_is_transparent_alike(reader, tmp_path):
    for name, made in (("deep", MODES["I;16"]), ("clear", MODES["RGBA"])):
        path = tmp_path / name / "photos" / "a.png"
        path.parent.mkdir(parents=True)
        made[0]().save(path)
        assert torch.equal(READERS[reader](path), to_unit(made[1]()))


def test_an_upright_picture_is_not_turned_again():
    image = turned(6)
    once = to_rgb(image)
    assert apart(once, photo()) == 0
    assert apart(to_rgb(once), photo()) == 0
    image = turned(6)
    image.save(file := BytesIO(), "PNG", exif=exif(6))
    assert apart(to_rgb(Image.open(file).convert("RGB")), photo()) == 0, "a copy that still says how it is turned"


@pytest.mark.parametrize(
    "broken", [b"", b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"nothing", b"Exif\0\0II*\0" * 9]
)
def test_exif_that_cannot_be_read_turns_nothing(broken, tmp_path):
    photo().save(tmp_path / "a.png", exif=broken)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own, of corrupt EXIF
        assert apart(rgb(tmp_path / "a.png"), photo()) == 0


def test_phones_that_put_two_pictures_into_a_jpeg_show_the_first(tmp_path):
    path = tmp_path / "a.jpg"
    photo().save(path, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))], **BEST["JPEG"])
    with Image.open(path) as image:
        assert image.format == "MPO"
    assert apart(rgb(path), photo()) <= NEAR["JPEG"]


WRITTEN = [
    "BMP",
    "DDS",
    "DIB",
    "EPS",
    "GIF",
    "ICO",
    "JPEG2000",
    "PCX",
    "PDF",
    "PPM",
    "SGI",
    "TGA",
    "TIFF",
    "WEBP",
]


@pytest.mark.parametrize("form", WRITTEN)
def test_what_is_neither_png_nor_jpeg_is_refused_whatever_its_name(form, tmp_path):
    try:
        photo().save(tmp_path / "a.png", form)
    except (OSError, KeyError):
        pytest.skip(f"this Pillow writes no {form}")
    for reads in (rgb, pictures.check, lambda path: pictures_of([path], SIZE), lambda path: open_dataset(path.parent)):
        with pytest.raises(SettingError, match=r"a\.png is not a readable image: its content is neither PNG nor JPEG"):
            reads(tmp_path / "a.png")


@pytest.mark.parametrize(("form", "name"), [("PNG", "a.jpg"), ("JPEG", "a.png")])
def test_the_content_counts_and_not_the_name(form, name, tmp_path):
    photo().save(tmp_path / name, form, **BEST[form])
    assert apart(rgb(tmp_path / name), photo()) <= NEAR["JPEG"]


@pytest.mark.parametrize("chunks", [[(b"tRNS", b"\0\1")], [(b"tRNS", b"")], []])
def test_a_picture_without_pixels_is_refused(chunks, tmp_path):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 2, 0, 0, 0, 0))
    parts = [head, *(chunk(*one) for one in chunks), chunk(b"IEND", b"")]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    with pytest.raises(SettingError, match=r"a\.png is not a readable image"):
        rgb(tmp_path / "a.png")


def test_an_image_whose_file_turns_out_to_be_cut_off_is_refused():
    Image.effect_noise((40, 40), 50).save(file := BytesIO(), "PNG")
    with pytest.raises(SettingError, match="A picture cannot be read: "):
        to_rgb(Image.open(BytesIO(file.getvalue()[:200])))


def test_a_damaged_picture_is_read_or_refused_and_nothing_else(tmp_path):
    chance = random.Random(0)
    files = []
    for form, made in (("PNG", palette()), ("PNG", photo()), ("PNG", sixteen("I;16")), ("JPEG", photo())):
        made.save(file := BytesIO(), form, exif=exif(6))
        files.append(file.getvalue())
    path = tmp_path / "a.png"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(500):
            data = bytearray(chance.choice(files))
            for _ in range(chance.choice([1, 3, 30])):
                data[chance.randrange(8, min(len(data), 400))] = chance.randrange(256)
            path.write_bytes(data[: chance.choice([len(data), chance.randrange(len(data))])])
            with suppress(SettingError):
                assert rgb(path).mode == "RGB"


@pytest.mark.parametrize("reader", READERS)
def test_one_limit_of_pixels_for_every_reader_without_a_warning_before_it(reader, tmp_path, monkeypatch):
    path = tmp_path / "photos" / "a.png"
    path.parent.mkdir()
    photo(size=(48, 40)).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 40 // 2)
        READERS[reader](path)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 40 // 2 - 1)
        with pytest.raises(SettingError, match=r"a\.png.*48 x 40 pixels, and 1918 is the limit"):
            READERS[reader](path)


def test_a_bomb_is_refused_by_its_header_with_its_name_size_and_limit(tmp_path):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")))
    with pytest.raises(
        SettingError, match=r"a\.png is not a readable image: it has 20000 x 20000 pixels, and 178956970"
    ):
        rgb(tmp_path / "a.png")


def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.png"))
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "linked.png").symlink_to("pipe.png")
    for name in ("pipe.png", "s.png", "folder.png", "linked.png"):
        with pytest.raises(SettingError, match="a folder, a pipe or a device; expected"):
            rgb(tmp_path / name)
    for missing in ("none.png", "n" * 300 + ".png", "nul\0.png"):
        with pytest.raises(SettingError, match="There is no file"):
            rgb(tmp_path / missing)


LISTS = {
    "pictures_below": pictures_below,
    "certify": lambda folder: map(Path, pictures_of([folder], (8, 8))),
    "train": lambda folder: ImageFolder(folder, (8, 8)).paths,
    "evaluate": lambda folder: [folder / sample.image for sample in open_dataset(folder).samples],
}
"""Who searches folders for pictures -> those of a folder."""


@pytest.mark.parametrize("who", LISTS)
def test_everyone_finds_the_same_pictures_below_a_folder(who, tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    names = ["a.jpg", "b/1.jpeg", "b/2.PNG", "z/deep/3.png"]
    hidden = ["._a.jpg", ".a.png", ".cache/3.png", ".ipynb_checkpoints/a.jpg", "b/.x/y/1.png", "__MACOSX/b/1.png"]
    for name in [*(f"root/{name}" for name in names + hidden), "elsewhere/sub/4.png", "elsewhere/.sub/5.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        photo().save(tmp_path / name, "PNG")
    (root / "notes.txt").touch()
    (root / "folder.png").mkdir()
    os.mkfifo(root / "pipe.png")
    (root / "linked").symlink_to(elsewhere)
    (root / "linked.png").symlink_to(elsewhere / "sub/4.png")
    (elsewhere / "sub/loop").symlink_to(root)
    (elsewhere / "sub/own").symlink_to("own")
    (root / "b/up").symlink_to("..")
    (root / "a twin of z").symlink_to("z")
    (root / ".hidden link").symlink_to(elsewhere)
    wanted = sorted(root / name for name in [*names, "linked.png", "linked/sub/4.png"])
    assert sorted(LISTS[who](root)) == wanted


def test_linked_targets_of_attacks_are_no_samples(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "elsewhere").mkdir()
    photo().save(tmp_path / "root/a.png")
    photo().save(tmp_path / "elsewhere/aim.png")
    (tmp_path / "root/aims").symlink_to(tmp_path / "elsewhere")
    for targets in (tmp_path / "root/aims", tmp_path / "elsewhere"):
        assert [sample.image for sample in open_dataset(tmp_path / "root", targets=targets).samples] == ["a.png"]
    assert len(open_dataset(tmp_path / "root", targets=tmp_path).samples) == 2


def test_folders_that_link_to_one_another_are_each_listed_once(tmp_path):
    """By every path that leads to them there would be more than anyone can wait for."""
    for i in range(12):
        (tmp_path / f"{i:02}").mkdir()
        (tmp_path / f"{i:02}/a.png").touch()
        for j in range(12):
            (tmp_path / f"{i:02}/to{j}").symlink_to(tmp_path / f"{j:02}")
    assert pictures_below(tmp_path) == [tmp_path / f"{i:02}/a.png" for i in range(12)]


def test_a_link_to_nothing_is_told_where_it_is_read(tmp_path):
    (tmp_path / "a.png").symlink_to("nothing.png")
    assert pictures_below(tmp_path) == [tmp_path / "a.png"]
    for reads in (lambda: ImageFolder(tmp_path, SIZE)[0], lambda: pictures_of([tmp_path], SIZE)):
        with pytest.raises(SettingError, match=r"There is no file .*a\.png"):
            reads()
    with pytest.raises(SettingError, match=r"1 of the 1 pictures .* are missing, the first .*a\.png"):
        open_dataset(tmp_path)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path / "shut").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(SettingError, match=r"shut cannot be listed: Permission denied"):
        pictures_below(tmp_path)
    assert pictures_below(tmp_path / "none") == []


def test_nothing_but_the_one_reader_opens_or_converts_pictures():
    """Of the package, its adapters and the scripts around it."""
    here = Path(__file__).parents[1]
    own = Path(inspect.getfile(pictures)).resolve()
    for folder in ("fs_plugins", "adapters", "benchmarks", "tools", "docs", "integration"):
        for path in (here / folder).rglob("*.py"):
            if path.resolve() != own:
                source = path.read_text(encoding="utf-8")
                for call in ("Image.open(", '.convert("RGB")'):
                    assert call not in source, f"{path} has {call}"


def test_a_tensor_is_rounded_to_eight_bits_and_a_png_keeps_them():
    image = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.1
    eight = pictures.to_pil(image)
    assert torch.equal(to_unit(eight), (image.clamp(0, 1) * 255).round() / 255)
    assert np.array_equal(np.array(Image.open(BytesIO(pictures.png(eight)))), np.array(eight))
    assert pictures.address(b"hi", "text/plain") == "data:text/plain;base64,aGk="


def test_a_picture_of_more_pixels_than_wanted_is_refused(tmp_path):
    photo().save(tmp_path / "photo.png")
    assert rgb(tmp_path / "photo.png", most=48 * 32).size == (48, 32)
    with pytest.raises(SettingError, match="1,000 is the limit"):
        rgb(tmp_path / "photo.png", most=1000)
