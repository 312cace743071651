"""How results are written down: what they ran on, tables that are Markdown, and CSV files."""

from __future__ import annotations

import contextlib
import csv
import datetime
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import jax


def machine(target: str = "") -> dict[str, Any]:
    """Describes what a benchmark runs on, in the columns that every row of a CSV file has.

    Args:
      target: what the programs are compiled for, where that is not this machine.
    """
    found: dict[str, Any] = {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")}
    found["revision"] = _revision()
    found["device"] = target or _device()
    found["cpu"], found["cores"] = _cpu(), cores()
    with contextlib.suppress(OSError):
        found["load"] = round(os.getloadavg()[0], 2)
    found["python"] = platform.python_version()
    for package in ("aaconv", "jax", "jaxlib", "torch", "libtpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def describe(found: Mapping[str, Any]) -> str:
    """Spells `machine`'s findings in two lines."""
    versions = [f"{name} {found[name]}" for name in ("python", "jax", "jaxlib", "torch", "libtpu") if name in found]
    threads = f"{found['cores']} threads"
    where = found["device"] if found["device"] == found["cpu"] else f"{found['device']}, host {found['cpu']}"
    revision = f"revision {found['revision']}" if found["revision"] else f"aaconv {found.get('aaconv', '')}"
    lines = [f"{where}, {threads}, load {found.get('load', '?')} at the start", ", ".join(versions)]
    return "\n".join([*lines, f"{revision}, {found['date']}"])


def cores() -> int:
    """Processors this process may use, which is how many threads jax and torch take."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> int | None:
    """Bytes this machine could give to a program now; None where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


class Csv:
    """A CSV file that is complete after every row, and replaces an earlier one with its first.

    Raises:
      ValueError: the folder cannot be made or written.
    """

    def __init__(self, path: str | os.PathLike[str], columns: Sequence[str]) -> None:
        self.path, self._columns = Path(path), columns
        self._file = None
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise ValueError(f"--output {folder} is a file, or lies below one: name a folder") from error
        except OSError as error:
            raise ValueError(f"--output {folder} cannot be written ({error.strerror}): name another folder") from error
        if not os.access(folder, os.W_OK):
            raise ValueError(f"--output {folder} cannot be written: name another folder")

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a row; None is an empty field."""
        if self._file is None:
            self.path.with_suffix(".png").unlink(missing_ok=True)  # of the earlier rows
            self._file = self.path.open("w", newline="")
            self._writer = csv.DictWriter(self._file, self._columns, lineterminator="\n", restval="")
            self._writer.writeheader()
        self._writer.writerow({key: "" if value is None else value for key, value in row.items()})
        self._file.flush()

    def __enter__(self) -> Csv:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, text: int = 1) -> str:
    """Lays out a table that reads well as it is and is Markdown; all columns but the first `text` hold numbers."""
    rows = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        placed = [
            cell.ljust(width) if index < text else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(placed)} |"

    rule = ["-" * (width + 2) if index < text else "-" * (width + 1) + ":" for index, width in enumerate(widths)]
    return "\n".join([line(columns), f"|{'|'.join(rule)}|", *map(line, rows)])


def milliseconds(median: float | None, quartiles: tuple[float, float] | None = None) -> str:
    """``12.3 (12.1-12.9)``: the median and the quartiles."""
    if median is None:
        return "-"
    digits = 2 if median < 1e-2 else 1 if median < 1 else 0
    text = f"{1e3 * median:.{digits}f}"
    return text if quartiles is None else f"{text} ({1e3 * quartiles[0]:.{digits}f}-{1e3 * quartiles[1]:.{digits}f})"


def megabytes(size: float | None) -> str:
    """Bytes in units of 10^6."""
    if size is None:
        return "-"
    return f"{size / 1e6:,.{0 if size >= 1e8 else 1 if size >= 1e6 else 3}f}"


def ratio(value: float | None, base: float | None) -> str:
    """``value / base`` to three digits."""
    if not base or value is None:
        return "-"
    return f"{value / base:.2f}" if value / base >= 0.1 else f"{value / base:.3f}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut to what fits a line."""
    words = (str(error).strip().splitlines() or [""])[0]
    text = f"{type(error).__name__}: {words}" if words else type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def reason(error: NotImplementedError) -> str:
    """Why an implementation cannot serve, without its name, which stands beside it."""
    text = str(error)
    return text.partition(" cannot serve here: ")[2] or text


def _device() -> str:
    device = jax.devices()[0]
    return _cpu() if device.platform == "cpu" else device.device_kind


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _revision() -> str:
    """The commit of the checkout this package lies in, with ``+`` where files of it were changed since."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        ask = ["git", "-C", str(checkout)]
        known = {"capture_output": True, "text": True, "check": True, "timeout": 10}
        commit = subprocess.run([*ask, "rev-parse", "--short", "HEAD"], **known).stdout.strip()
        changed = subprocess.run([*ask, "status", "--porcelain", "--", "aaconv"], **known).stdout.strip()
        return f"{commit}+" if changed else commit
    return ""
