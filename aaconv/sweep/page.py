"""The report as one HTML page: pictures inside, no network, light and dark as the reader's system is."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from aaconv.sweep.pictures import Picture

# The policy has the browser refuse whatever is not in the page.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --paper: #ffffff; --line: #d8dde3; --band: #f5f7f9;
  --best: #e3f1fb; --good: #00704f; --bad: #b3261e; --wait: #7a5b00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a0a8b3; --paper: #15181d; --line: #343a43;
  --band: #1c2026; --best: #16324a; --good: #43d3a3; --bad: #ff8a80; --wait: #e5c04b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line); }
p, ul { max-width: 55rem; margin: .5rem 0; }
h1, h2, p, li, figcaption { overflow-wrap: anywhere; }
.soft, .eliminated, figcaption { color: var(--soft); }
.scroll { overflow: auto; max-height: 32rem; width: fit-content; max-width: 100%; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { vertical-align: bottom; white-space: normal; background: var(--band); position: sticky; top: 0; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--soft); outline-offset: 2px; }
th button::after { content: "\\2195"; display: inline-block; width: 1em; color: var(--soft); font-weight: 400; }
th[aria-sort=ascending] button::after { content: "\\2191"; color: var(--ink); }
th[aria-sort=descending] button::after { content: "\\2193"; color: var(--ink); }
tbody tr:hover { background: var(--band); }
tr.best, tr.best:hover { background: var(--best); font-weight: 600; }
.text { text-align: left; }
td.long { white-space: normal; min-width: 18rem; overflow-wrap: anywhere; }
.finished { color: var(--good); } .failed, .diverged, .lacking { color: var(--bad); }
.interrupted, .paused, .waiting, .running { color: var(--wait); }
figure { margin: 1.75rem 0; }
figure img { max-width: 100%; height: auto; display: block; }
figure h3 { font-size: 1rem; margin: 0 0 .35rem; }
figcaption { font-size: .9rem; margin-top: .35rem; }
summary { cursor: pointer; }
pre { overflow-x: auto; background: var(--band); padding: .75rem; font-size: .8rem; }
@media (max-width: 40rem) { body { padding: 1rem .75rem 3rem; } ul { padding-left: 1.25rem; }
  picture { display: block; overflow-x: auto; } figure img { max-width: none; } }
@media print { th button::after { content: none; } .scroll { max-height: none; } }
"""
SCRIPT = """
const value = cell => {
  const text = cell.textContent.trim().replace(/,/g, "");
  if (/^\\d+(:\\d\\d)+$/.test(text)) return text.split(":").reduce((sum, part) => 60 * sum + Number(part), 0);
  const number = parseFloat(text);
  return Number.isNaN(number) ? text : number;
};
const order = (a, b) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;
document.querySelectorAll("th button").forEach(button => button.addEventListener("click", () => {
  const head = button.parentElement, body = head.closest("table").tBodies[0];
  const sign = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
  head.parentElement.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  [...body.rows].sort((a, b) => sign * order(value(a.cells[head.cellIndex]), value(b.cells[head.cellIndex])))
    .forEach(row => body.append(row));
}));
"""


@dataclasses.dataclass(frozen=True)
class Section:
    """What the page says of a metric.

    Attributes:
      title: the metric.
      header: of its table.
      rows: of its table.
      row_of_best: which is marked; None for none.
      remark: below the table.
      pictures: of it.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    row_of_best: int | None
    remark: str
    pictures: Sequence[Picture]


def page(
    title: str,
    *,
    standing: str,
    sections: Sequence[Section],
    remarks: Sequence[str],
    trials: tuple[Sequence[str], Sequence[Sequence[str]]],
    config: Mapping[str, Any],
) -> str:
    """Returns the page.

    Args:
      title: of the page.
      standing: how many trials ended how.
      sections: one a metric.
      remarks: what must be known besides.
      trials: header and rows of the table of all trials, whose second column is the outcome.
      config: below all trials, values by dotted key.
    """
    body = [f"<h1>{escape(title)}</h1>", f'<p class="soft">{escape(standing)}</p>']
    for section in sections:
        body.append(f"<h2>{escape(section.title)}</h2>")
        body.append(_table(section.header, section.rows, row_of_best=section.row_of_best))
        body += [f"<p>{_text(section.remark)}</p>"] if section.remark else []
        body += map(_figure, section.pictures)
    body.append("<h2>Remarks</h2>")
    body.append("<ul>" + "".join(f"<li>{_text(remark)}</li>" for remark in remarks) + "</ul>")
    body.append("<h2>Trials</h2>")
    header, rows = trials
    # Nobody looks at an empty column.
    kept = [index for index in range(len(header)) if any(row[index] for row in rows)]
    body.append(_table([header[i] for i in kept], [[row[i] for i in kept] for row in rows], outcome=1))
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in config.items())
    body.append(f"<h2>Config</h2><details><summary>below all trials</summary><pre>{escape(lines)}</pre></details>")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + f"\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, row_of_best: int | None = None, outcome: int | None = None
) -> str:
    is_text = [any(row[i] and not _begins_like_a_number(row[i]) for row in rows) for i in range(len(header))]
    # "one seed" and the like stand among numbers.
    is_text = [
        text and name not in ("95% interval", "standard deviation") for text, name in zip(is_text, header, strict=True)
    ]

    def cell(index: int, value: str) -> str:
        kinds = ["text"] * is_text[index] + ["long"] * (len(value) > 45) + [value] * (index == outcome)
        kinds += ["lacking"] * (header[index] == "seeds" and " of " in value)
        text = _text(value) if "long" in kinds else escape(value)
        return f'<td class="{escape(" ".join(kinds))}">{text}</td>' if kinds else f"<td>{text}</td>"

    head = "".join(
        f'<th{" class=text" * text} scope="col"><button>{escape(name)}</button></th>'
        for name, text in zip(header, is_text, strict=True)
    )
    lines = [
        f"<tr{' class=best' * (number == row_of_best)}>"
        + "".join(cell(i, value) for i, value in enumerate(row))
        + "</tr>"
        for number, row in enumerate(rows)
    ]
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def _text(text: str) -> str:
    """Returns text that may be wrapped behind the commas in names of trials."""
    return re.sub(r",(?=[A-Za-z])", ",<wbr>", escape(text))


def _begins_like_a_number(text: str) -> bool:
    return text == "–" or text.lstrip("-")[:1].isdigit()


def _figure(picture: Picture) -> str:
    from aaconv import plots

    light, dark = (
        "data:image/svg+xml;base64," + base64.b64encode(plots.svg(picture.draw, dark=dark).encode()).decode()
        for dark in (False, True)
    )
    return (
        f"<figure><h3>{escape(picture.title)}</h3>\n"
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">\n'
        f'<img src="{light}" alt="{escape(picture.title)}"></picture>\n'
        f"<figcaption>{escape(picture.note)}</figcaption></figure>"
    )
