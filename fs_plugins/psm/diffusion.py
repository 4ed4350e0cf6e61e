"""The diffusion purifier: OpenAI's 256x256 unconditional guided-diffusion model, denoising in one step.

``DiffusionPurifier`` is the main purifier of the paper (arXiv 2601.16200) with the one-step rule of Carlini et al.
(arXiv 2206.10550): the noise that smoothing added is taken for the diffusion's own, at the step where the two are
equally strong. ``load_guided_diffusion`` reads the public checkpoint ``256x256_diffusion_uncond.pt``.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fs_plugins.checks import whole
from fs_plugins.errors import PSMError, SettingError
from fs_plugins.psm.purifier import check_multiple, depth, unet_class, widths

_GROUPS = 32


def _schedule() -> Tensor:
    """sqrt((1 - abar_t) / abar_t) for t = 0 to 999, fp64: the noise beside a picture in [-1, 1], linear schedule."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device="cpu")
    abar = (1 - betas).cumprod(0)
    return ((1 - abar) / abar).sqrt()


_LEVELS = _schedule()


class DiffusionPurifier(nn.Module):
    """A guided-diffusion U-Net (diffusers ``UNet2DModel``) as a purifier, for images of any size.

    The defaults are the public model: 552,814,086 parameters; build it under ``torch.device("meta")`` where only its
    shape is needed. Its precision is free (``purifier.half()``): images come back in their own dtype.

    The net runs at the images' own resolution, since resizing would average the noise away and the step chosen for
    ``sigma`` would be wrong. Sides are mirrored up to multiples of 2^(levels - 1), 32 for the public model: a mirror
    image has the picture's own statistics and noise of the right strength, where repeated pixels make streaks and
    zeros carry no noise; through normalisation and attention those harm the whole image, not the border alone.

    Args:
        channels: widths from the finest to the coarsest level, multiples of 32.
        layers: residual blocks a level on the way down (one more on the way up).
        attention: levels with self-attention, 0 the finest; the middle block always has it.
        head_dim: width of an attention head.

    Raises:
        SettingError: widths that the groups or heads do not divide, or a level that is not there.
    """

    def __init__(
        self,
        *,
        channels: Iterable[int] = (256, 256, 512, 512, 1024, 1024),
        layers: int = 2,
        attention: Iterable[int] = (3, 4, 5),
        head_dim: int = 64,
    ) -> None:
        super().__init__()
        channels = widths("DiffusionPurifier.channels", channels, _GROUPS)
        layers = depth("DiffusionPurifier.layers", layers)
        attention = frozenset(whole("DiffusionPurifier.attention", level, least=0) for level in attention)
        check_multiple(len(channels))
        levels = range(len(channels))
        if not attention <= set(levels):
            raise SettingError(
                f"DiffusionPurifier.attention names levels 0 to {levels[-1]} of channels {channels}, "
                f"got {sorted(attention)}."
            )
        head_dim = whole("DiffusionPurifier.head_dim", head_dim)
        if any(channels[level] % head_dim for level in attention | {levels[-1]}):
            raise SettingError(
                f"DiffusionPurifier.head_dim must divide the widths of the levels with attention and of the last; "
                f"{head_dim} does not for channels {channels} with attention at {sorted(attention)}."
            )
        self.layers = layers
        self.head_dim = head_dim
        self.attention = attention
        self.multiple = 2 ** levels[-1]
        self.net: Any = unet_class()(
            in_channels=3,
            out_channels=6,
            block_out_channels=channels,
            down_block_types=["AttnDownBlock2D" if i in attention else "ResnetDownsampleBlock2D" for i in levels],
            up_block_types=["AttnUpBlock2D" if i in attention else "ResnetUpsampleBlock2D" for i in reversed(levels)],
            layers_per_block=layers,
            attention_head_dim=head_dim,
            norm_num_groups=_GROUPS,
            attn_norm_num_groups=_GROUPS,
            resnet_time_scale_shift="scale_shift",
            downsample_type="resnet",
            upsample_type="resnet",
        )

    def forward(self, images: Tensor, sigma: float | Tensor) -> Tensor:
        """(N, 3, H, W) noisy images (unclamped) -> (N, 3, H, W) purified images, clamped to [0, 1] in eval mode.

        Args:
            images: y = x + sigma e in [0, 1] pixel units. No noise is added here.
            sigma: standard deviation of the noise in ``images``, one for all or (N,) one for each.

        Raises:
            SettingError: a sigma that the diffusion's schedule does not reach; see ``timestep``.
        """
        height, width = images.shape[-2:]
        y = images.to(torch.promote_types(images.dtype, torch.float32))
        y = 2 * _mirror(y, self.multiple) - 1
        if isinstance(sigma, Tensor) and sigma.shape not in ((), (len(images),)):
            raise SettingError(f"sigma must be a number or ({len(images)},), one per image; got {tuple(sigma.shape)}.")
        t = timestep(sigma).expand(len(images))
        level = _LEVELS[t].to(y.dtype).to(y.device).view(-1, 1, 1, 1)
        x_t = y / (1 + level.square()).sqrt()  # sqrt(abar_t) y
        # Channels 3 to 5 are the learned variance, which one step has no use for.
        eps = self.net(x_t.to(self.net.dtype), t.to(y.device)).sample[:, :3].to(y.dtype)
        clean = (y - level * eps + 1)[..., :height, :width] / 2
        return (clean if self.training else clean.clamp(0, 1)).to(images.dtype)

    def denoising_loss(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """l_diff: mean squared error of the predicted noise, as diffusion models are trained (Ho et al. 2020, eq. 14).

        Args:
            clean: (N, 3, H, W) in [0, 1].
            noise: standard normal, of the same shape.
            level: (N,) in [0, 1), which of the schedule's steps.
        """
        x, e = (_mirror(part.float(), self.multiple) for part in (2 * clean - 1, noise))
        t = (level.cpu() * len(_LEVELS)).long()
        at = _LEVELS[t].to(x.dtype).to(x.device).view(-1, 1, 1, 1)
        x_t = (x + at * e) / (1 + at.square()).sqrt()
        eps = self.net(x_t.to(self.net.dtype), t.to(x.device)).sample[:, :3].to(x.dtype)
        return (eps - e).square().mean()


def timestep(sigma: float | Tensor) -> Tensor:
    """The first step t, from 0, whose noise is at least that of ``sigma``: sqrt((1 - abar_t) / abar_t) >= 2 sigma.

    Twice sigma because the diffusion's pixels are in [-1, 1], and sigma is in [0, 1] pixel units.

    Returns:
        int64 on the CPU, of sigma's shape.

    Raises:
        SettingError: a sigma that is negative, no number, or beyond the last step.
    """
    given = (
        sigma.detach().cpu().double()
        if isinstance(sigma, Tensor)
        else torch.tensor(sigma, dtype=torch.float64, device="cpu")
    )
    noise = 2 * given
    t = torch.searchsorted(_LEVELS, noise)
    if (noise < 0).any() or (t == len(_LEVELS)).any():
        raise SettingError(
            f"sigma = {sigma} is out of the diffusion purifier's reach: "
            f"its schedule covers sigma from 0 to {_LEVELS[-1] / 2:.2f} in [0, 1] pixel units."
        )
    return t


def _mirror(images: Tensor, multiple: int) -> Tensor:
    """Continue (N, C, H, W) symmetrically to the next multiples on the right and below, however small the images."""
    for dim in (-2, -1):
        size = images.shape[dim]
        if size % multiple:
            index = torch.arange(size + -size % multiple, device=images.device) % (2 * size)
            images = images.index_select(dim, torch.minimum(index, 2 * size - 1 - index))
    return images


def convert_guided_diffusion(state: Mapping[str, Tensor], **sizes: Any) -> dict[str, Tensor]:
    """A guided-diffusion state dictionary -> the names and shapes of diffusers' ``UNet2DModel``.

    Args:
        state: in openai/guided-diffusion's layout, with attention in its legacy order, as the 256x256 models have it
            (trained without ``use_new_attention_order``; a state does not tell).
        sizes: arguments of ``DiffusionPurifier``; none for the public model.

    Returns:
        A state dictionary for ``DiffusionPurifier(**sizes).net``. Tensors are shared with ``state`` but for q, k and v.

    Raises:
        PSMError: keys missing, left over or of another shape, with their names.
    """
    with torch.device("meta"):
        return _convert(state, DiffusionPurifier(**sizes))


def load_guided_diffusion(
    path: str | os.PathLike[str], *, sha256: str | None = None, **sizes: Any
) -> DiffusionPurifier:
    """Read a public guided-diffusion checkpoint (``.pt``) into a purifier, in eval mode.

    Only tensors are read; code that a pickle may bear is refused, not run. The weights stay mapped from the file
    (no copy in memory), so leave it in place while they are in use on the CPU; changing them does not write to it.

    Args:
        path: of the file.
        sha256: its expected digest in hexadecimal, compared before anything is parsed.
        sizes: arguments of ``DiffusionPurifier``; none for the public model.

    Raises:
        PSMError: no such file, another digest, no checkpoint, or one of another architecture.
    """
    path = Path(path)
    if not path.is_file():
        raise PSMError(f"No checkpoint at {path}; download it first (see openai/guided-diffusion on GitHub).")
    if sha256 is not None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256.lower():
            raise PSMError(f"{path} is damaged: its SHA-256 is {found}, expected {sha256}. Download it again.")
    with torch.device("meta"):
        purifier = DiffusionPurifier(**sizes)
    purifier.net.load_state_dict(_convert(_read(path), purifier), assign=True)
    return purifier.eval()


def _read(path: Path) -> dict[str, Tensor]:
    zipped = zipfile.is_zipfile(path)
    if not zipped and tarfile.is_tarfile(path):
        # Before torch 2.6 its reader ran code in spite of weights_only (CVE-2025-32434).
        raise PSMError(f"{path} is in PyTorch's old tar format, which is not read: it can bear code.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError:
        raise PSMError(
            f"{path} holds something other than tensors, or is damaged; no code in it was run. "
            "Download it again from its publisher."
        ) from None
    except Exception as error:  # what a damaged file raises depends on where the damage is
        reason = str(error).partition("\n")[0]
        raise PSMError(
            f"{path} is no PyTorch checkpoint, or is damaged ({type(error).__name__}: {reason}). Download it again."
        ) from None
    if not isinstance(state, Mapping) or not all(_is_weight(value) for value in state.values()):
        raise PSMError(f"{path} must hold a dictionary of names to floating-point tensors, and nothing else.")
    return dict(state)


def _is_weight(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _convert(state: Mapping[str, Tensor], purifier: DiffusionPurifier) -> dict[str, Tensor]:
    blocks = _original_blocks(purifier)
    likes = purifier.net.state_dict()
    keys = {name: _original(name, blocks) for name in likes}
    shapes = {keys[name]: _original_shape(name, like.shape) for name, like in likes.items()}
    problems = {
        "missing": shapes.keys() - state.keys(),
        "unexpected": state.keys() - shapes.keys(),
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {shape}"
            for key, shape in shapes.items()
            if key in state and state[key].shape != shape
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{what}: {_listed(names)}" for what, names in problems.items() if names)
        raise PSMError(
            f"These are not the weights of a guided-diffusion model of the sizes expected here. {found}. "
            "Give the sizes of the model as arguments if they are not the public 256x256 one's."
        )
    return {name: _part(name, state[keys[name]], purifier.head_dim).reshape(like.shape) for name, like in likes.items()}


_ATTENTION_PART = re.compile(r"\.to_([qkv])\.")

_LEAVES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "group_norm": "norm",
    "to_q": "qkv",
    "to_k": "qkv",
    "to_v": "qkv",
    "to_out.0": "proj_out",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}


def _original_blocks(purifier: DiffusionPurifier) -> dict[str, str]:
    """diffusers' blocks -> guided-diffusion's, which count through all levels, resampling included."""
    levels, layers = range(len(purifier.net.down_blocks)), purifier.layers
    blocks = dict(_ENDS)
    n = 1
    for i in levels:
        for j in range(layers):
            blocks[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{n}.0"
            blocks[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{n}.1"
            n += 1
        if i < levels[-1]:
            blocks[f"down_blocks.{i}.downsamplers.0"] = f"input_blocks.{n}.0"
            n += 1
    n = 0
    for i, level in enumerate(reversed(levels)):
        for j in range(layers + 1):
            blocks[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{n}.0"
            blocks[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{n}.1"
            n += 1
        blocks[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{n - 1}.{2 if level in purifier.attention else 1}"
    return blocks


def _original(name: str, blocks: Mapping[str, str]) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem in blocks:
        return f"{blocks[stem]}.{kind}"
    block = next(block for block in blocks if stem.startswith(block + "."))
    return f"{blocks[block]}.{_LEAVES[stem[len(block) + 1 :]]}.{kind}"


def _original_shape(name: str, shape: torch.Size) -> tuple[int, ...]:
    """Attention is a convolution over positions there, with q, k and v in one."""
    triple = 3 if _ATTENTION_PART.search(name) else 1
    position = (1,) if ".attentions." in name and len(shape) == 2 else ()
    return (triple * shape[0], *shape[1:], *position)


def _part(name: str, value: Tensor, head_dim: int) -> Tensor:
    """q, k or v out of the three, which are interleaved head by head (the "legacy" order); else the value itself."""
    part = _ATTENTION_PART.search(name)
    if part is None:
        return value
    return value.unflatten(0, (-1, 3, head_dim))[:, "qkv".index(part[1])]


def _listed(names: Iterable[str], most: int = 6) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more
