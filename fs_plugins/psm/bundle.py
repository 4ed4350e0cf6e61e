"""A PSM on disk and in memory: one purifier, a mapper per readout, and what they were made for."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import reprlib
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from fs_plugins.checks import whole
from fs_plugins.errors import FSPluginsError, PSMError, SettingError
from fs_plugins.fields import Count, Level, Number, Whole
from fs_plugins.files import atomically, real, replace, value, writing
from fs_plugins.psm import card, hub
from fs_plugins.psm.diffusion import DiffusionPurifier
from fs_plugins.psm.lora import LoRAPurifier
from fs_plugins.psm.mapper import ResidualMapper
from fs_plugins.psm.protocols import Mapper, Purifier
from fs_plugins.psm.purifier import BottleneckPurifier, CascadePurifier, UNetPurifier
from fs_plugins.sources import CONFIG_NAME, PSM_FILES, WEIGHTS_NAME, psm_folder, spare_weights, weights

if TYPE_CHECKING:
    from fs_plugins.vision import VisionCall


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Part(_Strict):
    """A purifier or a mapper by its registered kind, with its constructor's arguments."""

    kind: str
    args: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def cascade(cls, parts: Sequence[Part], times: int = 1) -> Part:
        """Several purifiers one after the other as one; a single one stays itself, unless it has several turns.

        Args:
            times: how often all of them have their turn, with the same weights.

        Raises:
            SettingError: there is none, or no turn.
        """
        if not parts:
            raise SettingError("A cascade of purifiers has at least one; None leaves the purifier out.")
        if (times := whole("times (turns of the purifier)", times)) * len(parts) == 1:
            return parts[0]
        repeated = {"times": times} if times > 1 else {}
        return cls(kind=CASCADE, args={"parts": [part.model_dump() for part in parts], **repeated})


class ReadoutSpec(_Strict):
    """The readout that a mapper was trained for."""

    name: str
    width: Count
    tokens: Annotated[Whole, Field(ge=0)]
    mapper: Part


class PSMConfig(_Strict):
    """What ``config.json`` holds. ``sigma`` is in [0, 1] pixel units.

    A PSM without mappers may serve images of any size (``image_size`` None), any encoder (``fingerprint`` empty), and
    pictures without noise (0).
    """

    format: Literal["fs-plugins-psm-1"] = "fs-plugins-psm-1"
    name: str
    sigma: Level
    sigma_range: tuple[Level, Level]
    image_size: tuple[Count, Count] | None
    purifier: Part | None
    readouts: Annotated[tuple[ReadoutSpec, ...], Field(max_length=32)] = ()
    encoder: str
    fingerprint: tuple[Number, ...]
    weights_sha256: str | None = None

    @model_validator(mode="after")
    def _ordered(self) -> PSMConfig:
        low, high = self.sigma_range
        if not low <= self.sigma <= high:
            raise ValueError(f"sigma_range {self.sigma_range} must hold sigma {self.sigma}")
        if self.readouts and low == 0:
            raise ValueError(f"a mapper refines features of noisy pictures: sigma_range {self.sigma_range} holds 0")
        if self.readouts and not (self.image_size and self.fingerprint):
            raise ValueError("a mapper belongs to one encoder: it needs image_size and fingerprint")
        return self

    @property
    def structure(self) -> str:
        """What the parts compute beside their weights, as JSON; where a file lies plays no part."""
        parts = self.model_dump(mode="json", include={"purifier", "readouts"})
        if self.purifier is not None:
            for one in (parts["purifier"], *parts["purifier"]["args"].get("parts", ())):
                one["args"].pop("base", None)  # LoRA's; its digest is another argument
        return json.dumps(parts, sort_keys=True)


_default_type = threading.RLock()


@contextmanager
def plainly(device: str = "cpu") -> Iterator[None]:
    """Inside, modules are made in fp32 on this device, whatever torch's default type and device are.

    The type is the whole process's, so one thread at a time is inside, and puts back what it found.
    """
    with _default_type:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with torch.device(device):
                yield
        finally:
            torch.set_default_dtype(before)


CASCADE = "cascade"
_PURIFIERS: dict[str, type[nn.Module]] = {
    "unet": UNetPurifier,
    "bottleneck": BottleneckPurifier,
    "diffusion": DiffusionPurifier,
    "lora": LoRAPurifier,
}
_COUNTED = (UNetPurifier, BottleneckPurifier, DiffusionPurifier, ResidualMapper)
_LONGEST = 8
_MAPPERS: dict[str, type[nn.Module]] = {"residual": ResidualMapper}
_MOST_PARAMETERS = 1 << 30
_MOST_CONFIG = 1 << 20


def _build(part: Part, known: dict[str, type[nn.Module]], what: str) -> nn.Module:
    if part.kind == CASCADE and known.keys() >= _PURIFIERS.keys():
        return _cascade(part, known)
    if part.kind not in known:
        raise PSMError(
            f"No {what} of kind {part.kind!r} is known; known are {sorted(known)}. Is the plugin that provides it "
            "installed?"
        )
    kind = known[part.kind]
    try:
        if kind in _COUNTED:
            with torch.device("meta"):  # before memory is taken for it
                count = sum(p.numel() for p in kind(**part.args).parameters())
            if count > _MOST_PARAMETERS:
                raise PSMError(f"it would have {count:,} parameters, and at most {_MOST_PARAMETERS:,} are built.")
            return kind(**part.args)
        in_hand = not torch.empty(0, dtype=torch.float32, device=None).is_meta
        with nullcontext() if in_hand else torch.device("cpu"):  # it may hold more than its file has
            return kind(**part.args)
    except FSPluginsError as error:
        raise PSMError(f"The {what} {part.kind!r} cannot be built: {error}") from None
    except Exception as error:  # what wrong numbers raise depends on where the constructor meets them
        raise PSMError(
            f"The {what} {part.kind!r} does not take the arguments {reprlib.repr(part.args)}: {error}."
        ) from error


def _cascade(part: Part, known: dict[str, type[nn.Module]]) -> nn.Module:
    """Several purifiers one after the other, of any kinds but this one."""
    given, times = part.args.get("parts"), part.args.get("times", 1)
    try:
        if part.args.keys() - {"times"} != {"parts"} or not isinstance(given, list) or not given:
            raise ValueError
        if whole("times", times) * len(given) > _LONGEST:
            raise ValueError
        parts = [Part.model_validate(one) for one in given]
    except (ValueError, SettingError):
        raise PSMError(
            "A cascade of purifiers has parts, a list of purifiers, each with kind and args, and may have times, how "
            f"often they have their turn, {_LONGEST} turns in all; got {reprlib.repr(part.args)}."
        ) from None
    if any(one.kind == CASCADE for one in parts):
        raise PSMError("A cascade of purifiers holds no other cascade; list all its purifiers in one.")
    return CascadePurifier([_build(one, known, "purifier") for one in parts], times)


class PSM(nn.Module):
    """Purifier and smoothness mapper for one encoder (also called GSB in later versions of the paper).

    Args:
        config: what it is made for.
        purifiers, mappers: constructors by kind, beside the built-in ones (from plugins).
    """

    def __init__(
        self,
        config: PSMConfig,
        *,
        purifiers: dict[str, type[nn.Module]] | None = None,
        mappers: dict[str, type[nn.Module]] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.purifying: torch.dtype | None = None
        """A lower precision that the purifier works in, for the speed of it; None is its own."""
        self.purifier: nn.Module | None = None
        if config.purifier is not None:
            self.purifier = _build(config.purifier, _PURIFIERS | (purifiers or {}), "purifier")
        known = _MAPPERS | (mappers or {})
        self.mappers = nn.ModuleList(_build(spec.mapper, known, "mapper") for spec in config.readouts)
        self.eval().requires_grad_(False)

    @property
    def mapped(self) -> tuple[str, ...]:
        """Names of the readouts that have a mapper."""
        return tuple(spec.name for spec in self.config.readouts)

    def purify(self, images: Tensor, sigma: float) -> Tensor:
        """(N, C, H, W) noisy images -> purified images; unchanged without a purifier."""
        if self.purifier is None:
            return images
        with torch.autocast(images.device.type, self.purifying) if self.purifying else nullcontext():
            return _at_most_fp32(self.purifier, images, sigma)

    def map(self, readout: str, feature: Tensor, sigma: float) -> Tensor:
        """A readout's feature -> the refined feature; unchanged where the readout has no mapper."""
        if readout not in self.mapped:
            return feature
        return _at_most_fp32(self.mappers[self.mapped.index(readout)], feature, sigma)

    def only(self, *, purifier: bool = True, mapper: bool = True) -> PSM:
        """A copy that keeps just these parts (ablation)."""
        part = copy.deepcopy(self)
        if not purifier:
            part.purifier = None
            part.config = part.config.model_copy(update={"purifier": None})
        if not mapper:
            part.mappers = nn.ModuleList().eval()
            part.config = part.config.model_copy(update={"readouts": ()})
        return part

    def check(self, call: VisionCall, sigma: float) -> None:
        """Refuse to serve an encoder, readout, resolution or sigma this PSM was not made for.

        Raises:
            PSMError: with both sides of what does not fit.
        """
        config = self.config
        if config.image_size and call.image_size and config.image_size != call.image_size:
            raise PSMError(
                f"PSM {config.name!r} was trained at {_size(config.image_size)} pixels, "
                f"this encoder sees {_size(call.image_size)}. Train a PSM at this resolution, or pass psm=None."
            )
        channels = len(call.pixels.mean)
        if self.purifier is not None and channels != 3:
            raise PSMError(
                f"Purifiers take RGB images; this encoder's pixels have {channels} channels. Pass psm=None and a sigma."
            )
        low, high = config.sigma_range
        if not low - 1e-9 <= sigma <= high + 1e-9:
            covers = f"sigma = {low:g}" if low == high else f"sigma from {low:g} to {high:g}"
            raise PSMError(
                f"PSM {config.name!r} was trained for {covers}, not for {sigma:g}. Leave sigma out to use the "
                "PSM's own, train one for this sigma, or pass psm=None for plain smoothing."
            )
        served = {readout.name: readout for readout in call.readouts}
        for spec in config.readouts:
            readout = served.get(spec.name)
            if readout is None:
                raise PSMError(
                    f"PSM {config.name!r} maps readout {spec.name!r}; this model consumes {', '.join(served)}. "
                    "A mapper fits one readout: take the PSM of this model's readout."
                )
            tokens = spec.tokens if readout.tokens is None else readout.tokens
            if (spec.width, spec.tokens) != (readout.width, tokens):
                raise PSMError(
                    f"PSM {config.name!r} maps {spec.name!r} of {_shape(spec.tokens, spec.width)}; "
                    f"this model's is {_shape(tokens, readout.width)}."
                )

    def files(self, *, dtype: torch.dtype | None = None) -> dict[str, bytes]:
        """What ``psm.safetensors`` and then ``config.json`` hold, by their names; see ``save_pretrained``."""
        state = {name: value.detach().to("cpu", dtype).contiguous() for name, value in self.state_dict().items()}
        data = save(state, metadata={"format": "pt"})
        config = self.config.model_copy(update={"weights_sha256": _sha256(data)})
        return {WEIGHTS_NAME: data, CONFIG_NAME: f"{config.model_dump_json(indent=2)}\n".encode()}

    def save_pretrained(self, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
        """Write ``config.json`` and ``psm.safetensors``; what else is in the folder stays. A link is written through.

        Whenever it is stopped, ``from_pretrained`` finds the old PSM or the new one.

        ``dtype=torch.float16`` halves the file; weights are loaded as fp32 whatever they are stored as.

        Raises:
            PSMError: the folder is a file, or holds something other than a PSM.
            OutputError: it cannot be written.
        """
        target = _place(folder)
        contents = self.files(dtype=dtype)
        with writing(target):
            _write(target, contents)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> str:
        """Save it in a repository of the Hugging Face hub, which is made if need be, in one commit.

        ``from_pretrained(repo_id)`` loads it from there. A repository without a README.md gets a short one. A folder
        that ``fs-plugins train`` wrote is pushed with its card by ``fs-plugins registry push``.

        Args:
            repo_id: owner/name.
            private: whether a repository that is made is; left out, as its owner has it.
            token: of the hub; left out, the one of the login.
            revision: a branch, made if need be; left out, ``main``.
            commit_message: what is said of the commit.
            dtype: as for ``save_pretrained``.

        Returns:
            owner/name@commit, as ``fs-plugins registry add`` takes it.

        Raises:
            SettingError: no such name, nobody is logged in, or who is may not write there.
            OutputError: the hub did not take it; the repository is as it was, or new and empty.
        """
        to = hub.Repository(repo_id, private, token, revision)
        with tempfile.TemporaryDirectory(prefix="fs-plugins-") as folder:
            self.save_pretrained(folder, dtype=dtype)
            return to.upload(Path(folder), PSM_FILES, commit_message, card.short(self.config, repo_id))

    @classmethod
    @torch.inference_mode(False)  # weights made in the mode would let no gradient through, ever
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        purifiers: dict[str, type[nn.Module]] | None = None,
        mappers: dict[str, type[nn.Module]] | None = None,
    ) -> PSM:
        """Load a PSM from a folder, or from a Hugging Face hub repository (``revision`` pins it).

        The weights' SHA-256 is compared with the one in ``config.json`` before they are parsed.

        Raises:
            PSMError: no such folder, a config that breaks the schema, or damaged weights.
        """
        folder = psm_folder(source, revision)
        config = _configuration(folder / CONFIG_NAME)
        data = weights(folder).read_bytes()
        if config.weights_sha256 != _sha256(data):
            raise PSMError(
                f"{folder / WEIGHTS_NAME} is damaged: its SHA-256 is {_sha256(data)}, "
                f"config.json says {config.weights_sha256}. Fetch or train it again."
            )
        with plainly("meta"):  # no random weights are made where the file has them
            psm = cls(config, purifiers=purifiers, mappers=mappers)
        try:
            psm.load_state_dict({name: value.to(torch.float32) for name, value in load(data).items()}, assign=True)
        except (RuntimeError, SafetensorError) as error:
            raise PSMError(
                f"{folder / WEIGHTS_NAME} does not hold the weights config.json describes: {str(error)[:1000]}"
            ) from None
        return psm


def _configuration(path: Path) -> PSMConfig:
    if path.stat().st_size > _MOST_CONFIG:
        raise PSMError(f"{path} is not a PSM configuration: it is longer than {_MOST_CONFIG:,} bytes.")
    try:
        return PSMConfig.model_validate(value(path))
    except ValidationError as error:
        raise PSMError(f"{path} is not a PSM configuration: {_first(error)}") from None
    except ValueError as error:
        raise PSMError(f"{path} is not a PSM configuration: {error}.") from None


def _place(folder: str | os.PathLike[str]) -> Path:
    """The folder to save in, where links lead."""
    target = real(folder)
    if os.path.lexists(target) and not target.is_dir():
        raise PSMError(f"{folder} is no folder, nor leads to one; give another.")
    others = [item.name for item in target.glob("[!.]*") if item.name not in PSM_FILES] if target.is_dir() else []
    if others and not (target / CONFIG_NAME).exists():
        raise PSMError(f"{folder} exists and is not a PSM folder; choose another or empty it.")
    return target


def _write(target: Path, contents: Mapping[str, bytes]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    spare = spare_weights(target)
    if spare and (target / WEIGHTS_NAME).is_file() and not spare.exists():
        _link(target / WEIGHTS_NAME, spare)
    try:
        for name, data in contents.items():
            replace(target / name, data)
    except BaseException:
        if spare and spare.exists() and spare == spare_weights(target):  # the old configuration is there
            os.replace(spare, target / WEIGHTS_NAME)
        raise
    for left in target.glob(f".{WEIGHTS_NAME}-{'?' * 64}"):
        left.unlink(missing_ok=True)


def _link(old: Path, new: Path) -> None:
    """The same file by another name, or a copy where the file system has one name for each."""
    try:
        os.link(old, new)
    except OSError:
        with old.open("rb") as source:
            atomically(new, lambda file: shutil.copyfileobj(source, file))


def _at_most_fp32(part: Purifier | Mapper, value: Tensor, sigma: float) -> Tensor:
    """A part's answer in the value's type; parts do not work in fp64, encoders may."""
    return part(value.float(), sigma).double() if value.dtype == torch.float64 else part(value, sigma)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _first(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(map(str, problem["loc"])) or "the file"
    return f"{where}: {problem['msg']}"


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _shape(tokens: int, width: int) -> str:
    return f"{tokens} tokens of width {width}" if tokens else f"a pooled vector of width {width}"
