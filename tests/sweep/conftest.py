"""A config that trains in seconds, and the command that sweeps it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from aaconv import checkpoints, cli, config as config_lib
from aaconv.sweep import description, records

CONFIG = """
from ml_collections import ConfigDict

def get_config(argument=""):
    c = ConfigDict()
    c.model = ConfigDict(dict(name="wrn", depth=10, width=1))
    c.data = ConfigDict(dict(name="digits", channels=1, mean=(0.3,), std=(0.4,)))
    c.batch_size, c.eval_batch_size, c.num_steps = 32, 360, 4
    c.mesh = ConfigDict(dict(data=1))
    c.log_every_steps = 2
    c.checkpoint = ConfigDict(dict(every_steps=2))
    return c

def sweep(add, argument):
    for seed in range(2):
        add({"schedule.learning_rate": 0.1}, seed=seed)
    if argument:
        add({"optimizer.momentum": float(argument)})
"""


class Answer:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture(scope="session")
def config(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def data_dir(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("tfds")))
        patch.delenv("AACONV_DEBUG", raising=False)
        yield


@pytest.fixture
def sweep(config, capfd) -> Callable[..., Answer]:
    """Calls ``aaconv sweep``; CONFIG stands for the tiny config."""

    def call(*argv: str | os.PathLike[str]) -> Answer:
        code = cli.main(["sweep", *(config if word == "CONFIG" else str(word) for word in argv)])
        return Answer(code, *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def made_up() -> Callable[..., records.Sweep]:
    """Makes up a sweep, as `_made_up` says."""
    return _made_up


def _made_up(
    workdir: Path, config: str, grid: list[str], together: list[str], result, cost=lambda overrides: 75_002, **ran
) -> records.Sweep:
    """A sweep whose finished trials have the accuracy ``result(overrides)``; None: not begun; a string: its error."""
    base = config_lib.load(config)
    cells = description.from_flags(grid, together)
    trials = [description.Trial(description.trial_name(cell), cell, cost(cell), 20 * cost(cell)) for cell in cells]
    with records.opened(checkpoints.check_writable(workdir), base, trials) as sweep:
        for trial in trials:
            value = result(trial.overrides)
            if value is not None:
                folder = sweep.folder(trial)
                folder.mkdir(parents=True)
                attempt = {"started": 1.0, "seconds": 2.0, "outcome": "finished"}
                attempt |= {name: of(trial.overrides) for name, of in ran.items()}
                if isinstance(value, str):
                    attempt |= {"outcome": "failed", "error": value}
                    records.write_json(folder / "trial.json", {"attempts": [attempt]})
                    continue
                values = {"step": 4, "epoch": 1.0, "eval/accuracy": value, "eval/loss": 2 - value}
                records.write_json(folder / "trial.json", {"attempts": [attempt], "values": values})
                rows = [{"step": step, "epoch": step / 4, "eval/accuracy": value * step / 4} for step in (1, 2, 4)]
                (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sweep
