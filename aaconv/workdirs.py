"""Where runs are kept: folders, and ``gs://`` buckets. The only place that knows etils.epath.

What holds for a folder does not all hold for a bucket. An object there appears whole or not at all, so nothing is
written beside and renamed; but nothing can be appended to it, a folder exists only while something is in it, and there
is no lock that would end with its process.
"""

from __future__ import annotations

import importlib.util
import os
import uuid
from pathlib import Path

BUCKET = "gs://"


def path(workdir: str | os.PathLike[str]) -> Path:
    """Returns the absolute path of a workdir: of a bucket an ``etils.epath.Path``, which reads like any other.

    Raises:
      ValueError: it is in another kind of store.
      ImportError: ``gcsfs`` is not installed.

    Example:
      >>> path("/runs/../runs/digits")
      PosixPath('/runs/../runs/digits')
    """
    text = os.fspath(workdir)
    if "://" not in text:
        return Path(text).expanduser().absolute()
    if not text.startswith(BUCKET) or not text.removeprefix(BUCKET).strip("/"):
        raise ValueError(f"workdir {text!r} must be a folder, or {BUCKET}BUCKET/FOLDER: no other store was tried")
    if not any(importlib.util.find_spec(package) for package in ("gcsfs", "tensorflow")):
        raise ModuleNotFoundError("No module named 'gcsfs'", name="gcsfs")
    from etils import epath

    return epath.Path(text)  # type: ignore[return-value]  # it has the methods of Path that are used here


def in_bucket(workdir: str | os.PathLike[str]) -> bool:
    """Whether a path that `path` returned, or its text, is in a bucket."""
    return os.fspath(workdir).startswith(BUCKET)


def write_text(file: Path, text: str) -> None:
    """Writes a whole file; whoever reads it, also after a kill, sees the old text or the new."""
    if in_bucket(file):
        file.write_text(text)
        return
    beside = file.with_suffix(".tmp")
    beside.write_text(text)
    beside.replace(file)


def move_into(folder: Path, home: Path) -> None:
    """Moves a folder into `home`, which is made if need be, under a name that is new there."""
    home.mkdir(exist_ok=True)
    if in_bucket(home):
        (home / "about.txt").write_text("Moved here because they could not be read.\n")  # else there is no such folder
    folder.rename(home / f"{folder.name}-{uuid.uuid4().hex[:8]}")


def copy_files(folder: Path, target: Path) -> None:
    """Copies the files below a local folder to the same places below `target`."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        place = target / file.relative_to(folder).as_posix()
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.read_bytes())
