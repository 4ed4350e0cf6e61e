"""Where a PSM's files come from: the package, a folder, the Hugging Face hub or a URL; on this machine, and verified.

Nothing here parses what it fetches. What a URL gave is kept in ``cache()`` by its checksum.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException, HTTPResponse, HTTPSConnection
from io import BufferedReader, RawIOBase
from pathlib import Path
from time import monotonic
from typing import Any, Literal
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, build_opener

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from fs_plugins.errors import FSPluginsError, PSMError, RegistryError
from fs_plugins.fields import Count
from fs_plugins.files import filling, value

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "psm.safetensors"
PSM_FILES = (CONFIG_NAME, WEIGHTS_NAME)

CACHE = "FS_PLUGINS_CACHE"
"""Environment variable: the folder for what URLs gave, and for what was converted from it."""
OFFLINE = ("FS_PLUGINS_OFFLINE", "HF_HUB_OFFLINE")
"""Environment variables: while either is 1, nothing is fetched."""

_TIMEOUT = 60.0
_BLOCK = 1 << 20
_MOST = 4 << 30
_SLOWEST = 4096  # bytes a second
_ENDLESS = 64 << 30


class Source(BaseModel):
    """A PSM's config.json and psm.safetensors in one place, or one file, if ``path`` ends in .pt.

    Args:
        state: what ``path`` is. ``shipped``: ``package:...`` for inside fs_plugins, or relative to the registry file;
            ``folder``: a folder or file of this machine; ``hub``: owner/name; ``url``: https.
        revision: the commit on the hub; branches and tags can move.
        sha256: of the file, or of the two, one after the other.
        size: of the file or the two, in bytes; left out, at most 4 GiB are fetched.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    state: Literal["shipped", "folder", "hub", "url", "not trained yet"]
    path: str | None = None
    revision: str | None = None
    sha256: str | None = None
    size: Count | None = None

    @model_validator(mode="after")
    def _resolvable(self) -> Source:
        path = self.path or ""
        if not self.trained and (path or self.revision or self.sha256 or self.size):
            raise ValueError("what is 'not trained yet' has no path, revision, sha256 or size")
        if self.trained and not (path and re.fullmatch(r"[0-9a-f]{64}", self.sha256 or "")):
            raise ValueError("it needs path and sha256 (64 hexadecimal digits), or state: not trained yet")
        if self.state == "hub" and (not re.fullmatch(r"[\w.-]+/[\w.-]+(?<!\.pt)", path)):
            raise ValueError(f"the hub has owner/name, with a PSM's two files, not {path!r}")
        if self.state == "hub" and not re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            raise ValueError("the hub needs a revision that cannot move: the 40 hexadecimal digits of a commit")
        if self.state == "url":
            if not re.fullmatch(r"(https|file)://.+(/|\.pt)", path):
                raise ValueError("a url begins with https:// and ends in / (the folder of a PSM) or .pt (one file)")
            _check_address(path)
        return self

    @property
    def trained(self) -> bool:
        return self.state != "not trained yet"

    @property
    def names(self) -> tuple[str, ...]:
        """Its files."""
        return (str(self.path).rpartition("/")[2],) if self.one_file else PSM_FILES

    @property
    def one_file(self) -> bool:
        return str(self.path).endswith(".pt")

    def here(self, root: Path) -> Path | None:
        """The folder that has its files on this machine, unverified; None if it is elsewhere.

        Args:
            root: the registry's folder.
        """
        folder = None
        if self.state == "hub":
            from huggingface_hub import try_to_load_from_cache

            found = try_to_load_from_cache(str(self.path), CONFIG_NAME, revision=self.revision)
            folder = Path(found).parent if isinstance(found, str) else None
        elif self.state == "url":
            folder = cached(str(self.sha256))
        elif self.trained:
            place = resolve(str(self.path), root)
            folder = place.parent if self.one_file else place
        return folder if folder and all(os.path.isfile(folder / name) for name in self.names) else None

    def fetch(self, root: Path, what: str) -> Path:
        """The folder that has its files on this machine, their checksum compared just now; downloaded if need be.

        Args:
            root: the registry's folder.
            what: its name in errors.

        Raises:
            RegistryError: not here, and not to be had.
            PSMError: other bytes than those the checksum is of.
        """
        folder = self.here(root)
        found = checksum(folder, self.names) if folder else None
        remote = self.state in ("hub", "url")
        if folder is None or (found != self.sha256 and remote and not offline()):
            if not remote:
                raise RegistryError(f"{what} is not at {resolve(str(self.path), root)}. Reinstall it, or restore it.")
            if variable := offline():
                into = f" to {cache() / str(self.sha256)}" if self.state == "url" else ""
                raise RegistryError(
                    f"{what} is not on this machine, and while {variable} is set nothing is fetched. Unset it, or "
                    f"bring {' and '.join(self.names)} of {self.path}{into}."
                )
            again = folder is not None
            folder = (
                self._download(what) if self.state == "url" else _from_hub(str(self.path), self.revision, what, again)
            )
            found = checksum(folder, self.names)
        if found != self.sha256:
            raise PSMError(
                f"{what} in {folder} does not have the registry's checksum (found {found}, expected {self.sha256}): "
                "damaged, or changed by somebody. Restore it (reinstall, or fetch it again online); if the change is "
                "yours, use fs-plugins registry add --replace."
            )
        return folder

    def _download(self, what: str) -> Path:
        folder, place = cache() / str(self.sha256), str(self.path).rpartition("/")[0]
        digest, size, most = hashlib.sha256(), 0, self.size or _MOST
        try:
            with filling(folder) as fresh:
                for name in self.names:
                    with _reading(f"{place}/{name}", self.size) as blocks, (fresh / name).open("wb") as file:
                        for block in blocks:
                            file.write(block)
                            digest.update(block)
                            size += len(block)
                            if size > most:
                                break
                if self.size is None and size > most:
                    raise RegistryError(
                        f"{what}: {self.path} gave more than {most:,} bytes, which is the most that is taken where the "
                        "registry gives no size. Nothing of it is kept; if it is that large, give its size."
                    )
                if digest.hexdigest() != self.sha256 or self.size not in (None, size):
                    raise PSMError(
                        f"{what}: {self.path} gave {size:,} bytes with SHA-256 {digest.hexdigest()}, not "
                        f"{self.size or size:,} with {self.sha256}: broken off, damaged, or another file. Nothing "
                        "of it is kept; try again."
                    )
        except FSPluginsError:
            raise
        except (OSError, HTTPException, ValueError, OverflowError) as error:  # of odd hosts and ports, too
            raise RegistryError(
                f"{what} could not be fetched from {self.path}: {error}. Try again, or copy {' and '.join(self.names)} "
                f"to {folder}."
            ) from None
        return folder


def _check_address(url: str) -> None:
    """Refuse what is no address of a public place.

    Raises:
        ValueError: no host, a port that there is not, a user or a password, or characters that are not encoded.
    """
    if not (url.isascii() and url.isprintable()) or set(url) & set(' "<>\\^`{|}'):
        raise ValueError(f"a url has its special characters encoded (%20 for a blank); not so {url!r}")
    try:
        parts = urlsplit(url)
        if parts.username is not None or parts.password is not None:
            raise ValueError("it has a user or a password, which a registry does not keep")
        if parts.port == 0 or (parts.scheme == "https" and not parts.hostname):
            raise ValueError("it has no host, or the port 0")
        (parts.hostname or "").encode("idna")
    except ValueError as error:
        raise ValueError(f"that is no address: {error}") from None


class _OnlySecure(HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.lower().startswith("https://"):
            raise URLError(f"it redirects to {newurl}, which is not https")
        try:
            _check_address(newurl)
        except ValueError as error:
            raise URLError(f"it redirects to another place, and {error}") from None
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Paced(RawIOBase):
    """What a server sends, headers and all, as long as every minute brings something worth waiting for.

    Raises:
        OSError: it drips, or does not end.
    """

    def __init__(self, raw: Any) -> None:
        self._raw, self._since, self._lately, self._sent = raw, monotonic(), 0, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        count: int | None = self._raw.readinto(buffer)
        self._lately += count or 0
        self._sent += count or 0
        waited = monotonic() - self._since
        if count and waited > _TIMEOUT:
            if self._lately < _SLOWEST * waited:
                raise OSError(f"it sent {self._lately:,} bytes in {waited:.0f} seconds, too slow to go on with")
            self._since, self._lately = monotonic(), 0
        if self._sent > _ENDLESS:
            raise OSError(f"it sent {self._sent:,} bytes and no end")
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Answer(HTTPResponse):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.fp = BufferedReader(_Paced(self.fp.detach()))


class _Connection(HTTPSConnection):
    response_class = _Answer


class _OnePace(HTTPSHandler):
    def https_open(self, req: Any) -> Any:
        return self.do_open(_Connection, req)


def _open(url: str) -> Any:
    return build_opener(_OnlySecure, _OnePace).open(url, timeout=_TIMEOUT)


@contextmanager
def _reading(url: str, size: int | None) -> Iterator[Iterator[bytes]]:
    """What is at a URL, in blocks, with a progress bar on terminals."""
    from fs_plugins.terminal import watched

    hidden = not sys.stderr.isatty()
    with _open(url) as response, watched(response, size or 0, url.rpartition("/")[2], hidden=hidden) as stream:
        yield iter(lambda: stream.read(_BLOCK), b"")


def source_of(psm: str, sha256: str | None = None) -> Source:
    """Where a PSM is, as people write it: a folder, owner/name@commit on the hub, or a url that ends in /.

    Args:
        sha256: its checksum; left out, the one it has now. A url needs it.

    Raises:
        RegistryError: not pinned, not secure, or not to be had.
        PSMError: no PSM there.
    """
    facts = {"state": "folder", "path": str(Path(psm).absolute())}
    if "://" in psm:
        facts = {"state": "url", "path": psm}
    elif "@" in psm and not os.path.exists(psm):
        facts = dict(zip(("state", "path", "revision"), ("hub", *psm.split("@", 1)), strict=True))
    try:
        found = Source.model_validate({**facts, "sha256": sha256 or ("0" * 64 if facts["state"] != "url" else None)})
    except ValidationError as error:
        raise RegistryError(f"{psm!r}: {error.errors()[0]['msg']}.") from None
    return found if sha256 else found.model_copy(update={"sha256": checksum(psm_folder(facts["path"], found.revision))})


def psm_folder(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """A PSM's folder on this machine: ``source`` itself, or that of a hub repository, which need not be pinned.

    Raises:
        PSMError: nothing there, or files missing.
    """
    folder, text = Path(source), str(source)
    if os.path.isdir(folder):
        for name in PSM_FILES:
            if not (folder / name).is_file():
                raise PSMError(f"{folder} is no PSM folder: {name} is missing.")
        return folder
    if folder.is_absolute() or text.startswith(".") or text.count("/") != 1:
        raise PSMError(f"No PSM folder at {text!r} (and that is no hub id of the form owner/name).")
    try:
        return _from_hub(text, revision, repr(text))
    except RegistryError as error:
        raise PSMError(f"There is no folder {text!r}. {error}") from None


def _from_hub(repository: str, revision: str | None, what: str, again: bool = False) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    options: dict[str, Any] = {"local_files_only": offline() is not None, "force_download": again}
    try:
        for name in PSM_FILES:
            folder = Path(hf_hub_download(repository, name, revision=revision, **options)).parent
            revision = folder.name  # the commit: both files are of one
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise RegistryError(f"The hub did not give {what}: {error}") from None
    return folder


def weights(folder: Path) -> Path:
    """The weights that a PSM folder's config.json speaks of: psm.safetensors, or those from before, where a save was
    killed after it had put new ones there and before it came to config.json.
    """
    spare = next(folder.glob(f".{WEIGHTS_NAME}-*"), None) and spare_weights(folder)
    return spare if spare and spare.is_file() else folder / WEIGHTS_NAME


def spare_weights(folder: Path) -> Path | None:
    """Where a save keeps the weights that config.json speaks of until it has replaced both; None if it names none."""
    try:
        sha256 = value(folder / CONFIG_NAME)["weights_sha256"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return folder / f".{WEIGHTS_NAME}-{sha256}" if re.fullmatch("[0-9a-f]{64}", str(sha256)) else None


def checksum(folder: Path, names: Sequence[str] = PSM_FILES) -> str:
    """SHA-256 over a PSM folder's config.json and psm.safetensors, in this order, or over other files of a folder."""
    digest = hashlib.sha256()
    for name in names:
        if not (folder / name).is_file():
            raise PSMError(f"{folder} is no PSM folder: {name} is missing.")
        with (weights(folder) if name == WEIGHTS_NAME else folder / name).open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def cache() -> Path:
    """FS_PLUGINS_CACHE, or fs-plugins in the platform's folder for caches.

    Raises:
        RegistryError: that would be in a home directory, and nobody knows where it is.
    """
    if given := os.environ.get(CACHE):
        return at_home(given).absolute()
    usual = {"win32": os.environ.get("LOCALAPPDATA"), "darwin": "~/Library/Caches"}.get(sys.platform)
    return at_home(usual or os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fs-plugins"


def cached(name: str) -> Path | None:
    """A folder in the cache; None if it is not there, or there is no place for a cache."""
    with suppress(RegistryError):
        if os.path.isdir(folder := cache() / name):  # unlike Path's, False also where one may not look
            return folder
    return None


def at_home(path: str) -> Path:
    """A path whose ~ is the home directory.

    Raises:
        RegistryError: there is none, as for a user that the system does not know.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise RegistryError(
            f"No home directory is known for {path}. Set HOME, or give a whole path ({CACHE} for the cache)."
        ) from None


def offline() -> str | None:
    """The environment variable that forbids to fetch anything, if one does."""
    return next((name for name in OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")), None)


def resolve(path: str, root: Path) -> Path:
    """A path in a registry file that lies in ``root``; ``package:`` is fs_plugins' own folder."""
    if path.startswith("package:"):
        return Path(__file__).parent / path.removeprefix("package:")
    return root / at_home(path)
