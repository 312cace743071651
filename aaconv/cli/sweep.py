"""``aaconv sweep`` and ``aaconv sweep status``."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from aaconv.cli.arguments import Commands, at_least_one, at_least_zero
from aaconv.cli.cluster import add_halving, add_slurm, read_halving, read_slurm
from aaconv.cli.exits import OK, TRIAL_FAILED
from aaconv.cli.loading import load_config, need_workdir
from aaconv.cli.printing import make_console, make_table, print_pairs, say

if TYPE_CHECKING:
    from aaconv.config import ConfigDict
    from aaconv.sweep.description import Trial
    from aaconv.sweep.halving import Halving
    from aaconv.sweep.records import Sweep
    from aaconv.sweep.slurm import Resources


def add(commands: Commands) -> None:
    """Adds the commands and their flags."""
    sweep = commands.add(
        "sweep",
        _sweep,
        "Run what is missing of a sweep: all trials that the config's sweep(add), or --grid and --zip, describe.",
        config="config file, e.g. configs/digits_sweep.py",
        workdir="folder of the sweep: its description, trials/, results.csv",
    )
    sweep.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="KEY=VALUES",
        help="values of a key, e.g. model.kappa=0.1,0.2 or seed=0:3 (0, 1, 2) or 'model.stages=(2,3),(3,)'; repeated: "
        "all combinations",
    )
    sweep.add_argument(
        "--zip",
        action="append",
        default=[],
        metavar="KEY=VALUES",
        help="likewise, but lists of one length: the first values belong together, and so on",
    )
    sweep.add_argument(
        "--invalid",
        default="error",
        choices=("error", "skip"),
        help="what to do with a trial that cannot be run, as its config or its shapes say (default: error)",
    )
    sweep.add_argument("--dry-run", action="store_true", help="print the trials, with what each costs, and run nothing")
    sweep.add_argument(
        "--jobs",
        type=at_least_one,
        default=1,
        metavar="N",
        help="processes at a time, each with its share of the machine",
    )
    sweep.add_argument(
        "--retries", type=at_least_zero, default=0, metavar="K", help="times a failed trial is tried again (default: 0)"
    )
    add_halving(sweep)
    add_slurm(sweep)
    sweep.epilog = f"`aaconv sweep status` and `aaconv sweep report` say how it goes and what came out. {sweep.epilog}"
    commands.add_kinds("sweep")
    commands.add("sweep status", _status, "Print how each trial stands.", workdir="folder of the sweep")


def _sweep(arguments: argparse.Namespace) -> int:
    base = load_config(arguments, or_workdir=False)
    if not arguments.dry_run:
        need_workdir(arguments)
    from aaconv import config as config_lib
    from aaconv.sweep import description, records

    halving_of = read_halving(arguments, base.checkpoint.best_metric or records.DEFAULT_METRIC)
    resources = read_slurm(arguments)

    if arguments.grid or arguments.zip:
        cells = description.from_flags(arguments.grid, arguments.zip)
    else:
        function = config_lib.sweep_function(arguments.config)
        if function is None:
            raise ValueError(
                f"{arguments.config} describes no sweep: add a function sweep(add) to it, or give --grid KEY=VALUES"
            )
        cells = description.from_function(function, arguments.config)
    elsewhere = arguments.jobs > 1 or resources is not None
    if elsewhere:
        import jax

        # Other processes take the accelerators; here shapes are all that is asked for.
        jax.config.update("jax_platforms", "cpu")
    trials, invalid = description.describe(
        base, cells, check_devices=not elsewhere, need_data=not arguments.dry_run, note=say
    )
    for cell in invalid:
        say(f"cannot be run: {cell.name}: {cell.reason}")
    if arguments.dry_run and trials:
        _print_trials(trials)
        if arguments.workdir:
            _print_what_is_there(records.checked(records.local(arguments.workdir), base, trials, note=say))
    if invalid and (arguments.invalid == "error" or not trials):
        of = f"{len(invalid)} of {len(cells)} trials cannot be run"
        raise ValueError(f"{of}, as said above: change them" + (", or add --invalid skip" if trials else ""))
    return OK if arguments.dry_run else _run_sweep(arguments, base, trials, resources, halving_of)


def _print_trials(trials: Sequence[Trial]) -> None:
    table = make_table("trial", "parameters", "MFLOPs", "MB at least", text=1)
    for trial in trials:
        table.add_row(trial.name, f"{trial.parameters:,}", f"{trial.flops / 1e6:,.2f}", f"{trial.memory / 1e6:,.1f}")
    make_console().print(table)
    print(
        f"{len(trials)} trials; FLOPs for one image; MB: what a training step cannot do without on each device; "
        "compiled steps took up to twice as much, `aaconv compile` says it exactly"
    )


def _print_what_is_there(sweep: Sweep) -> None:
    from aaconv.sweep import running

    done = sum(running.is_finished(sweep, trial) for trial in sweep.trials)
    print(f"{done} of {len(sweep.trials)} are finished in {sweep.workdir}")


def _run_sweep(
    arguments: argparse.Namespace,
    base: ConfigDict,
    trials: Sequence[Trial],
    resources: Resources | None,
    halving_of: Callable[[Sweep], Halving | None],
) -> int:
    from aaconv import checkpoints
    from aaconv.sweep import display, records, results, running, slurm, tracking

    workdir = checkpoints.check_writable(records.local(arguments.workdir))
    if (arguments.jobs > 1 or resources) and not records.has_locks(workdir):
        raise ValueError(
            f"the file system of {workdir} has no locks (flock), without which several processes would run the same "
            "trial: name a --workdir on another one, or leave out --jobs and --slurm and start one launcher only"
        )
    with records.opened(workdir, base, trials, note=say) as sweep:
        halving = halving_of(sweep)
        tracking.write_tensorboard(sweep)
        try:
            found = running.run(
                sweep,
                jobs=arguments.jobs,
                retries=arguments.retries,
                parts=halving.parts if halving else None,
                cluster=slurm.Cluster(sweep, resources, note=say).run if resources else None,
                displayed=partial(display.displayed, sweep),
                note=say,
            )
        finally:
            results.write_results(sweep)
            tracking.write_tensorboard(sweep)
    failed = [status for status in found if status.state not in ("finished", "eliminated")]
    for status in failed:
        say(f"{status.state}: {status.trial.name}, {sweep.folder(status.trial) / records.OUTPUT}")
        for line in status.error.splitlines():
            say(f"  {line}")
    pairs = [("trials", display.summary(sweep, found)), ("results", str(sweep.workdir / results.RESULTS))]
    print_pairs([*pairs, ("table", f"aaconv sweep report --workdir {shlex.quote(arguments.workdir)}")])
    return TRIAL_FAILED if failed else OK


def _status(arguments: argparse.Namespace) -> int:
    from aaconv.sweep import display, halving, records

    sweep = records.load(need_workdir(arguments))
    make_console().print(display.table(sweep, records.statuses(sweep)))
    for line in halving.describe(sweep.workdir):
        print(line)
    return OK
