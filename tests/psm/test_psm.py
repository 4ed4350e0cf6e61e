from __future__ import annotations

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import make_psm

from fs_plugins import PSM, PSMError, SettingError
from fs_plugins.psm import PAPER_UNET, Part, PSMConfig, ResidualMapper, UNetPurifier
from fs_plugins.psm.bundle import CONFIG_NAME, WEIGHTS_NAME
from fs_plugins.psm.purifier import BottleneckPurifier, basis, spectrum


def shaken(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return module.eval()


@given(st.integers(0, 50), st.sampled_from([(2, 5, 8), (3, 8)]))
def test_mapper_is_exactly_the_identity_at_sigma_zero(seed, shape):
    z = torch.randn(shape)
    mapper = shaken(ResidualMapper(8, heads=2), seed)
    assert torch.equal(mapper(z, 0.0), z)
    assert not torch.equal(mapper(z, 0.25), z)


def test_mapper_near_sigma_zero_has_finite_gradients():
    mapper = shaken(ResidualMapper(8, heads=2))
    for sigma in (0.0, 1e-6, 0.25, 1.0):
        z = torch.randn(2, 5, 8, requires_grad=True)
        mapper.zero_grad()
        mapper(z, sigma).square().sum().backward()
        assert z.grad is not None
        assert z.grad.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in mapper.parameters())


def test_mapper_block_is_the_papers_formula():
    """Eqs. S.28 to S.32, written out once more from the paper's symbols."""
    mapper = shaken(ResidualMapper(8, blocks=1, heads=2), 3)
    block, sigma, z = mapper.blocks[0], torch.tensor(0.25), torch.randn(2, 5, 8)
    gamma, beta = (block.film.second.weight @ F.gelu(block.film.first.weight @ sigma.view(1))).split(8)
    x = F.layer_norm(z, (8,), block.norm.weight, block.norm.bias)
    q, k, v = (
        (x @ block.attention.in_proj_weight.T + block.attention.in_proj_bias).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    )
    heads = torch.softmax(q @ k.transpose(-1, -2) / 4**0.5, -1) @ v
    h_attn = block.attention.out_proj(heads.transpose(1, 2).reshape(2, 5, 8))
    h_mlp = F.linear(
        F.gelu(F.linear(x, block.mlp[0].weight, block.mlp[0].bias)), block.mlp[2].weight, block.mlp[2].bias
    )
    padded = F.pad(x, (0, 0, 1, 1))
    taps = block.conv.weight[:, 0]
    h_conv = sum(padded[:, i : i + 5] * taps[:, i] for i in range(3)) + block.conv.bias
    h = h_attn + h_mlp + 0.5 * h_conv
    alpha = F.softplus(block.amplitude(torch.stack([sigma, sigma.log()])))
    exponent = F.softplus(block.exponent(sigma.view(1)))
    update = (1 + gamma) * (h / h.norm(dim=-1, keepdim=True)) * alpha * sigma**exponent + beta * block.scale
    assert torch.allclose(mapper(z, 0.25) - z, update, atol=1e-5)


def test_mapper_has_k_blocks_and_attention_in_the_first_alone():
    mapper = ResidualMapper(8, heads=2)
    assert [block.attention is not None for block in mapper.blocks] == [True, False, False]
    assert torch.equal(mapper.blocks[0].scale, torch.full((8,), 5e-4))


def test_an_untrained_mapper_starts_near_the_identity():
    z = torch.randn(4, 16, 32) * 3
    with torch.no_grad():
        moved = ResidualMapper(32)(z, 0.25) - z
    assert (moved.norm(dim=-1) < 0.1 * z.norm(dim=-1)).float().mean() > 0.99


@pytest.mark.parametrize("length", [0.1, 3.0, 100.0])
def test_calibration_sets_the_length_of_the_update_and_keeps_the_identity(length):
    mapper, z = ResidualMapper(16, blocks=1, heads=2), torch.randn(4, 9, 16) * length
    mapper.calibrate(z, 0.25)
    with torch.no_grad():
        moved = mapper(z, 0.25) - z
        assert torch.allclose(moved.norm(dim=-1), 0.05 * z.norm(dim=-1).mean().expand(4, 9), rtol=1e-3)
        assert torch.equal(mapper(z, 0.0), z)


@pytest.mark.parametrize("size", [(16, 16), (15, 21), (8, 40)])
def test_purifier_takes_any_size_and_starts_as_the_identity(size):
    purifier = UNetPurifier(channels=(8, 16), unshuffle=2).eval()
    images = torch.rand(2, 3, *size)
    assert torch.allclose(purifier(images, 0.25), images, atol=1e-6)
    shaken(purifier)
    out = purifier(images, 0.25)
    assert out.shape == images.shape
    assert out.min() >= 0
    assert out.max() <= 1
    assert not torch.allclose(out, purifier(images, 0.5)), "sigma conditions the net"


def test_the_basis_is_orthonormal_and_grey_comes_first():
    for unshuffle in (1, 2, 3, 4):
        rows = basis(unshuffle)
        torch.testing.assert_close(rows @ rows.T, torch.eye(3 * unshuffle**2))
        assert torch.allclose(rows[0], rows[0, 0].expand_as(rows[0])), "the mean of all pixels"


def test_a_spectrum_is_that_of_the_pictures():
    rows, sizes = basis(2), torch.linspace(0.01, 0.12, 12)
    drawn = sizes.view(-1, 1, 1) * torch.randn(12, 64, 64, generator=torch.Generator().manual_seed(0))
    image = 0.5 + F.pixel_shuffle(torch.einsum("dc,dhw->chw", rows, drawn), 2)
    assert spectrum([image, image[:, :127]], 2) == pytest.approx(sizes.tolist(), rel=0.05)


@pytest.mark.parametrize("sigma", [0.05, 0.25, 0.5])
def test_of_an_image_stays_what_stands_out_of_the_noise(sigma):
    """A net that says nothing leaves the filter of Wiener: here all that is grey, and hardly any colour."""
    known = [10.0] * 4 + [1e-3] * 8
    purifier = UNetPurifier(channels=(8, 16), unshuffle=2, spectrum=known).eval()
    images = 0.2 + 0.6 * torch.rand(2, 3, 15, 21)
    grey = images.mean(1, keepdim=True).expand_as(images)
    assert torch.allclose(purifier(images, sigma), grey, atol=2e-3)
    shaken(purifier)
    assert torch.allclose(purifier(images, 0.0), images, atol=1e-6), "no noise, no change, whatever the net says"
    assert not torch.allclose(purifier(images, sigma), grey, atol=2e-3)
    levels = torch.tensor([sigma, 0.0])
    assert torch.allclose(purifier(images, levels)[:1], purifier(images[:1], sigma), atol=1e-5), (
        "each image has its own"
    )


def test_what_is_kept_is_exact_under_autocast():
    purifier = shaken(UNetPurifier(channels=(8, 16), unshuffle=2, spectrum=[1.0] * 12).eval())
    images = torch.rand(1, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(purifier(images, 0.0), images, atol=1e-6)


@pytest.mark.parametrize("known", [[0.1] * 11, [0.1] * 11 + [0.0], [-0.1] * 12, [float("nan")] * 12, 0.1, "0.1"])
def test_a_spectrum_has_a_positive_number_for_each_row(known):
    with pytest.raises(SettingError, match=r"UNetPurifier\.spectrum"):
        UNetPurifier(channels=(8, 16), unshuffle=2, spectrum=known)


def test_purifier_at_the_papers_size_has_43_7_million_parameters():
    with torch.device("meta"):
        count = sum(p.numel() for p in UNetPurifier(**PAPER_UNET).parameters())
    assert abs(count - 43.7e6) < 0.01 * 43.7e6


def test_purifier_widths_are_checked():
    with pytest.raises(SettingError, match="multiples of 8"):
        UNetPurifier(channels=(10,))


SMALL = {"channels": [8, 16], "unshuffle": 2}
CASCADE = [{"kind": "unet", "args": SMALL}, {"kind": "bottleneck", "args": {**SMALL, "latent": 2}}]
FACTS = {"sigma": 0.25, "sigma_range": (0.25, 0.25), "image_size": None, "encoder": "any", "fingerprint": ()}


def test_a_bottleneck_hands_on_no_more_than_its_code():
    """Pictures that have the same code come out the same; the mean of many pictures is of any size."""
    net = BottleneckPurifier(**SMALL, latent=1, attention=False).eval()
    images = torch.rand(2, 3, 9, 14)
    assert net(images, 0.25).shape == images.shape
    assert not torch.equal(net(images, 0.25), net(images, 0.5))
    codes = []
    net.net.decoder.register_forward_pre_hook(lambda module, given: codes.append(given[0]))
    net(torch.rand(1, 3, 8, 8), 0.25)
    assert codes[0].numel() == 4  # one number for each 4 x 4 pixels
    with pytest.raises(SettingError, match="latent"):
        BottleneckPurifier(latent=0)


def test_a_cascade_lets_each_purifier_see_what_the_one_before_made(tmp_path):
    parts = [Part(**one) for one in CASCADE]
    psm = PSM(PSMConfig(name="p", purifier=Part.cascade(parts), **FACTS))
    images = torch.rand(2, 3, 8, 8)
    first, second = psm.purifier.parts
    assert torch.equal(psm.purify(images, 0.25), second(first(images, 0.25), 0.25))
    psm.save_pretrained(tmp_path / "psm")
    again = PSM.from_pretrained(tmp_path / "psm")
    assert again.config.purifier == psm.config.purifier
    assert torch.equal(again.purify(images, 0.25), psm.purify(images, 0.25))
    assert Part.cascade(parts[:1]) == parts[0]
    with pytest.raises(SettingError, match="at least one"):
        Part.cascade([])


def test_a_purifier_may_have_several_turns_with_the_same_weights(tmp_path):
    psm = PSM(PSMConfig(name="p", purifier=Part.cascade([Part(kind="unet", args=SMALL)], times=3), **FACTS))
    images = torch.rand(2, 3, 8, 8)
    (part,) = psm.purifier.parts
    torch.nn.init.normal_(part.net.conv_out.weight, std=0.1)
    assert torch.equal(psm.purify(images, 0.25), part(part(part(images, 0.25), 0.25), 0.25))
    psm.save_pretrained(tmp_path / "psm")
    again = PSM.from_pretrained(tmp_path / "psm")
    assert torch.equal(again.purify(images, 0.25), psm.purify(images, 0.25))
    alone = PSM(PSMConfig(name="p", purifier=Part(kind="unet", args=SMALL), **FACTS))
    count = sum(parameter.numel() for parameter in psm.parameters())
    assert count == sum(parameter.numel() for parameter in alone.parameters())
    with pytest.raises(SettingError, match="turns of the purifier"):
        Part.cascade([Part(kind="unet", args=SMALL)], times=0)


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"parts": []},
        {"parts": CASCADE * 5},
        {"parts": [3]},
        {"parts": [{"kind": "unet", "arg": {}}]},
        {"parts": CASCADE, "sigma": 0.1},
        {"parts": CASCADE, "times": 0},
        {"parts": CASCADE, "times": 5},
        {"parts": CASCADE, "times": "2"},
        {"parts": [{"kind": "cascade", "args": {"parts": CASCADE}}]},
        {"parts": [{"kind": "no such", "args": {}}]},
    ],
)
def test_a_cascade_of_something_else_is_refused(args):
    with pytest.raises(PSMError):
        PSM(PSMConfig(name="p", purifier=Part(kind="cascade", args=args), **FACTS))


@pytest.mark.parametrize("kind", ["unet", "bottleneck", "diffusion"])
def test_a_purifier_says_that_what_it_is_made_of_cannot_be_imported(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    facts = {"sigma": 0.25, "sigma_range": (0.25, 0.25), "image_size": None, "encoder": "any", "fingerprint": ()}
    with pytest.raises(PSMError, match="cannot be built: diffusers, of which it is made, cannot be imported"):
        PSM(PSMConfig(name="p", purifier=Part(kind=kind), **facts))


def test_bundle_survives_the_disk_bit_for_bit(call, tmp_path):
    psm = make_psm(call)
    psm.save_pretrained(tmp_path / "psm")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["psm"]
    again = PSM.from_pretrained(tmp_path / "psm")
    images, z = torch.rand(2, 3, 8, 8), torch.randn(2, 4, 6)
    assert torch.equal(again.purify(images, 0.25), psm.purify(images, 0.25))
    assert torch.equal(again.map("tokens", z, 0.25), psm.map("tokens", z, 0.25))
    assert not any(p.requires_grad for p in again.parameters())
    psm.save_pretrained(tmp_path / "psm")
    assert PSM.from_pretrained(tmp_path / "psm").config == again.config


def test_half_precision_on_disk_is_fp32_in_memory(call, tmp_path):
    psm = make_psm(call)
    psm.save_pretrained(tmp_path / "half", dtype=torch.float16)
    psm.save_pretrained(tmp_path / "full")
    sizes = [(tmp_path / name / WEIGHTS_NAME).stat().st_size for name in ("half", "full")]
    assert sizes[0] < 0.7 * sizes[1]
    again = PSM.from_pretrained(tmp_path / "half")
    assert all(p.dtype == torch.float32 for p in again.parameters())
    z = torch.randn(2, 4, 6)
    assert torch.allclose(again.map("tokens", z, 0.25), psm.map("tokens", z, 0.25), atol=1e-2)


def test_save_refuses_a_folder_that_is_something_else_and_keeps_a_model_card(call, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work", "utf-8")
    with pytest.raises(PSMError, match="not a PSM folder"):
        make_psm(call).save_pretrained(tmp_path)
    assert (tmp_path / "thesis.tex").exists()
    make_psm(call).save_pretrained(tmp_path / "psm")
    (tmp_path / "psm" / "README.md").write_text("card", "utf-8")
    make_psm(call).save_pretrained(tmp_path / "psm")
    assert (tmp_path / "psm" / "README.md").read_text("utf-8") == "card"


def test_a_failed_save_leaves_the_old_bundle_and_no_litter(call, tmp_path, monkeypatch):
    make_psm(call).save_pretrained(tmp_path / "psm")
    old = (tmp_path / "psm" / WEIGHTS_NAME).read_bytes()

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("fs_plugins.psm.bundle.save", full)
    with pytest.raises(OSError, match="no space"):
        make_psm(call, sigma=0.5).save_pretrained(tmp_path / "psm")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["psm"]
    assert (tmp_path / "psm" / WEIGHTS_NAME).read_bytes() == old


def test_parts_can_be_left_out(call):
    psm = make_psm(call)
    images, z = torch.rand(1, 3, 8, 8), torch.randn(1, 4, 6)
    assert torch.equal(psm.only(purifier=False).purify(images, 0.25), images)
    assert torch.equal(psm.only(mapper=False).map("tokens", z, 0.25), z)
    assert torch.equal(psm.map("unknown readout", z, 0.25), z)
    assert psm.purifier is not None, "only() works on a copy"


@pytest.fixture
def folder(call, tmp_path):
    make_psm(call).save_pretrained(tmp_path / "psm")
    return tmp_path / "psm"


def test_truncated_weights_are_refused(folder):
    data = (folder / WEIGHTS_NAME).read_bytes()
    (folder / WEIGHTS_NAME).write_bytes(data[: len(data) // 2])
    with pytest.raises(PSMError, match="damaged"):
        PSM.from_pretrained(folder)


def test_tampered_weights_are_refused(folder):
    data = bytearray((folder / WEIGHTS_NAME).read_bytes())
    data[-5] ^= 1
    (folder / WEIGHTS_NAME).write_bytes(bytes(data))
    with pytest.raises(PSMError, match="SHA-256"):
        PSM.from_pretrained(folder)


def test_weights_of_another_shape_are_refused_even_with_a_matching_checksum(folder):
    import hashlib

    weights = load_file(folder / WEIGHTS_NAME)
    save_file({name: value for name, value in weights.items() if "film" not in name}, folder / WEIGHTS_NAME)
    config = json.loads((folder / CONFIG_NAME).read_text("utf-8"))
    config["weights_sha256"] = hashlib.sha256((folder / WEIGHTS_NAME).read_bytes()).hexdigest()
    (folder / CONFIG_NAME).write_text(json.dumps(config), "utf-8")
    with pytest.raises(PSMError, match="does not hold the weights"):
        PSM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "surprise"),
        ({"sigma": "much"}, "sigma"),
        ({"sigma": -1}, "sigma"),
        ({"sigma_range": [0.3, 0.5]}, "sigma_range"),
        ({"purifier": {"kind": "magic", "args": {}}}, "magic"),
        ({"purifier": {"kind": "unet", "args": {"width": 3}}}, "does not take"),
    ],
)
def test_configurations_are_validated(folder, change, message):
    config = json.loads((folder / CONFIG_NAME).read_text("utf-8"))
    (folder / CONFIG_NAME).write_text(json.dumps(config | change), "utf-8")
    with pytest.raises(PSMError, match=message):
        PSM.from_pretrained(folder)


def test_missing_files_and_folders_are_named(folder, tmp_path):
    (folder / WEIGHTS_NAME).unlink()
    with pytest.raises(PSMError, match=WEIGHTS_NAME):
        PSM.from_pretrained(folder)
    for nowhere in (tmp_path / "nothing", "./nothing", "nothing", "nobody/nothing-at-all"):
        with pytest.raises(PSMError):
            PSM.from_pretrained(nowhere)


def test_mapper_part_needs_its_width(call):
    spec = {"name": "tokens", "width": 6, "tokens": 4, "mapper": Part(kind="residual", args={"depth": 3})}
    with pytest.raises(PSMError, match="does not take"):
        make_psm(call, readouts=(spec,))
