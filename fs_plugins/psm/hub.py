"""A folder's way to the Hugging Face hub: name, login and rights are checked first, then it goes up in one commit.

Nothing here parses what it sends.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fs_plugins.errors import OutputError, SettingError
from fs_plugins.kept import SUMS
from fs_plugins.sources import offline

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
_LOGIN = (
    "Log in with `hf auth login`, or set HF_TOKEN, with a token that may write (https://huggingface.co/settings/tokens)"
)


@dataclass(frozen=True)
class Repository:
    """Where a PSM is pushed to.

    Args:
        repo_id: owner/name.
        private: whether it is made private, if it has to be made; None: as its owner has it.
        token: of the hub; None: the one of the login.
        revision: a branch, made if need be; None: ``main``.

    Raises:
        SettingError: no such name.
    """

    repo_id: str
    private: bool | None = None
    token: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise SettingError(f"{self.repo_id!r} is no name of a repository on the hub: {error}") from None
        if self.repo_id.count("/") != 1 or self.repo_id.endswith(".pt"):  # the latter would be a file to a registry
            raise SettingError(f"A PSM is pushed to owner/name, where name does not end in .pt; got {self.repo_id!r}.")

    def check(self) -> None:
        """Whether this login may push, as far as that is known without making the repository.

        Raises:
            SettingError: nothing may be fetched, nobody is logged in, the token may not write, or the owner is another.
            OutputError: the hub cannot be asked.
        """
        if variable := offline():
            raise SettingError(f"While {variable} is set nothing is pushed. Unset it, or push later.")
        with self._told():
            login = self._api.whoami()
        name, owner = str(login.get("name")), self.repo_id.partition("/")[0]
        if login.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise self._refused(f"the token of {name} may only read")
        own = [name, *(str(one.get("name")) for one in login.get("orgs", ()))]
        if owner.lower() not in [one.lower() for one in own]:
            raise SettingError(
                f"{self.repo_id}: the login is that of {name}, who may write what is of {', '.join(own)}, not of "
                f"{owner}. Give another name, or log in as somebody who may."
            )

    def upload(self, folder: Path, names: Sequence[str], message: str | None, card: str) -> str:
        """Put files of a folder there, in one commit: who loads it meanwhile finds the old PSM or the new one.

        Args:
            names: of the files.
            message: what is said of the commit.
            card: the README.md, where neither the folder nor the repository has one.

        Returns:
            owner/name@commit.

        Raises:
            SettingError: as for ``check``.
            OutputError: the hub did not take it; the repository is as it was, or new and empty.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        self.check()
        with self._told():
            self._api.create_repo(self.repo_id, private=self.private, exist_ok=True)
            if self.revision is not None:
                self._api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
            changes: list[Any] = [CommitOperationAdd(name, folder / name) for name in names]
            if not self._has(CARD, names):
                changes.append(CommitOperationAdd(CARD, card.encode()))
            if SUMS not in names and self._has(SUMS, names):  # of an earlier PSM
                changes.append(CommitOperationDelete(SUMS))
            done = self._api.create_commit(
                self.repo_id, changes, commit_message=message or "PSM of fs-plugins", revision=self.revision
            )
        return f"{self.repo_id}@{done.oid}"

    def _has(self, name: str, names: Sequence[str]) -> bool:
        """Whether a file is among these, or in the repository."""
        return name in names or self._api.file_exists(self.repo_id, name, revision=self.revision)

    @property
    def _api(self) -> HfApi:
        from huggingface_hub import HfApi

        return HfApi(token=self.token, library_name="fs-plugins")

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What the hub, the network and huggingface_hub raise, in words."""
        try:
            yield
        except Exception as error:  # of httpx or requests, by the version, and of the protocols below
            status = getattr(getattr(error, "response", None), "status_code", None)
            if type(error).__name__ == "LocalTokenNotFoundError":
                raise self._refused("nobody is logged in to the hub") from None
            if status == 401:
                raise self._refused("the hub does not know this token") from None
            if status == 403:
                raise self._refused(f"this login may not write there ({_line(error)})") from None
            raise OutputError(
                f"{self.repo_id} could not be written, and is as it was: {_line(error)}. Try again."
            ) from error

    def _refused(self, why: str) -> SettingError:
        return SettingError(f"{self.repo_id} cannot be written: {why}. {_LOGIN}.")


def _line(error: BaseException) -> str:
    """What was wrong in one line, with what it came from."""
    said = [str(one) or type(one).__name__ for one in (error, error.__cause__) if one is not None]
    return re.sub(r"\s+", " ", "; ".join(dict.fromkeys(said))).strip()[:500].rstrip(".")
