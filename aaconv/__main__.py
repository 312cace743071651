"""``python -m aaconv`` is the ``aaconv`` command."""

from __future__ import annotations

from aaconv.cli import run

if __name__ == "__main__":
    run()
