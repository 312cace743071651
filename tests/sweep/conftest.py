"""A config that trains in seconds, and the command that sweeps it."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from aaconv import cli

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
