"""``fs-plugins registry``: what the registry knows, whether it is true, and PSMs of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fs_plugins.cli.base import console, errors_for_people, plain_table
from fs_plugins.errors import RegistryError
from fs_plugins.terminal import styled

if TYPE_CHECKING:
    from fs_plugins.registry import Registry

app = typer.Typer(help=__doc__, no_args_is_help=True)


@app.command("list")
def list_() -> None:
    """Encoders and purifiers, and the file that each comes from."""
    with errors_for_people():
        from fs_plugins.registry import shipped_path, user_files, user_path

        known = _known()
        short = {shipped_path(): "shipped", **dict.fromkeys(user_files(), "yours")}
        table = plain_table("name", "kind", "readout", "sigma", "PSM or purifier", "file")
        table.columns[0].no_wrap = True
        for name, (file, *_) in known.files.items():
            for cells in _rows(known, name):
                table.add_row(name, *cells, short.get(file, str(file)))
        console.print(table)
        for name in known.files:
            _print_notes(known, name)
        with suppress(RegistryError):  # no home directory
            there = "" if user_files() else " (not there yet)"
            console.print(
                f"Yours is {user_path()}{there}, before those of plugins and the one that ships.", soft_wrap=True
            )


def _rows(known: Registry, name: str) -> Iterator[tuple[str, str, str, str]]:
    """Kind, readout, sigmas and place of each PSM of an encoder, or of a purifier."""
    encoder = known.entries.get(name)
    if encoder is None:
        purifier = known.purifiers[name]
        yield purifier.kind, "any", purifier.sigmas, _where(purifier.state, purifier.path)
    elif encoder.psm_of:
        yield encoder.kind, "", "", f"those of {encoder.psm_of}"
    else:
        for psm in encoder.psms:
            yield encoder.kind, psm.readout, psm.sigmas, _where(psm.state, psm.path)


def _where(state: str, path: str | None) -> str:
    return f"{state} {path.rstrip('/').rpartition('/')[2]}" if path else state


def _print_notes(known: Registry, name: str) -> None:
    for note in known.notes(name):
        console.print(f"{name}: {note}", style="yellow", soft_wrap=True)


@app.command()
def show(name: str) -> None:
    """Everything about one encoder or purifier."""
    with errors_for_people():
        known = _known(name)
        encoder = known.entries.get(name)
        entry = encoder or known.purifiers[name]
        lines: list[tuple[str, object]] = [("file", known.files[name][0])]
        lines += entry.model_dump(mode="json", exclude_defaults=True, exclude={"psms"}).items()
        for psm in known.psms(name) if encoder else ():
            lines.append((psm.readout, psm.model_dump(mode="json", exclude_defaults=True, exclude={"readout"})))
        if encoder and encoder.psm_of:
            lines.append(("note", f"these PSMs were trained for {encoder.psm_of} and are used unchanged"))
        lines += [("note", note) for note in known.notes(name)]
        table = plain_table("", "")
        for what, told in lines:
            words = ", ".join(f"{k} {v}" for k, v in told.items()) if isinstance(told, dict) else str(told)
            table.add_row(styled(what, "bold"), words)
        console.print(table)


@app.command()
def verify(name: Annotated[str | None, typer.Argument(help="One entry; all if left out.")] = None) -> None:
    """Compute checksums and fingerprints of all that is on this machine again; exit with 1 if one is wrong."""
    with errors_for_people():
        from fs_plugins.hf import upkeep

        known = _known(name)
        _quieten()
        checks = list(upkeep.verify(known, name))
        words = {True: ("right", "green"), False: ("WRONG", "red"), None: ("unchecked", "yellow")}
        table = plain_table("", "what", "found")
        for check in checks:
            table.add_row(styled(*words[check.right]), check.what, check.told)
        console.print(
            table if checks else "Nothing to check: not trained yet, and no fingerprint of the encoder is known."
        )
        if any(check.right is False for check in checks):
            raise typer.Exit(1)


@app.command()
def add(
    psm: Annotated[str, typer.Argument(help="Its folder, owner/name@commit on the hub, or a url that ends in /.")],
    encoder: Annotated[
        str | None,
        typer.Option(
            help="What it was trained for: an entry, or a model's folder or hub id; needed where no entry has its "
            "fingerprint."
        ),
    ] = None,
    processor: Annotated[
        str | None, typer.Option(help="Folder or hub id of that model's processor, where none is beside the model.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Its name in the registry; the PSM's own if left out.")] = None,
    sha256: Annotated[str | None, typer.Option(help="The expected checksum; a url needs it.")] = None,
    replace: Annotated[bool, typer.Option(help="Take the place of the entry of this name, or hide it.")] = False,
) -> None:
    """Put a trained PSM at the top of your registry file, where psm="auto" finds it. Comments in the file are lost."""
    with errors_for_people():
        from fs_plugins.hf import upkeep
        from fs_plugins.registry import user_path

        if encoder is not None:
            _quieten()
        name = upkeep.add(psm, encoder, processor=processor, name=name, sha256=sha256, replace=replace)
        console.print(f"{name} is at the top of {user_path()}.", soft_wrap=True)
        known = _known()
        for other in known.entries:
            if other == name or name in known.passed_over(other):
                _print_notes(known, other)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="The PSM's.")],
    repository: Annotated[str, typer.Argument(help="owner/name on the Hugging Face hub; made if need be.")],
    private: Annotated[bool, typer.Option(help="If it has to be made, make it private.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch, made if need be; main if left out.")] = None,
    message: Annotated[str | None, typer.Option(help="What is said of the commit.")] = None,
) -> None:
    """Push a trained PSM to the hub, with its card, and say how others add it to their registry."""
    with errors_for_people():
        from fs_plugins.publishing import push as pushed

        _quieten()
        commit = pushed(folder, repository, private=private or None, revision=revision, commit_message=message)
        say_pushed(commit, folder)


def say_pushed(commit: str, folder: Path) -> None:
    """Where a PSM is on the hub, and how others find it.

    Args:
        commit: owner/name@commit.
        folder: where it came from.
    """
    from huggingface_hub import constants

    from fs_plugins.hf import upkeep
    from fs_plugins.plugins import plugin_parts
    from fs_plugins.psm import PSM

    repository, _, revision = commit.partition("@")
    console.print(f"\nPushed: {constants.ENDPOINT}/{repository}/tree/{revision}", soft_wrap=True)
    console.print('psm="auto" finds it for whoever runs', soft_wrap=True)
    config = PSM.from_pretrained(folder, **plugin_parts()).config
    console.print(f"    {upkeep.how_to_add(commit, config)}", soft_wrap=True)


def _known(name: str | None = None) -> Registry:
    from fs_plugins.plugins import known_encoders

    known = known_encoders()
    if name is not None and name not in known.files:
        raise RegistryError(f"The registry has no entry {name!r}. It has: {', '.join(known.files)}.")
    return known


def _quieten() -> None:
    """A model may have to be loaded; without transformers, what needs none is done all the same."""
    if find_spec("transformers") is not None:
        from fs_plugins.hf.load import quieten

        quieten()
