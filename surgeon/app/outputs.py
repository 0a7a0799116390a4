"""Where what the commands make goes, claimed before any work is done; nothing that is read for it is overwritten."""

from __future__ import annotations

from pathlib import Path

from surgeon.app.given import Given
from surgeon.app.images import Images
from surgeon.errors import StoreError
from surgeon.files import architectures, exports, formats
from surgeon.files.atomic import claim, write_atomically
from surgeon.fitting.fitted import Settings
from surgeon.python.write import claim_folder
from surgeon.surgery.plan import Plan


def claim_plan(path: Path, name: str, recipe: str, given: Given, *, force: bool) -> None:
    """Make sure, before a plan is made, that it can be written."""
    claim(path, force=force, suffixes=(".yaml", ".yml", ".json"), origins=read_for(name, given, recipe))


def claim_picture(path: Path, name: str, given: Given, *, force: bool) -> None:
    """Make sure, before anything is measured, that a picture of it can be written."""
    claim(path, force=force, suffixes=(".svg",), origins=read_for(name, given))


def claim_page(path: Path | None, given: Given, *read: object, force: bool) -> None:
    """Make sure, before any work is done, that a page about it can be written, where one is asked for."""
    if path is not None:
        claim(path, force=force, suffixes=(".html", ".htm"), origins=read_for("", given, *read))


def write_plan(decided: Plan, path: Path, *, force: bool) -> None:
    """Write a plan file: JSON if its name ends in .json, else YAML."""
    text = decided.dump(as_json=path.suffix == ".json")
    whole = text.encode("utf-8", "backslashreplace")  # half characters, as JSON writes them
    write_atomically(path, lambda part: part.write_bytes(whole), force=force)


def claim_model(
    output: Path | None, name: str, label: str, given: Given, *read: object, force: bool, exported: bool = False
) -> Path:
    """Choose where the model goes, and make sure before any work is done that it can be written there.

    It may be an export where the command writes them (`exported`).
    """
    path = output or beside(name, label)
    if output is None and not architectures.is_factory(name) and not Path(name).exists():
        return path  # loading says that there is no such file, and which one may be meant
    suffixes = (*formats.suffixes(), *(exports.suffixes() if exported else ()))
    if exports.is_export(path) and not exported:
        raise StoreError(f"{path.name} would be an export, which `surgeon fuse` writes", todo="End it in .pt here.")
    return claim(path, force=force, suffixes=suffixes, origins=read_for(name, given, *read))


def claim_python(folder: Path, name: str, given: Given, *, force: bool) -> Path:
    """Make sure, before any work is done, that a folder of Python can be written."""
    claim_folder(folder, force=force, origins=read_for(name, given))
    return folder


def read_for(name: str, given: Given, *read: object) -> list[str | Path]:
    """List what is read to make a file, and must not be overwritten by it."""
    return [one for one in (name, given.arch, *given.inputs, *read) if isinstance(one, str | Path)]


def read_to_fit(images: Images | None, settings: Settings | None) -> list[str | Path]:
    """List the files that a fit reads: its images, their labels, and how far it is."""
    state = None if settings is None else settings.state
    return [*(() if images is None else images.files), *(() if state is None else (state,))]


def beside(name: str, label: str) -> Path:
    """Name the result after its origin: model.pt → model.acnet.pt, torchvision:resnet18 → resnet18.acnet.pt."""
    path = Path(name)
    if path.suffix in formats.suffixes():
        return path.with_name(f"{path.stem}.{label}{path.suffix}")
    if path.name and path.exists():
        return path.with_name(f"{path.stem}.{label}.pt")
    return Path(f"{name.rpartition(':')[2]}.{label}.pt")
