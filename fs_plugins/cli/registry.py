"""``fs-plugins registry``: what the registry knows, whether it is true, and PSMs of one's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from fs_plugins.cli.base import console, errors_for_people, needs, plain_table
from fs_plugins.errors import FSPluginsError, RegistryError

app = typer.Typer(help=__doc__, no_args_is_help=True)


@app.command("list")
def list_() -> None:
    """Encoders and purifiers, and the file that each comes from."""
    with errors_for_people():
        from fs_plugins.registry import shipped_path, user_path

        known = _known()
        short = {shipped_path(): "shipped", user_path(): "yours"}
        table = plain_table("name", "kind", "readout", "sigma", "PSM or purifier", "file")
        table.columns[0].no_wrap = True
        for name, (file, *_) in known.files.items():
            entry: Any = known.entries.get(name) or known.purifiers[name]
            rows = [("", "", f"those of {entry.psm_of}")] if getattr(entry, "psm_of", None) else []
            for trained in () if rows else getattr(entry, "psms", (entry,)):
                where = "" if trained.state == "not trained yet" else f" {trained.path.rstrip('/').rpartition('/')[2]}"
                rows.append((getattr(trained, "readout", "any"), trained.sigmas, trained.state + where))
            for row in rows:
                table.add_row(*map(escape, (name, entry.kind, *row, short.get(file, str(file)))))
        console.print(table)
        for name in known.files:
            for note in _notes(known, name):
                console.print(f"{name}: {note}", style="yellow", markup=False, soft_wrap=True)
        there = "" if user_path().exists() else " (not there yet)"
        console.print(f"Yours is {user_path()}{there}, before those of plugins and the one that ships.", soft_wrap=True)


def _notes(known: Any, name: str) -> list[str]:
    """What of an entry is not in use, in words."""
    first, *hidden = known.files[name]
    others = known.passed_over(name) if name in known.entries else {}
    return [f"{first} hides what {file} says of it" for file in hidden] + [
        f"{other} comes first for {', '.join(readouts)} of the same weights" for other, readouts in others.items()
    ]


@app.command()
def show(name: str) -> None:
    """Everything about one encoder or purifier."""
    with errors_for_people():
        known = _known(name)
        entry: Any = known.entries.get(name) or known.purifiers[name]
        lines: list[tuple[str, Any]] = [("file", known.files[name][0])]
        lines += entry.model_dump(mode="json", exclude_defaults=True, exclude={"psms"}).items()
        for psm in known.psms(name) if name in known.entries else ():
            lines.append((psm.readout, psm.model_dump(mode="json", exclude_defaults=True, exclude={"readout"})))
        if getattr(entry, "psm_of", None):
            lines.append(("note", f"these PSMs were trained for {entry.psm_of} and are used unchanged"))
        lines += [("note", note) for note in _notes(known, name)]
        table = plain_table("", "")
        for what, told in lines:
            words = ", ".join(f"{k} {v}" for k, v in told.items()) if isinstance(told, dict) else str(told)
            table.add_row(f"[bold]{escape(what)}[/]", escape(words))
        console.print(table)


@app.command()
def verify(name: Annotated[str | None, typer.Argument(help="One entry; all if left out.")] = None) -> None:
    """Compute checksums and fingerprints of all that is on this machine again; exit with 1 if one is wrong."""
    with errors_for_people():
        from fs_plugins.plugins import plugin_parts

        known = _known(name)
        checks = [*known.verify(name, **plugin_parts()), *_weights(known, name)]
        words = {True: "[green]right[/]", False: "[red]WRONG[/]", None: "[yellow]unchecked[/]"}
        table = plain_table("", "what", "found")
        for check in checks:
            table.add_row(words[check.right], escape(check.what), escape(check.told))
        console.print(
            table if checks else "Nothing to check: not trained yet, and no fingerprint of the encoder is known."
        )
        if any(check.right is False for check in checks):
            raise typer.Exit(1)


def _weights(known: Any, name: str | None) -> Iterator[Any]:
    """The fingerprints of encoders."""
    from fs_plugins.registry import Check

    for encoder, entry in known.entries.items():
        if name not in (None, encoder) or not entry.verified:
            continue
        right, told = None, f"the weights of {entry.weights.location} are on the hub"
        if entry.weights.source != "hub":
            told = place = str(known.place(encoder, entry.weights.location))
            try:
                right = _call_of(place, entry.fingerprint) is not None
            except FSPluginsError as error:
                told = str(error)
        yield Check(f"{encoder}, weights", right, told)


def _call_of(model: str, weights: Sequence[float]) -> Any:
    """The vision call of the model's encoder that has this fingerprint, if one does."""
    from fs_plugins.identity import fingerprint, same_encoder
    from fs_plugins.plugins import claim

    needs("transformers")
    from fs_plugins.hf.load import load, quieten

    quieten()
    calls = claim(load(model))[1]
    return next((call for call in calls if same_encoder(fingerprint(call.module), weights)), None)


@app.command()
def add(
    psm: Annotated[str, typer.Argument(help="Its folder, owner/name@commit on the hub, or a url that ends in /.")],
    encoder: Annotated[
        str | None,
        typer.Option(
            help="What it was trained for: an entry, or a model's folder or hub id; needed where no entry has its fingerprint."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Its name in the registry; the PSM's own if left out.")] = None,
    sha256: Annotated[str | None, typer.Option(help="The expected checksum; a url needs it.")] = None,
    replace: Annotated[bool, typer.Option(help="Take the place of the entry of this name, or hide it.")] = False,
) -> None:
    """Put a trained PSM at the top of your registry file, where psm="auto" finds it. Comments in the file are lost."""
    with errors_for_people():
        from fs_plugins import files, registry
        from fs_plugins.plugins import encoder_families, plugin_parts
        from fs_plugins.psm import PSM

        path = registry.user_path()
        if not path.exists():
            files.replace(path, "")
        known = _known()
        where = _source(psm, sha256)
        found = PSM.from_pretrained(where.fetch(Path(), f"The PSM {psm!r}"), **plugin_parts())
        config = found.config
        name = name or config.name
        if name in known.files and not replace:
            raise RegistryError(
                f"{name!r} is in {known.files[name][0]} already. Choose another --name, or --replace it (an entry of another "
                "file is hidden)."
            )
        facts = {**where.model_dump(exclude_none=True), "sigma": config.sigma, "sigma_range": list(config.sigma_range)}
        if config.readouts:
            entry = _encoder(known, encoder, found) | {"fingerprint": list(config.fingerprint)}
            entry["psms"] = [{"readout": readout.name, **facts} for readout in config.readouts]
            registry.put(path, "encoders", name, entry, encoder_families())
        elif config.purifier is not None:
            registry.put(path, "purifiers", name, {"kind": config.purifier.kind, **facts})
        else:
            raise RegistryError(f"{psm!r} has neither mappers nor a purifier.")
        console.print(f"{name} is at the top of {path}.", soft_wrap=True)
        known = _known()
        for other in known.entries:
            for note in _notes(known, other) if name in known.passed_over(other) or other == name else ():
                console.print(f"{other}: {note}", style="yellow", markup=False, soft_wrap=True)


def _source(psm: str, sha256: str | None) -> Any:
    """Where a PSM is, in words of the command line."""
    from pydantic import ValidationError

    from fs_plugins.sources import Source, checksum, psm_folder

    facts: dict[str, Any] = {"state": "folder", "path": str(Path(psm).absolute())}
    if "://" in psm:
        facts = {"state": "url", "path": psm}
    elif "@" in psm and not Path(psm).exists():
        facts = dict(zip(("state", "path", "revision"), ("hub", *psm.split("@", 1)), strict=True))
    try:
        found = Source(**facts, sha256=sha256 or ("0" * 64 if facts["state"] != "url" else None))
    except ValidationError as error:
        raise RegistryError(f"{psm!r}: {error.errors()[0]['msg']}.") from None
    return found if sha256 else found.model_copy(update={"sha256": checksum(psm_folder(facts["path"], found.revision))})


def _encoder(known: Any, encoder: str | None, psm: Any) -> dict[str, Any]:
    """What the registry says of the encoder that a PSM was trained for, from another entry or from a model."""
    weights = psm.config.fingerprint
    if encoder is None:
        same = [name for name, entry in known.entries.items() if entry.has(weights)]
        encoder = next(iter([*same, *known.entries.keys() & {psm.config.encoder}]), None)
    if encoder is None:
        raise RegistryError(
            "No entry has the fingerprint of this PSM's encoder. Say what it was trained for: --encoder."
        )
    if entry := known.entries.get(encoder):
        if entry.verified and not entry.has(weights):
            raise RegistryError(
                f"The PSM was trained for other weights than those of {encoder}. An encoder that is to use it unchanged gets "
                "an entry with psm_of (docs/reference/registry.md)."
            )
        copied = {"kind", "architecture", "weights", "preprocessing"}
        facts: dict[str, Any] = entry.model_dump(mode="json", exclude_none=True, include=copied)
        if entry.weights.source != "hub":
            place = known.place(encoder, entry.weights.location)
            facts["weights"] |= {"source": "folder", "location": str(place.absolute())}
        return facts
    call = _call_of(encoder, weights)
    if call is None:
        raise RegistryError(f"The PSM was trained for other weights than those of the model {encoder}.")
    psm.check(call, psm.config.sigma)
    from fs_plugins.hf.load import source

    folder = Path(source(encoder))
    local = {"source": "folder", "location": str(folder.resolve())}
    return {
        "kind": "vanilla",
        "architecture": dict(call.architecture),
        "weights": local if folder.is_dir() else {"source": "hub", "location": encoder},
        "preprocessing": {"mean": list(call.pixels.mean), "std": list(call.pixels.std)},
    }


def _known(name: str | None = None) -> Any:
    from fs_plugins.plugins import known_encoders

    known = known_encoders()
    if name is not None and name not in known.files:
        raise RegistryError(f"The registry has no entry {name!r}. It has: {', '.join(known.files)}.")
    return known
