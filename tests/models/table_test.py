"""The page of networks: what it says is what the networks are, and the committed one is of today."""

from __future__ import annotations

from pathlib import Path

import pytest

from aaconv import cli
from aaconv.models import list_models, table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def rows(page: str) -> dict[str, list[str]]:
    """The cells of each network's line by its name and arguments."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:3] == "| `"]
    return {cells[0].replace("`", "").replace(",", ""): cells[1:] for cells in lines}


@pytest.mark.slow
def test_the_committed_page_is_of_these_networks():
    assert table.page() == PAGE.read_text(), "stale: run `aaconv models > docs/models.md`"


def test_every_network_and_every_printed_figure_has_its_line():
    assert set(rows(PAGE.read_text())) == {*list_models(), *table.PUBLISHED}


def test_figures_that_differ_are_not_called_alike():
    found = rows(table.page("aa_wrn_28_10"))["aa_wrn_28_10"]
    source, pixels, parameters, printed, flops, printed_flops, agrees, attends = found
    assert (pixels, parameters, printed, flops, printed_flops) == ("32", "36.05", "36.2", "11.40", "10.9")
    assert source == "Bello et al. 2019" and agrees == "neither"
    assert attends == "stage1: 4 at 32x32; stage2: 4 at 16x16; stage3: 4 at 8x8; 8 heads"


def test_a_pattern_that_matches_nothing_is_told(capsys):
    assert cli.main(["models", "aa_resnet51"]) == 2
    assert "no network matches 'aa_resnet51'" in capsys.readouterr().err
