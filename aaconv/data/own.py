"""The project's own data sets: made on the spot in seconds, with no download and no TensorFlow."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from aaconv.data import digit_pairs, digits
from aaconv.errors import close_matches

VERSIONS = {
    digits.NAME: digits.VERSION,
    **{f"{digit_pairs.NAME}/{level}": digit_pairs.VERSION for level in digit_pairs.GAPS},
}
"""The newest version of each set by its name, with its config where it has several."""


def is_own(name: str) -> bool:
    """Returns whether a name, with or without config and version, is that of a set of the project's own."""
    base = name.partition(":")[0].partition("/")[0]
    return base in {known.partition("/")[0] for known in VERSIONS}


def check(name: str) -> str:
    """Returns the name without its version.

    Raises:
      ValueError: no such config or version, or none is named of several.
    """
    base, _, version = name.partition(":")
    if base not in VERSIONS:
        configs = [known for known in VERSIONS if known.startswith(f"{base.partition('/')[0]}/")]
        if not configs:
            raise ValueError(f"data set {name!r} does not exist: it has no configs; name {base.partition('/')[0]}")
        near = close_matches(base, configs) or ";"
        raise ValueError(f"data set {name!r} does not exist{near} name one of {', '.join(configs)}")
    if version not in ("", VERSIONS[base]):
        raise ValueError(f"data set {name!r} does not exist: the only version is {VERSIONS[base]}")
    return base


def builder(name: str, root: os.PathLike[str]) -> Any:
    """Returns the TFDS builder of a set, whose files lie or will lie below `root`.

    Raises:
      ValueError: as of `check`.
    """
    base, _, config = check(name).partition("/")
    return digit_pairs.builder(root, config) if base == digit_pairs.NAME else digits.builder(root)


def prepare(name: str, root: os.PathLike[str]) -> str:
    """Makes a set in ``root/NAME[/CONFIG]/VERSION`` and returns that folder.

    It is made in a folder of its own and moved into place in one step, so several processes
    may do this at once and nobody sees half a data set.

    Raises:
      ValueError: as of `check`, or `root` cannot be written.
    """
    root, base = Path(root), check(name)
    home = root / base / VERSIONS[base]
    if (home / "dataset_info.json").exists():
        return str(home)
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{base.replace('/', '-')}-", dir=root))
    except OSError as error:
        raise ValueError(
            f"{base} cannot be prepared in {root}: {error.strerror or error}; set data.data_dir or "
            "TFDS_DATA_DIR to a folder that can be written"
        ) from error
    try:
        made = digits.write(builder(base, scratch))
        try:
            os.rename(made, home)
        except OSError:
            # Another process was first: its files are the same as ours.
            if not (home / "dataset_info.json").exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return str(home)
