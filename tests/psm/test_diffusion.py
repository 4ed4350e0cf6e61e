"""The diffusion purifier against the original architecture, stated once more in plain torch, and known answers."""

from __future__ import annotations

import hashlib
import math
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from guided_diffusion import TINY, AttentionBlock, GuidedDiffusion, shaken
from support import make_psm
from torch import Tensor, nn

from fs_plugins import PSM, PSMError, SettingError
from fs_plugins.psm import Part
from fs_plugins.psm.diffusion import DiffusionPurifier, convert_guided_diffusion, load_guided_diffusion, timestep

SMALL = {"channels": (32, 64, 64), "layers": 2, "attention": (1, 2), "head_dim": 16}

ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
LEVELS = np.sqrt((1 - ABAR) / ABAR)


@pytest.fixture(scope="module")
def original() -> GuidedDiffusion:
    return shaken(GuidedDiffusion(**SMALL))


class Stub(nn.Module):
    """In the net's place: keeps what it sees and answers with ``answer(x_t, t)``, the noise it would predict."""

    dtype = torch.float32

    def __init__(self, answer=lambda x, t: torch.zeros_like(x)) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, t: Tensor) -> SimpleNamespace:
        self.seen, self.t = x.detach(), t
        return SimpleNamespace(sample=torch.cat([self.answer(x, t), torch.full_like(x, 7.0)], dim=1))


def stubbed(multiple: int = 32, **answer) -> DiffusionPurifier:
    purifier = DiffusionPurifier(**TINY).eval()
    purifier.net, purifier.multiple = Stub(**answer), multiple
    return purifier


def photo(height: int, width: int) -> Tensor:
    """A smooth picture that uses the whole range."""
    rows, columns = torch.linspace(0, 5, height)[:, None], torch.linspace(0, 7, width)
    return torch.stack([(rows + columns).sin(), (rows * columns / 3).cos(), (rows - columns).sin()])[None] / 2 + 0.5


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_default_is_the_public_model():
    with torch.device("meta"):
        purifier = DiffusionPurifier()
    assert sum(p.numel() for p in purifier.parameters()) == 552_814_086
    assert purifier.multiple == 32


def test_the_public_models_state_converts_whole():
    with torch.device("meta"):
        state = GuidedDiffusion((256, 256, 512, 512, 1024, 1024), 2, (3, 4, 5), 64).state_dict()
        purifier = DiffusionPurifier()
    assert len(state) == 566
    purifier.net.load_state_dict(convert_guided_diffusion(state), assign=True)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"channels": (32, 48)}, "multiples of 32"),
        ({"channels": ()}, "multiples of 32"),
        ({"channels": (32, 64), "attention": (2,), "head_dim": 32}, "levels 0 to 1"),
        ({"channels": (32, 64), "attention": (0,), "head_dim": 64}, "head_dim must divide"),
        ({"channels": (32, 96), "attention": (), "head_dim": 64}, "head_dim must divide"),
    ],
)
def test_sizes_are_checked(sizes, message):
    with pytest.raises(SettingError, match=message):
        DiffusionPurifier(**sizes)


def test_known_timesteps():
    assert [timestep(sigma).item() for sigma in (0.25, 0.5, 1.0)] == [145, 259, 396]
    assert timestep(torch.tensor([0.25, 0.5, 1.0])).tolist() == [145, 259, 396]
    assert timestep(0.0).item() == timestep(0.003).item() == 0, "below the first step's noise"


def test_the_timestep_is_the_first_that_is_strong_enough():
    for t in (0, 1, 145, 500, 999):
        assert timestep(LEVELS[t] / 2 * (1 - 1e-9)).item() == t
    for t in (0, 1, 145, 500, 998):
        assert timestep(LEVELS[t] / 2 * (1 + 1e-9)).item() == t + 1


@pytest.mark.parametrize("sigma", [LEVELS[-1] / 2 * 1.001, 1e9, -0.1, math.nan, math.inf])
@pytest.mark.parametrize("form", [float, torch.tensor, lambda sigma: torch.tensor([0.25, sigma])])
def test_a_sigma_out_of_the_schedule_is_refused_with_what_is_possible(sigma, form):
    with pytest.raises(SettingError, match=f"sigma from 0 to {LEVELS[-1] / 2:.2f}"):
        stubbed()(torch.rand(2, 3, 32, 32), form(sigma))


def test_one_sigma_per_image_or_one_for_all():
    purifier, images = stubbed(), torch.rand(3, 3, 32, 32)
    purifier(images, torch.tensor([0.25, 0.5, 1.0]))
    assert purifier.net.t.tolist() == [145, 259, 396]
    purifier(images, torch.tensor(0.5))
    assert purifier.net.t.tolist() == [259] * 3
    with pytest.raises(SettingError, match="one per image"):
        purifier(images, torch.tensor([0.25, 0.5]))


@pytest.mark.parametrize("size", [224, 256, 336])
@pytest.mark.parametrize("sigma", [0.25, 0.5])
def test_the_net_sees_the_noise_its_timestep_stands_for_at_every_resolution(size, sigma):
    x = photo(size, size)
    purifier = stubbed()
    purifier(x + sigma * gaussian(1, 3, size, size), sigma)
    t = purifier.net.t.item()
    scaled = purifier.net.seen / ABAR[t] ** 0.5
    padded = -size % 32
    clean = np.pad(x.numpy(), ((0, 0), (0, 0), (0, padded), (0, padded)), mode="symmetric")
    noise = scaled - (2 * torch.from_numpy(clean) - 1)
    assert scaled.shape[-2:] == (size + padded, size + padded)
    assert abs(noise.mean()) < 0.01 * sigma
    assert noise.std().item() == pytest.approx(2 * sigma, rel=0.01)
    assert LEVELS[t - 1] < 2 * sigma <= LEVELS[t]
    assert purifier.net.seen.square().mean() < 1.05, "variance preserved, not exploding"
    if padded:
        border = noise[..., size:, size:]
        assert border.std().item() == pytest.approx(2 * sigma, rel=0.1)
        ahead = torch.corrcoef(torch.stack([border[..., :-1].flatten(), border[..., 1:].flatten()]))[0, 1]
        assert abs(ahead) < 0.1, "no streaks in the mirrored border"


@pytest.mark.parametrize("size", [(64, 96), (37, 50), (336, 336), (5, 3), (1, 1), (33, 2)])
@pytest.mark.parametrize("sigma", [0.003, 0.25, 1.0])
def test_a_net_that_knows_the_noise_gives_the_clean_image(size, sigma):
    """Known answer: eps = (x_t - sqrt(abar) x_0) / sqrt(1 - abar) is the noise in x_t; x_0 must come back."""
    x = torch.cat([photo(*size), 1 - photo(*size)])
    pad = [(0, 0), (0, 0), *((0, -side % 32) for side in size)]
    x0 = torch.from_numpy(2 * np.pad(x.numpy(), pad, mode="symmetric") - 1)

    def true_noise(x_t: Tensor, t: Tensor) -> Tensor:
        abar = torch.from_numpy(ABAR)[t].view(-1, 1, 1, 1)
        return ((x_t.double() - abar.sqrt() * x0) / (1 - abar).sqrt()).float()

    purifier = stubbed(answer=true_noise)
    clean = purifier(x + sigma * gaussian(*x.shape), sigma)
    assert clean.shape == x.shape
    assert torch.allclose(clean, x, atol=1e-5)


def test_at_a_step_of_the_schedule_the_noise_is_the_one_that_smoothing_drew():
    x, e = photo(32, 32), gaussian(1, 3, 32, 32)
    sigma = LEVELS[145] / 2 * (1 - 1e-9)
    clean = stubbed(answer=lambda *_: e)(x + sigma * e, sigma)
    assert torch.allclose(clean, x, atol=1e-5)


def test_the_denoising_loss_is_the_squared_error_of_the_predicted_noise():
    x, e = photo(64, 32), gaussian(1, 3, 64, 32)
    purifier = stubbed(answer=lambda *_: 0.5 * e)
    loss = purifier.denoising_loss(x, e, torch.tensor([0.3999]))
    assert loss.item() == pytest.approx(e.square().mean().item() / 4, rel=1e-5)
    abar = ABAR[399]
    x_t = math.sqrt(abar) * (2 * x - 1) + math.sqrt(1 - abar) * e
    assert torch.allclose(purifier.net.seen, x_t, atol=1e-5)
    assert purifier.net.t.item() == 399


def test_only_the_noise_channels_count_and_the_result_is_clamped_in_eval_mode_alone():
    noisy = photo(32, 32) + 0.5 * gaussian(1, 3, 32, 32)
    purifier = stubbed()
    assert torch.allclose(purifier(noisy, 0.5), noisy.clamp(0, 1), atol=1e-6)
    assert torch.allclose(purifier.train()(noisy, 0.5), noisy, atol=1e-6)


@pytest.fixture(scope="module")
def purifier() -> DiffusionPurifier:
    return shaken(DiffusionPurifier(**SMALL))


@pytest.mark.parametrize("size", [(37, 50), (32, 32), (3, 5)])
def test_any_size_and_independent_images(purifier, size):
    images = torch.rand(3, 3, *size)
    sigmas = torch.tensor([0.1, 0.25, 0.5])
    with torch.no_grad():
        out = purifier(images, sigmas)
        alone = torch.cat([purifier(image[None], sigma.item()) for image, sigma in zip(images, sigmas, strict=True)])
    assert out.shape == images.shape
    assert out.min() >= 0
    assert out.max() <= 1
    assert torch.allclose(out, alone, atol=1e-4)


def test_sigma_conditions_the_net(purifier):
    images = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert not torch.allclose(purifier(images, 0.25), purifier(images, 0.3), atol=1e-3)


def test_gradients_reach_the_input_and_agree_with_differences():
    purifier = shaken(DiffusionPurifier(**SMALL)).double().train()
    images = torch.rand(1, 3, 6, 7, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (grad,) = torch.autograd.grad(purifier(images, 0.25).square().sum(), images)
    assert (grad != 0).all()
    h = 1e-5
    with torch.no_grad():
        ahead, behind = (purifier(images + s * h * direction, 0.25).square().sum() for s in (1, -1))
    assert ((ahead - behind) / (2 * h)).item() == pytest.approx((grad * direction).sum().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_serve_and_the_images_keep_theirs(purifier, dtype):
    halved = DiffusionPurifier(**SMALL).eval()
    halved.load_state_dict(purifier.state_dict())
    images = torch.rand(1, 3, 16, 16) + 0.25 * gaussian(1, 3, 16, 16)
    with torch.no_grad():
        exact, out = purifier(images, 0.25), halved.to(dtype)(images, 0.25)
        assert halved(images.to(dtype), 0.25).dtype == dtype
    assert out.dtype == torch.float32
    assert (out - exact).abs().mean() < 0.05
    assert not torch.equal(out, out.to(dtype).float()), "only the net works in half precision"


def test_it_survives_a_bundle(call, tmp_path):
    known = {"diffusion": DiffusionPurifier}
    config = make_psm(call).config.model_copy(update={"purifier": Part(kind="diffusion", args=SMALL)})
    psm = PSM(config, purifiers=known)
    shaken(psm.purifier)
    psm.save_pretrained(tmp_path / "psm")
    again = PSM.from_pretrained(tmp_path / "psm", purifiers=known)
    images = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(again.purify(images, 0.25), psm.purify(images, 0.25))
        assert not torch.allclose(psm.purify(images, 0.25), images, atol=1e-2)


def outputs(original: nn.Module, purifier: DiffusionPurifier, size: int) -> tuple[Tensor, Tensor]:
    x, t = gaussian(3, 3, size, size), torch.tensor([0, 145, 999])
    with torch.no_grad():
        return original(x, t), purifier.net(x, t).sample


@pytest.mark.parametrize(
    "sizes",
    [
        SMALL,
        {"channels": (32, 32, 96, 64), "layers": 1, "attention": (0, 2), "head_dim": 32},
        {"channels": (64,), "layers": 3, "attention": (), "head_dim": 8},
    ],
)
def test_a_converted_model_computes_what_the_original_does(sizes):
    original, purifier = shaken(GuidedDiffusion(**sizes), 1), DiffusionPurifier(**sizes).eval()
    purifier.net.load_state_dict(convert_guided_diffusion(original.state_dict(), **sizes))
    expected, found = outputs(original, purifier, 16)
    assert expected.std() > 0.1
    assert (expected - found).abs().max() < 1e-5 * expected.abs().max()


def test_the_other_qkv_order_is_another_model(original, monkeypatch):
    purifier = DiffusionPurifier(**SMALL).eval()
    purifier.net.load_state_dict(convert_guided_diffusion(original.state_dict(), **SMALL))
    monkeypatch.setattr(AttentionBlock, "legacy", False)
    expected, found = outputs(original, purifier, 16)
    assert (expected - found).abs().max() > 1e-2 * expected.abs().max()


def test_every_weight_arrives_and_only_attention_is_copied(original):
    state = original.state_dict()
    converted = convert_guided_diffusion(state, **SMALL)
    assert sum(v.numel() for v in converted.values()) == sum(v.numel() for v in state.values())
    shared = {v.data_ptr() for v in state.values()}
    copied = {name.split(".")[-2] for name, value in converted.items() if value.data_ptr() not in shared}
    assert copied == {"to_q", "to_k", "to_v"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("middle_block.1.qkv.bias"), r"\. missing: middle_block\.1\.qkv\.bias\. "),
        (lambda s: s.update({"label_emb.weight": torch.zeros(9, 9)}), r"\. unexpected: label_emb\.weight\. "),
        (lambda s: s.update({"out.2.bias": torch.zeros(3)}), r"out\.2\.bias \(3,\) instead of \(6,\)"),
        (
            lambda s: s.update({"middle_block.1.qkv.weight": torch.zeros(64, 192, 1)}),
            r"\(64, 192, 1\) instead of \(192, 64, 1\)",
        ),
        (lambda s: s.clear(), r"missing: .* and \d+ more"),
    ],
)  # fmt: skip
def test_states_that_do_not_fit_are_refused_by_name(original, change, message):
    state = dict(original.state_dict())
    change(state)
    with pytest.raises(PSMError, match=message):
        convert_guided_diffusion(state, **SMALL)


def test_a_state_of_other_sizes_is_refused(original):
    with pytest.raises(PSMError, match="missing: input_blocks"):
        convert_guided_diffusion(original.state_dict())
    with pytest.raises(PSMError, match="instead of"):
        convert_guided_diffusion(original.state_dict(), **{**SMALL, "channels": (32, 96, 64)})


@pytest.fixture
def checkpoint(original, tmp_path) -> Path:
    torch.save(original.state_dict(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_checkpoint_is_mapped_rather_than_copied_and_never_written(original, checkpoint):
    before = digest(checkpoint)
    purifier = load_guided_diffusion(checkpoint, sha256=before.upper(), **SMALL)
    assert not purifier.training
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(checkpoint) in maps.read_text(encoding="utf-8")
    assert not any(v.is_meta for v in purifier.state_dict().values())
    expected, found = outputs(original, purifier, 8)
    assert torch.allclose(expected, found, atol=1e-4)
    with torch.no_grad():
        for p in purifier.parameters():
            p.zero_()
    assert digest(checkpoint) == before


def test_a_checkpoint_of_another_digest_is_refused_before_it_is_parsed(checkpoint, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("parsed"))
    with pytest.raises(PSMError, match=f"SHA-256 is {digest(checkpoint)}, expected {'0' * 64}"):
        load_guided_diffusion(checkpoint, sha256="0" * 64, **SMALL)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(checkpoint, share):
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data[: int(share * len(data))])
    with pytest.raises(PSMError, match="Download it again"):
        load_guided_diffusion(checkpoint, **SMALL)


@pytest.mark.parametrize("data", [b"<html>404</html>", b"", b"\x80\x02garbage", b"PK\x03\x04" + bytes(200)])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, data):
    (tmp_path / "model.pt").write_bytes(data)
    with pytest.raises(PSMError, match="Download it again"):
        load_guided_diffusion(tmp_path / "model.pt", **SMALL)


@pytest.mark.parametrize("held", [[torch.zeros(3)], {"state_dict": {"out.2.bias": torch.zeros(6)}}, torch.zeros(3)])
def test_a_checkpoint_of_something_else_is_refused(tmp_path, held):
    torch.save(held, tmp_path / "model.pt")
    with pytest.raises(PSMError, match="dictionary of names to floating-point tensors"):
        load_guided_diffusion(tmp_path / "model.pt", **SMALL)


def test_a_checkpoint_from_before_the_zip_format_is_read(original, tmp_path):
    torch.save(original.state_dict(), tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    expected, found = outputs(original, load_guided_diffusion(tmp_path / "model.pt", **SMALL), 8)
    assert torch.allclose(expected, found, atol=1e-4)


def test_a_tar_is_refused_unread(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "model.pt", "w") as tar:
        tar.addfile(tarfile.TarInfo("storages"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("parsed"))
    with pytest.raises(PSMError, match="old tar format"):
        load_guided_diffusion(tmp_path / "model.pt", **SMALL)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(PSMError, match="No checkpoint at"):
        load_guided_diffusion(tmp_path / "model.pt")


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_refused_and_not_run(original, tmp_path, zipped):
    mark, path = tmp_path / "ran", tmp_path / "model.pt"
    torch.save({**original.state_dict(), "extra": Bomb(mark)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(PSMError):
        load_guided_diffusion(path, **SMALL)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the bomb is a live one"
