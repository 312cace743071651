"""The page of all networks, ``docs/models.md``: counted here, beside what their papers print."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from aaconv.models import create, entry, list_models
from aaconv.models.summary import Attention, Summary, summarise

# Parameters in millions and GFLOPs as printed: Bello et al. 2019, tables 1 to 3 and figure 4 (those of figures for
# SE-ResNet-34, 101 and 152, ResNet-152 and MnasNet are recalled), and the papers of BAM, CBAM and BoTNet.
PUBLISHED: dict[str, tuple[str, str]] = {
    "wrn_28_10": ("36.3", "10.4"),
    "aa_wrn_28_10": ("36.2", "10.9"),
    "se_wrn_28_10": ("36.5", "10.4"),
    "ge_wrn_28_10": ("36.3", "10.4"),
    "resnet34": ("21.8", "7.4"),
    "resnet50": ("25.6", "8.2"),
    "resnet101": ("44.5", "15.6"),
    "resnet152": ("60.2", "23.0"),
    "aa_resnet34": ("20.7", "7.1"),
    "aa_resnet50": ("25.8", "8.3"),
    "aa_resnet101": ("45.4", "16.1"),
    "aa_resnet152": ("61.6", "23.8"),
    "se_resnet34": ("22.0", "7.4"),
    "se_resnet50": ("28.1", "8.2"),
    "se_resnet101": ("49.3", "15.6"),
    "se_resnet152": ("66.8", "23.1"),
    "bam_resnet50": ("25.9", ""),
    "cbam_resnet50": ("28.1", ""),
    "botnet50": ("20.8", ""),
    "mnasnet_a1 width_multiplier=0.75": ("2.91", "0.45"),
    "mnasnet_a1": ("3.89", "0.63"),
    "mnasnet_a1 width_multiplier=1.25": ("5.26", "1.01"),
    "mnasnet_a1 width_multiplier=1.4": ("6.10", "1.17"),
    "aa_mnasnet_a1 width_multiplier=0.75": ("3.02", "0.51"),
    "aa_mnasnet_a1": ("4.06", "0.70"),
    "aa_mnasnet_a1 width_multiplier=1.25": ("5.53", "1.11"),
    "aa_mnasnet_a1 width_multiplier=1.4": ("6.44", "1.29"),
    "aa_resnet50 attention_ratio=0.25": ("24.3", "7.9"),
    "aa_resnet50 attention_ratio=0.5": ("22.3", "7.3"),
    "aa_resnet50 attention_ratio=0.75": ("20.7", "6.8"),
    "aa_resnet50 attention_ratio=1.0": ("19.4", "6.3"),
}
"""By name, with the arguments that the figures are for."""

FLOPS_TOLERANCE = 0.02

_HEAD = """\
# Networks

`aaconv models > docs/models.md` writes this page; a test compares it with the networks. Each is built by
`aaconv.create(NAME, ARGUMENT=VALUE, ...)`, or by `model.name` and the other keys of `model` in a config.

Parameters in millions and GFLOPs of one image are counted from the network (2 for a multiply-add in a convolution or
projection, 1 in the products of attention), and stand beside what the paper prints. **agrees** says in which of the two
they are alike: parameters to the printed digit, FLOPs within 2%; "no figure" where none is printed. Where they differ,
the builder's docstring says what was tried. *attends* names layers and the maps they attend over; a pooled map is
smaller than its stage.

What no figure can show is held against plain forms of the formulas in `tests/`: every layer, the blocks of BoTNet and
MnasNet, and whole forward passes of ResNet-18 and 50.
"""


def matching(pattern: str = "*") -> list[str]:
    """Returns the names that match, of which there is at least one.

    Raises:
      ValueError: no name matches.
    """
    names = list_models(pattern)
    if not names:
        raise ValueError(f"no network matches {pattern!r}: `aaconv models --names` lists them all")
    return names


def page(pattern: str = "*") -> str:
    """Returns the page as Markdown.

    Args:
      pattern: a shell-like pattern of names.

    Raises:
      ValueError: no name matches.
    """
    names = matching(pattern)
    variants = [name for name in PUBLISHED if " " in name and name.partition(" ")[0] in names]
    lines = [_HEAD, *_table(names)]
    if variants:
        lines += ["", "With arguments:", "", *_table(variants)]
    return "\n".join(lines) + "\n"


def _table(names: Iterable[str]) -> list[str]:
    columns = ["network", "from", "pixels", "parameters", "paper", "GFLOPs", "paper", "agrees", "attends"]
    return [_line(columns), _line(["---"] * len(columns)), *(_line(_row(name)) for name in names)]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _row(name: str) -> list[str]:
    base, *given = name.split(" ")
    arguments: dict[str, Any] = {key: float(value) for key, _, value in (text.partition("=") for text in given)}
    known = entry(base)
    summary = summarise(create(base, **arguments), (known.image_size, known.image_size, 3))
    parameters, flops = PUBLISHED.get(name, ("", ""))
    return [
        f"`{base}`" + "".join(f", {text}" for text in given),
        known.source,
        str(known.image_size),
        f"{summary.parameters / 1e6:.2f}",
        parameters,
        f"{summary.flops / 1e9:.2f}",
        flops,
        _agreement(summary, parameters, flops),
        _attends(summary.attention),
    ]


def _agreement(summary: Summary, parameters: str, flops: str) -> str:
    found = []
    if parameters:
        digits = len(parameters.partition(".")[2])
        found.append(("parameters", f"{summary.parameters / 1e6:.{digits}f}" == parameters))
    if flops:
        found.append(("GFLOPs", abs(summary.flops / 1e9 / float(flops) - 1) <= FLOPS_TOLERANCE))
    if not found:
        return "no figure"
    agreeing = [what for what, agrees in found if agrees]
    if not agreeing:
        return "no" if len(found) == 1 else "neither"
    return "both" if len(agreeing) == 2 else agreeing[0]


def _attends(layers: Iterable[Attention]) -> str:
    """``stage2: 4 at 14x14; stage3: ..; 8 heads``."""
    counts: dict[str, dict[str, int]] = {}
    heads: list[int] = []
    for layer in layers:
        stage = counts.setdefault(layer.path.partition("_")[0], {})
        size = "x".join(map(str, layer.attends_at))
        stage[size] = stage.get(size, 0) + 1
        heads.append(layer.num_heads)
    if not counts:
        return ""
    stages = (f"{stage}: {', '.join(f'{n} at {size}' for size, n in maps.items())}" for stage, maps in counts.items())
    return f"{'; '.join(stages)}; {' or '.join(map(str, sorted(set(heads))))} heads"
