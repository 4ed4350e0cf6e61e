"""A process that dies at any step of its work with files, without a process: from then on it changes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

STEPS = ("open", "replace", "rename", "link", "symlink", "unlink", "remove", "rmdir", "mkdir", "chmod", "fsync")


class Killed(BaseException):
    """No handler that tidies up gets anything done after this."""


@contextmanager
def dying(step: int, error: BaseException | None = None) -> Iterator[list[str]]:
    """Be killed before the ``step``-th change of the file system, from 1; what was done before is in the list.

    Args:
        error: raised at that step alone, in place of being killed.
    """
    done: list[str] = []

    def patched(name: str):
        real = getattr(os, name)

        def called(*args, **options):
            if name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR):
                return real(*args, **options)
            done.append(name)
            if error is not None and len(done) == step:
                raise error
            if error is None and len(done) >= step:
                raise Killed
            return real(*args, **options)

        return mock.patch.object(os, name, called)

    patches = [patched(name) for name in STEPS]
    for patch in patches:
        patch.start()
    try:
        yield done
    except Killed:
        pass
    finally:
        for patch in patches:
            patch.stop()
