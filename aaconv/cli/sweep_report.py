"""``aaconv sweep report``."""

from __future__ import annotations

import argparse
from pathlib import Path

from aaconv.cli.arguments import Commands
from aaconv.cli.exits import OK, TRIAL_FAILED
from aaconv.cli.loading import need_workdir
from aaconv.cli.printing import print_pairs, say


def add(commands: Commands) -> None:
    """Adds the command and its flags, after those of ``aaconv sweep``."""
    report = commands.add(
        "sweep report",
        _report,
        "Print mean, deviation and 95% interval over seeds; write report.html, report.md, pictures and results.csv.",
        workdir="folder of the sweep",
    )
    report.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="a table and pictures each, e.g. eval/loss (default: the config's checkpoint.best_metric)",
    )
    report.add_argument(
        "--format",
        choices=("csv", "parquet"),
        default="csv",
        help="of the tidy table, results.csv or results.parquet in the workdir (default: csv)",
    )
    report.add_argument("--table", metavar="FILE", help="the tidy table's file instead, .csv or .parquet")


def _report(arguments: argparse.Namespace) -> int:
    from aaconv.sweep import records, report, results

    sweep = records.load(need_workdir(arguments))
    table = Path(arguments.table) if arguments.table else sweep.workdir / f"results.{arguments.format}"
    results.check_table(table)
    try:
        written = report.write_report(sweep, arguments.metric, note=say)
    except report.NothingFinishedError as error:
        say(f"error: {error}")
        return TRIAL_FAILED
    pairs = [("page", written.page), ("report", written.path), ("table", results.write_results(sweep, table))]
    print(written.text)
    print_pairs((name, str(path)) for name, path in pairs)
    if written.pictures is None:
        say("no pictures: run  pip install 'aaconv[plots]'  and the same command again")
    elif written.pictures:
        print_pairs([("pictures", f"{written.pictures[0].parent} ({len(written.pictures)})")])
    return OK
