"""``aaconv sweep report`` and ``aaconv sweep upload``."""

from __future__ import annotations

import argparse
from pathlib import Path

from aaconv.cli.arguments import Commands
from aaconv.cli.exits import OK, TRIAL_FAILED, UsageError
from aaconv.cli.loading import need_workdir
from aaconv.cli.printing import print_pairs, say


def add(commands: Commands) -> None:
    """Adds the commands and their flags, after those of ``aaconv sweep``."""
    report = commands.add(
        "sweep report",
        _report,
        "Print mean, standard deviation and 95% interval over seeds; write report.html, report.md, pictures and "
        "results.csv.",
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
    upload = commands.add(
        "sweep upload",
        _upload,
        "Send finished trials to Weights & Biases, each as a run with its config, its curves and its results.",
        workdir="folder of the sweep",
    )
    upload.add_argument("--project", metavar="NAME", help="project there")
    upload.add_argument("--entity", metavar="NAME", help="team or user there (default: the account's own)")
    upload.epilog = "A trial is sent once. WANDB_MODE=offline writes into WORKDIR/wandb instead, for `wandb sync`."


def _report(arguments: argparse.Namespace) -> int:
    from aaconv.sweep import records, report, results, tracking

    sweep = records.load(need_workdir(arguments))
    table = Path(arguments.table) if arguments.table else sweep.workdir / f"results.{arguments.format}"
    results.check_table(table)
    try:
        written = report.write_report(sweep, arguments.metric, note=say)
    except report.NothingFinishedError as error:
        say(f"aaconv: error: {error}")
        return TRIAL_FAILED
    pairs = [
        ("page", written.page),
        ("report", written.path),
        ("table", results.write_results(sweep, table, written.found)),
    ]
    tracking.write_tensorboard(sweep)
    print(written.text)
    print_pairs((name, str(path)) for name, path in pairs)
    if written.pictures is None:
        say("no pictures: run  pip install 'aaconv[plots]'  and the same command again")
    elif written.pictures:
        print_pairs([("pictures", f"{written.pictures[0].parent} ({len(written.pictures)})")])
    return OK


def _upload(arguments: argparse.Namespace) -> int:
    from aaconv.sweep import records, tracking

    sweep = records.load(need_workdir(arguments))
    if not arguments.project:
        raise UsageError("--project is missing: name the project at Weights & Biases, e.g. --project aaconv")
    sent, before = tracking.upload(sweep, arguments.project, entity=arguments.entity, note=say)
    print_pairs([("sent", f"{sent} trials"), ("before", f"{before} trials")])
    return OK
