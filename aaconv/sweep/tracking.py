"""A sweep in other people's tools: TensorBoard's view of hyperparameters, and Weights & Biases."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from aaconv import metrics
from aaconv.sweep import records, results
from aaconv.sweep.description import Trial, short_key, spell
from aaconv.sweep.records import FAILED, FINISHED, KILLED, TRIAL, Status, Sweep

UPLOADED = "wandb.json"


# TensorBoard


def write_tensorboard(sweep: Sweep) -> None:
    """Writes what TensorBoard's HParams view needs, for the sweep and its trials; nothing without tensorboardX."""
    values = _hyperparameters(sweep)
    names = list(dict.fromkeys([sweep.metric, "eval/accuracy", "eval/loss", "train/loss"]))
    domains = {key: sorted(set(several.values())) for key, several in values.items()}
    with contextlib.suppress(ImportError):
        metrics.write_hparams_of_all(sweep.workdir, domains, names, within="tensorboard")
        for trial in sweep.trials:
            _write_trial(sweep, trial, values)


def write_hparams(sweep: Sweep, trial: Trial) -> None:
    """Writes what TensorBoard's HParams view needs of a trial; nothing before it begins, or without tensorboardX."""
    with contextlib.suppress(ImportError, OSError):  # A full disk is told by the run itself.
        _write_trial(sweep, trial, _hyperparameters(sweep))


def _write_trial(sweep: Sweep, trial: Trial, values: Mapping[str, Mapping[str, Any]]) -> None:
    attempts = records.read_json(sweep.folder(trial) / TRIAL).get("attempts", [])
    if not attempts:
        return
    outcome, seconds = attempts[-1].get("outcome"), attempts[-1].get("seconds", 0.0)
    has_ended = outcome in (FINISHED, FAILED, KILLED)  # others go on
    metrics.write_hparams(
        sweep.folder(trial),
        {key: several[trial.name] for key, several in values.items()},
        name=trial.name,
        started=attempts[0]["started"],
        ended=attempts[-1]["started"] + seconds if has_ended else None,
        failed=outcome != FINISHED,
    )


def _hyperparameters(sweep: Sweep) -> dict[str, dict[str, Any]]:
    """Returns values by key and name of a trial: all numbers, all bools or all strings of one key."""
    found: dict[str, dict[str, Any]] = {}
    values = {trial.name: sweep.values(trial) for trial in sweep.trials}
    for key in sweep.columns():
        several = {name: value[key] for name, value in values.items()}
        kinds = {
            bool if isinstance(v, bool) else float if isinstance(v, int | float) else str for v in several.values()
        }
        plain = len(kinds) == 1 and kinds != {str}
        found[short_key(key)] = several if plain else {name: spell(value) for name, value in several.items()}
    for name in ("parameters", "flops"):
        several = {trial.name: getattr(trial, name) for trial in sweep.trials}
        found |= {name: several} if len(set(several.values())) > 1 else {}
    return found


# Weights & Biases


def upload(
    sweep: Sweep, project: str, *, entity: str | None = None, note: Callable[[str], None] = lambda text: None
) -> tuple[int, int]:
    """Sends finished trials to Weights & Biases, each as a run; where ``WANDB_MODE=offline``, to ``WORKDIR/wandb``.

    What was sent where stands in the trial's ``wandb.json``, and is not sent to the same project again.

    Args:
      sweep: as of `aaconv.sweep.records.load`.
      project: there.
      entity: team or user there; None: the account's own.
      note: gets a line a trial.

    Returns:
      How many trials were sent now, and how many before.

    Raises:
      ImportError: wandb is not installed.
      ValueError: no trial is finished, or wandb cannot send, as where nobody is logged in; the message has its words.
    """
    import wandb  # pyright: ignore[reportMissingImports]

    good, remarks = results.finished(sweep)
    if not good:
        raise ValueError(f"no trial of {sweep.workdir} is finished, so there is nothing to send ({'; '.join(remarks)})")
    sent = before = 0
    for status in good:
        folder = sweep.folder(status.trial)
        where = {"project": project, "entity": entity}
        runs = records.read_json(folder / UPLOADED).get("runs", [])
        if any(where.items() <= run.items() for run in runs):
            before += 1
            continue
        try:
            identity, url = _send(sweep, status, **where)
        except wandb.errors.Error as error:
            raise ValueError(
                f"wandb did not take trial {status.trial.name} for project {project!r}: {' '.join(str(error).split())} "
                f"({sent} trials were sent; the same command sends the others)"
            ) from error
        runs.append({**where, "id": identity, "url": url, "sent": time.time()})
        records.write_json(folder / UPLOADED, {"runs": runs})
        note(f"sent {status.trial.name} to {url}" if url else f"wrote {status.trial.name}, for `wandb sync`")
        sent += 1
    return sent, before


def _send(sweep: Sweep, status: Status, project: str, entity: str | None) -> tuple[str, str | None]:
    """Sends a trial; returns the name and the address of its run there, None offline."""
    import wandb  # pyright: ignore[reportMissingImports]

    trial, folder = status.trial, sweep.folder(status.trial)
    # From what it is and when it ran: sent twice, as by two people, it is one run there.
    began = records.read_json(folder / TRIAL)["attempts"][0]["started"]
    identity = hashlib.sha256(f"{sweep.identity(trial)} {began}".encode()).hexdigest()[:16]
    run = wandb.init(
        project=project,
        entity=entity,
        name=trial.name,
        id=identity,
        group=", ".join(f"{short_key(key)}={spell(value)}" for key, value in sweep.cell(trial).items()) or None,
        config=sweep.config(trial).to_dict(),
        dir=str(sweep.workdir),
        settings=wandb.Settings(console="off", silent=True, disable_git=True, x_disable_stats=True),
    )
    steps: dict[int, dict[str, float]] = {}
    for row in metrics.read_rows(folder):  # training and evaluation at one step are one step there
        steps.setdefault(row["step"], {}).update({key: value for key, value in row.items() if key != "step"})
    for step, values in steps.items():
        run.log(values, step=step)
    counts = {"parameters": trial.parameters, "flops": trial.flops, "seconds": round(status.seconds, 1)}
    run.summary.update({**status.values, **counts})
    run.finish()
    return identity, None if run.offline else run.url
