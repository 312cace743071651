"""How fast photographs are decoded and cropped, and by how many workers: ``aaconv bench input``."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from aaconv import config as config_lib, data
from aaconv.bench import recipe, report, timing
from aaconv.config import ConfigDict
from aaconv.data import catalog, images, photographs

COUNT = 256  # made-up photographs, 28 MB: they come from the cache of the disk, as decoding is what is measured
ROUNDS, SECONDS, BATCH, FEED = 5, 5.0, 64, 1000.0
ENOUGH = 0.95  # of the fastest: more workers than that takes bring nothing
DECODING = "decode and crop alone"

Note = Callable[[str], None]


@dataclasses.dataclass
class Row:
    """One way of decoding; the columns of ``input.csv``, after the machine's.

    Attributes:
      data: name of the set.
      mean_bytes, mean_pixels: of its files.
      size: side of the crops, pixels.
      batch: images a batch.
      what: `DECODING`, which is a loop over images in one thread without a pipeline, or who works in the pipeline.
      num_workers: processes, as of ``data.num_workers``; None for the loop.
      busy: threads or processes that decode.
      images_per_s: median over the rounds; ``_q1`` and ``_q3`` the quartiles, ``_rounds`` how many.
      images_per_s_per_core: divided by the cores that it can use, which are no more than there are.
    """

    data: str
    mean_bytes: int
    mean_pixels: int
    size: int
    batch: int
    what: str
    num_workers: int | None
    busy: int
    images_per_s: float | None = None
    images_per_s_q1: float | None = None
    images_per_s_q3: float | None = None
    images_per_s_rounds: int | None = None
    images_per_s_per_core: float | None = None

    def set_rates(self, rates: Sequence[float]) -> None:
        times = timing.Times(rates)
        self.images_per_s, self.images_per_s_rounds = times.median, len(rates)
        self.images_per_s_q1, self.images_per_s_q3 = times.quartiles
        self.images_per_s_per_core = times.median / min(self.busy, report.cores())


def run(
    recipe_file: str = "",
    *,
    overrides: Sequence[str] = (),
    workers: Sequence[int] = (),
    size: int | None = None,
    batch: int = BATCH,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    feed: float = FEED,
    output: str | os.PathLike[str] = "runs/bench/input",
    note: Note = lambda text: print(text, file=sys.stderr, flush=True),
) -> list[Row]:
    """Measures decoding with random-resized crops, prints a table, and writes ``input.csv``.

    First a loop over single images, which is what a core can do; then the pipeline of training, with threads and
    with growing numbers of worker processes. The ways take turns, `rounds` times, each started anew.

    Args:
      recipe_file: a config whose set has to be decoded, e.g. that of the ImageNet ResNets; by default photographs
        of ImageNet's mean size are made up.
      overrides: ``key=value`` for it.
      workers: numbers of processes, 0 being threads; by default 0, 1, 2, 4 .. up to the cores, and one more.
      size: side of the crops in pixels; by default the config's, 224 for the made-up ones.
      batch: images a batch.
      rounds: times that each way is measured.
      seconds: of each measurement, at least.
      feed: images a second to say the number of cores for.
      output: folder of the file.
      note: gets lines of progress.

    Raises:
      ValueError: a key is unknown, the set is not there or needs no decoding, or the folder cannot be written.
    """
    workers = list(dict.fromkeys(workers)) or _ladder(report.cores())
    settings = [*overrides, f"batch_size={batch}", "data.placement=workers", "data.augment.random_resized_crop=true"]
    settings += [f"data.image_size={size}"] if size else []
    with _config(recipe_file, settings, note) as config:
        files = catalog.find(config.data.name, catalog.locate(config))
        if files.stored_shape is not None:
            raise ValueError(
                f"the images of data.name={config.data.name!r} are all of one size and are decoded once, before "
                "training: name a config of photographs, or leave --config out"
            )
        examples = files.examples(config.data.train_split, key="data.train_split")
        mean_bytes, mean_pixels = _means(examples)
        side = config.data.image_size
        about = files.name, mean_bytes, mean_pixels, side, batch
        ways: dict[int | None, Row] = {None: Row(*about, DECODING, None, 1)}
        for number in workers:
            busy = number or min(report.cores(), 16)
            what = f"{busy} process{'es' * (busy > 1)}" if number else f"{busy} thread{'s' * (busy > 1)}"
            ways[number] = Row(*about, what, number, busy)
        machine = report.machine()
        columns = [*machine, *(field.name for field in dataclasses.fields(Row))]
        with report.Csv(Path(output) / "input.csv", columns) as file:
            print(report.describe(machine))
            print(
                f"{files.name}, {len(examples):,} files of {mean_bytes / 1e3:.0f} kB and {mean_pixels:,} pixels on "
                f"average, random-resized crops to {side} x {side}, batches of {batch}",
                flush=True,
            )
            rates: dict[int | None, list[float]] = {way: [] for way in ways}
            for turn in range(1, rounds + 1):
                for way, row in ways.items():
                    note(f"round {turn}/{rounds}: {row.what}")
                    rates[way].append(
                        _loop_rate(config, examples, seconds) if way is None else _rate(config, way, seconds)
                    )
            for way, row in ways.items():
                row.set_rates(rates[way])
                file.write({**machine, **dataclasses.asdict(row)})
    print(f"written {file.path}\n\n{LEGEND}\n\n{_table(list(ways.values()))}\n\n{_verdict(list(ways.values()), feed)}")
    return list(ways.values())


@contextlib.contextmanager
def _config(file: str, settings: Sequence[str], note: Note) -> Iterator[ConfigDict]:
    if file:
        yield config_lib.load(file, settings)
        return
    with tempfile.TemporaryDirectory() as folder:
        note(f"making {COUNT} photographs")
        photographs.prepare(Path(folder), COUNT)
        made_up = ["model.name=resnet50", f"data.name={photographs.NAME}", f"data.data_dir={folder}"]
        yield config_lib.load(recipe.__file__, [*made_up, "data.image_size=224", *settings])


def _ladder(cores: int) -> list[int]:
    powers = itertools.takewhile(lambda number: number < cores, (2**i for i in itertools.count()))
    return [0, *powers, cores, cores + 1]


def _means(examples: catalog.Examples) -> tuple[int, int]:
    found = [examples[int(index)][0] for index in np.linspace(0, len(examples) - 1, min(100, len(examples)))]
    shapes = [images.decode(encoded, 3, where="that is measured").shape for encoded in found]
    return round(np.mean([len(encoded) for encoded in found])), round(np.mean([h * w for h, w, _ in shapes]))


def _loop_rate(config: ConfigDict, examples: catalog.Examples, seconds: float) -> float:
    """Images a second of one thread that reads, decodes and crops one image after the other."""
    side, generator = config.data.image_size, np.random.default_rng(0)
    order = itertools.cycle(generator.permutation(len(examples)))

    def crop() -> None:
        encoded, _ = examples[int(next(order))]
        images.decode_random_crop(
            encoded, (side, side), 3, generator, min_area=config.data.augment.min_area, where="that is measured"
        )

    crop()
    began, count = time.perf_counter(), 0
    while time.perf_counter() < began + seconds:
        crop()
        count += 1
    return count / (time.perf_counter() - began)


def _rate(config: ConfigDict, num_workers: int, seconds: float) -> float:
    """Images a second that the pipeline gives to somebody who takes them at once."""
    with config.unlocked():
        config.data.num_workers = num_workers
    batches = iter(data.train_input(config))
    try:
        # What was made ahead while the workers started is taken first: they hold two batches each, threads one.
        together = max(num_workers, 1)
        for _ in range(4 * together if num_workers else report.cores() + 3):
            next(batches)
        began, count = time.perf_counter(), 0
        # Workers finish at about the same time, so that only whole turns of them can be counted.
        while time.perf_counter() < began + seconds or count % together:
            next(batches)
            count += 1
        return count * config.batch_size / (time.perf_counter() - began)
    finally:
        batches.close()


LEGEND = (
    "Medians over the rounds (quartiles in brackets), the ways in turn. a core: divided by the cores that are used. /\n"
    "alone: as a share of the first line, one thread without a pipeline. Threads share Python's interpreter lock."
)


def _table(rows: Sequence[Row]) -> str:
    body = [
        [
            row.what,
            f"{row.images_per_s:,.0f} ({row.images_per_s_q1:,.0f}-{row.images_per_s_q3:,.0f})",
            f"{row.images_per_s_per_core:,.0f}",
            report.ratio(row.images_per_s, rows[0].images_per_s),
        ]
        for row in rows
    ]
    return report.table(["who decodes", "images / s", "a core", "/ alone"], body)


def _verdict(rows: Sequence[Row], feed: float) -> str:
    pipeline = [(row, row.images_per_s or 0.0) for row in rows[1:]]
    best = max(rate for _, rate in pipeline)
    enough = next(row for row, rate in pipeline if rate >= ENOUGH * best)
    cores = report.cores()
    return (
        f"The pipeline gives up to {best:,.0f} images/s on {cores} cores; {enough.what} reach {ENOUGH:.0%} of that.\n"
        f"A device that takes {feed:,.0f} images/s is fed by {math.ceil(feed * cores / best)} such cores."
    )
