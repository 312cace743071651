"""What feeds training and evaluation: grain pipelines over prepared data sets.

The order of examples is one global sequence, a function of the seed and the epoch alone.
Batch ``i`` is its ``i``-th run of ``batch_size`` examples, and process ``p`` of ``P`` holds
the ``p``-th of ``P`` equal blocks of it. So the batches of all processes, put together in
the order of the processes, are the same whatever their number.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import TYPE_CHECKING, Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from aaconv.data import augment, catalog, images
from aaconv.data.catalog import DataFiles, DatasetInfo, Examples

if TYPE_CHECKING:
    from aaconv.config import ConfigDict

MEMORY_LIMIT = 2**30  # bytes of decoded images that placement="auto" keeps in memory or on the device
_RUN = 500  # examples read at once when a set is decoded as a whole

Batch = dict[str, np.ndarray]


class TrainInput:
    """The training half of a data set, as one process sees it; made by `train_input`.

    Iterating gives batches without end: ``{"index": int32 (b,)}`` where the images lie on the
    device (`resident`), else ``{"image": uint8 (b, h, w, c), "label": int32 (b,)}``, with b the
    batch size of this process.

    Attributes:
      steps_per_epoch: full batches in one pass over the data; the rest of an epoch, a
        different one each time, is dropped.
      placement: "device", "memory" or "workers".
      resident: None, or the arrays to put on the device once and to hand to `prepare`.
    """

    def __init__(
        self,
        dataset: grain.MapDataset,
        *,
        steps_per_epoch: int,
        placement: str,
        resident: Batch | None,
        num_workers: int,
        identity: dict[str, Any],
        config: ConfigDict,
    ):
        self.steps_per_epoch = steps_per_epoch
        self.placement = placement
        self.resident = resident
        self._dataset = dataset
        self._num_workers = num_workers
        self._identity = identity
        self._mean, self._std = tuple(config.data.mean), tuple(config.data.std)
        self._padding, self._flip = config.data.augment.crop_padding, config.data.augment.flip

    def __iter__(self) -> TrainIterator:
        return TrainIterator(
            lambda taken: _stream(self._dataset[taken:], self.placement, self._num_workers), self._identity
        )

    def prepare(
        self,
        batch: Mapping[str, jax.Array],
        key: jax.Array,
        resident: Mapping[str, jax.Array] | None = None,
    ) -> dict[str, jax.Array]:
        """Turns a batch into what the network is fed; pure, to be called inside the jitted step.

        Args:
          batch: what the iterator gave, of one process or, as a global array, of all.
          key: a typed key, already folded with the step.
          resident: the arrays of `resident` on the device, where there are any.

        Returns:
          ``{"image": float32 (b, h, w, c), "label": int32 (b,)}``: randomly cropped, flipped
          and normalised as the config says.
        """
        if resident is not None:
            index = batch["index"]
            batch = {name: jnp.take(array, index, axis=0, mode="clip") for name, array in resident.items()}
        crop_key, flip_key = jax.random.split(key)
        image = augment.random_crop(crop_key, batch["image"], self._padding)
        if self._flip:
            image = augment.random_flip(flip_key, image)
        return {"image": augment.normalise(image, self._mean, self._std), "label": batch["label"]}


class TrainIterator(Iterator[Batch]):
    """Batches without end, whose position can be saved and restored.

    The state is the number of batches taken and what they were drawn from. It does not
    depend on the process, on the number of processes or workers, or on the placement.
    Workers start with the first batch.
    """

    def __init__(self, start: Callable[[int], grain.DatasetIterator], identity: dict[str, Any]):
        self._start = start  # opens the pipeline after so many batches
        self._identity = identity
        self._taken = 0
        self._streams: list[grain.DatasetIterator] = []  # none or one
        # Worker processes and their shared memory have to go before the interpreter does.
        weakref.finalize(self, _close_all, self._streams)

    def __next__(self) -> Batch:
        if not self._streams:
            self._streams.append(self._start(self._taken))
        batch = next(self._streams[0])
        self._taken += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns a JSON-able dictionary that `set_state` continues from, exactly."""
        return {"batches": self._taken, **self._identity}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to where `get_state` was called.

        Raises:
          ValueError: the state is of another data set, split, seed or batch size, or of a version with another order.
        """
        for key, value in self._identity.items():
            if key not in state:
                raise ValueError(
                    f"the saved position has no {key}={value!r}: it is of a version of aaconv with another order of "
                    "the data; continue with that version, or start in a new workdir"
                )
            if state[key] != value:
                raise ValueError(
                    f"the saved position belongs to {key}={state.get(key)!r} but this run has {value!r}: the order "
                    "of the data would differ; restore that value or start in a new workdir"
                )
        self.close()
        self._taken = int(state["batches"])

    def close(self) -> None:
        """Ends worker processes and threads; a further `next` starts them again."""
        _close_all(self._streams)


class EvalInput:
    """The evaluation half of a data set, as one process sees it; made by `eval_input`.

    Iterating gives ``num_batches`` batches ``{"image": uint8 (b, h, w, c), "label": int32 (b,),
    "mask": bool (b,)}``, all of one shape. Over all processes each image comes exactly once
    with mask True; the padding of the last batch has mask False.

    Attributes:
      num_batches: the same in every process.
    """

    def __init__(
        self, dataset: grain.MapDataset, *, num_batches: int, placement: str, num_workers: int, config: ConfigDict
    ):
        self.num_batches = num_batches
        self.placement = placement
        self._dataset = dataset
        self._num_workers = num_workers
        self._mean, self._std = tuple(config.data.mean), tuple(config.data.std)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        stream = _stream(self._dataset, self.placement, min(self._num_workers, self.num_batches))
        try:
            yield from stream
        finally:
            stream.close()

    def prepare(self, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Normalises a batch; pure, to be called inside the jitted step."""
        return {**batch, "image": augment.normalise(batch["image"], self._mean, self._std)}


def train_input(config: ConfigDict, process_index: int = 0, process_count: int = 1) -> TrainInput:
    """Opens the training split.

    Where the images lie is `config.data.placement`:

    - ``"device"``: decoded once, handed out as `TrainInput.resident` to be put on the device;
      the iterator gives indices only, and augmentation runs inside the step.
    - ``"memory"``: decoded once into the host's memory.
    - ``"workers"``: decoded as they are needed, in `config.data.num_workers` processes, or in
      threads where that is 0. Random-resized crops happen here.
    - ``"auto"``: sets of one stored size that decode to less than 1 GiB go to "device" on an
      accelerator and "memory" on a CPU; photographs, larger sets and those with
      `config.data.augment.random_resized_crop` go to "workers".

    Args:
      config: the run's config.
      process_index: which of the processes this is.
      process_count: how many share each batch.

    Raises:
      ValueError: the data set, the split or the config does not fit; see `aaconv.data.catalog`.
    """
    files = catalog.find(config.data.name, catalog.locate(config))
    shape = catalog.image_shape(config, files)
    examples = files.examples(config.data.train_split, key="data.train_split")
    local = _local_batch(config.batch_size, "batch_size", process_index, process_count)
    steps = len(examples) // config.batch_size
    if not steps:
        raise ValueError(
            f"batch_size={config.batch_size} is larger than the {len(examples)} images of "
            f"data.train_split={config.data.train_split!r} in {files.name}: lower batch_size or take a larger split"
        )
    placement = _placement(config, files, shape, len(examples))
    order = _Order(len(examples), config.seed)
    resident = None
    if placement == "workers":
        places = grain.MapDataset.range(steps * config.batch_size).seed(config.seed)
        shuffled = places.map_with_index(_Blocks(order, len(places), 1)).map(lambda block: int(block[0]))
        cut = _TrainCut(examples, shape, config) if config.data.augment.random_resized_crop else None
        decoded = shuffled.random_map(cut) if cut else shuffled.map(_EvalCut(examples, shape, _share(config, files)))
        batches = decoded.batch(local)
    else:
        arrays = _decode_all(_EvalCut(examples, shape, _share(config, files)), shape)
        blocks = grain.MapDataset.range(steps * process_count)
        batches = blocks.map_with_index(_Blocks(order, len(blocks), local))
        if placement == "device":
            resident = arrays
            batches = batches.map(lambda index: {"index": index})
        else:
            batches = batches.map(lambda index: {name: array[index] for name, array in arrays.items()})
    return TrainInput(
        # Slicing whole batches gives this process its block of every global batch.
        batches[process_index::process_count].repeat(),
        steps_per_epoch=steps,
        placement=placement,
        resident=resident,
        num_workers=config.data.num_workers,
        identity={
            "dataset": files.name,
            "split": config.data.train_split,
            "seed": config.seed,
            "batch_size": config.batch_size,
            "order": _Order.NAME,
        },
        config=config,
    )


def eval_input(config: ConfigDict, process_index: int = 0, process_count: int = 1) -> EvalInput:
    """Opens the evaluation split; see `train_input` for the arguments and errors.

    Small sets are decoded once and kept in memory; the others are decoded on each pass.
    """
    files = catalog.find(config.data.name, catalog.locate(config))
    shape = catalog.image_shape(config, files)
    examples = files.examples(config.data.eval_split, key="data.eval_split")
    local = _local_batch(config.eval_batch_size, "eval_batch_size", process_index, process_count)
    num_batches = -(-len(examples) // config.eval_batch_size)
    positions = grain.MapDataset.range(num_batches * config.eval_batch_size)
    cut = _EvalCut(examples, shape, _share(config, files))
    placement = _placement(config, files, shape, len(examples), training=False)
    if placement == "workers":
        batches = positions.map(_MaskedCut(cut)).batch(local)
    else:
        batches = positions.batch(local, batch_fn=_indices).map(_MaskedTake(_decode_all(cut, shape)))
    return EvalInput(
        batches[process_index::process_count],
        num_batches=num_batches,
        placement=placement,
        num_workers=config.data.num_workers,
        config=config,
    )


def preprocess_image(config: ConfigDict, image: np.ndarray, info: DatasetInfo | None = None) -> np.ndarray:
    """Cuts and resizes one image as evaluation does.

    Photographs' networks see the central `config.data.augment.eval_crop`; those of sets of one
    stored size see the whole central square. An image of the right size is left alone.

    Args:
      config: the run's config.
      image: uint8 ``(h, w, c)`` of any size.
      info: what `aaconv.data.info` gives; None: it is asked, which takes the data set.

    Returns:
      uint8 of `info.image_shape`.

    Raises:
      ValueError: the array is not uint8, or has other channels than the config.
    """
    info = info or catalog.info(config)
    if image.dtype != np.uint8:
        raise ValueError(f"the image is {image.dtype}, not uint8: scale it to whole numbers from 0 to 255")
    if image.ndim != 3 or image.shape[-1] != config.data.channels:
        raise ValueError(
            f"the image has shape {image.shape}: it must be (height, width, {config.data.channels}), as "
            f"data.channels={config.data.channels} says"
        )
    share = config.data.augment.eval_crop if info.decoded else 1.0
    return images.resize_central(image, (info.image_shape[0], info.image_shape[1]), share=share)


class _Order:
    """The order of the examples in each epoch: a permutation of all, drawn from the seed and the epoch.

    Not grain's shuffle. It works out each example's place by itself, so as to keep no list, by a cipher on 16 bits that
    is repeated until it falls within the set: 13 us for one of 1,437 examples, 0.9 ms a batch of 64 (grain 0.2.18, on
    an Intel Xeon), which a small network's step on a CPU feels. Two epochs are kept, 10 MB of ImageNet's.

    The order is that of random numbers of 64 bits. What a bit generator gives for a seed is fixed for good; numpy does
    not promise that of a Generator's permutation, and a run may go on with another numpy.
    """

    NAME = "sorted PCG64"
    """What a saved position belongs to; another way to draw needs another name."""

    def __init__(self, num_examples: int, seed: int):
        self._num_examples, self._seed = num_examples, seed
        self._epochs: dict[int, np.ndarray] = {}

    def __call__(self, epoch: int) -> np.ndarray:
        """Returns the indices of the examples, int32 ``(num_examples,)``."""
        order = self._epochs.get(epoch)
        if order is None:
            drawn = np.random.PCG64((self._seed, epoch)).random_raw(self._num_examples)
            order = np.argsort(drawn, kind="stable").astype(np.int32)
            order.setflags(write=False)  # batches are parts of it
            # With the one before: where threads read ahead they are in both for a while.
            before = {e: found for e, found in self._epochs.items() if e == epoch - 1}
            self._epochs = before | {epoch: order}
        return order


class _Blocks:
    """Maps the number of a block, counted on over all epochs, to the indices of its examples, int32 ``(size,)``."""

    def __init__(self, order: _Order, num_blocks: int, size: int):
        self._order, self._num_blocks, self._size = order, num_blocks, size

    def __call__(self, index: int, _: int) -> np.ndarray:
        epoch, block = divmod(index, self._num_blocks)
        return self._order(epoch)[block * self._size : (block + 1) * self._size]


class _EvalCut:
    """Maps an example's index to its image, cut and resized without chance, and its label."""

    def __init__(self, examples: Examples, shape: tuple[int, int, int], share: float):
        self.examples, self.shape, self.share = examples, shape, share

    def __call__(self, index: int) -> Batch:
        encoded, label = self.examples[index]
        return {"image": self.cut(encoded, index), "label": np.asarray(label, np.int32)}

    def cut(self, encoded: bytes, index: int) -> np.ndarray:
        height, width, channels = self.shape
        where = f"of example {self.examples.where(index)}"
        if self.examples.files.stored_shape is None:
            return images.decode_central_crop(encoded, (height, width), channels, share=self.share, where=where)
        return images.resize_central(images.decode(encoded, channels, where=where), (height, width))


class _TrainCut(grain.transforms.RandomMap):
    """Maps an example's index to a random-resized crop of its image, and its label."""

    def __init__(self, examples: Examples, shape: tuple[int, int, int], config: ConfigDict):
        self.examples, self.shape, self.min_area = examples, shape, config.data.augment.min_area

    def random_map(self, element: int, rng: np.random.Generator) -> Batch:
        encoded, label = self.examples[element]
        where = f"of example {self.examples.where(element)}"
        height, width, channels = self.shape
        image = images.decode_random_crop(encoded, (height, width), channels, rng, min_area=self.min_area, where=where)
        return {"image": image, "label": np.asarray(label, np.int32)}


class _MaskedCut:
    """`_EvalCut` with a mask, and black images past the end."""

    def __init__(self, cut: _EvalCut):
        self.cut = cut

    def __call__(self, index: int) -> Batch:
        if index < len(self.cut.examples):
            return {**self.cut(index), "mask": np.asarray(True)}
        return {
            "image": np.zeros(self.cut.shape, np.uint8),
            "label": np.asarray(0, np.int32),
            "mask": np.asarray(False),
        }


class _MaskedTake:
    """Maps a batch of positions to images in memory with a mask, and black images past the end."""

    def __init__(self, arrays: Batch):
        self.arrays = arrays

    def __call__(self, index: np.ndarray) -> Batch:
        mask = index < len(self.arrays["label"])
        batch = {name: array[np.where(mask, index, 0)] for name, array in self.arrays.items()}
        for array in batch.values():
            array[~mask] = 0
        return {**batch, "mask": mask}


def _indices(values: Any) -> np.ndarray:
    return np.asarray(values, np.int32)


def _decode_all(cut: _EvalCut, shape: tuple[int, int, int]) -> Batch:
    count = len(cut.examples)
    image, label = np.empty((count, *shape), np.uint8), np.empty(count, np.int32)

    def decode(start: int) -> None:
        for index, (encoded, number) in enumerate(cut.examples.read(start, min(start + _RUN, count)), start):
            image[index], label[index] = cut.cut(encoded, index), number

    with futures.ThreadPoolExecutor(_cpus()) as pool:
        for _ in pool.map(decode, range(0, count, _RUN)):
            pass
    return {"image": image, "label": label}


def _stream(dataset: grain.MapDataset, placement: str, num_workers: int) -> grain.DatasetIterator:
    """Starts a pipeline whose elements are whole batches."""
    if placement != "workers":
        # What is in memory is there sooner than a thread could be asked for it.
        return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
    if num_workers == 0:
        threads = min(_cpus(), 16)  # more would wait for the interpreter
        return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 2)))
    # grain reads absl flags when it starts workers, and they refuse before somebody has parsed them.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    return iter(
        dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
        .mp_prefetch(grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=2), _settle_worker)
        .map(_owned)
    )


def _settle_worker(worker_index: int, worker_count: int) -> None:
    """Ties a worker's life to its parent's: it ends with it, and by nobody else's signal.

    A scheduler signals the whole process group; the parent still wants batches until it has
    saved and stopped.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _close_all(streams: list[grain.DatasetIterator]) -> None:
    while streams:
        streams.pop().close()


def _owned(batch: Batch) -> Batch:
    """Copies a worker's batch out of shared memory, which must not outlive the worker."""
    return {name: np.array(array) for name, array in batch.items()}


def _placement(
    config: ConfigDict, files: DataFiles, shape: tuple[int, int, int], count: int, *, training: bool = True
) -> str:
    placement, random_crop = config.data.placement, training and config.data.augment.random_resized_crop
    if placement == "auto":
        small = files.stored_shape is not None and count * int(np.prod(shape)) < MEMORY_LIMIT
        if random_crop or not small:
            return "workers"
        return "memory" if jax.default_backend() == "cpu" else "device"
    if random_crop and placement != "workers":
        raise ValueError(
            f"data.placement={placement!r} keeps images already cut, but data.augment.random_resized_crop=True cuts "
            'them anew each time: set data.placement="workers" (or "auto"), or switch the crop off'
        )
    return placement


def _share(config: ConfigDict, files: DataFiles) -> float:
    return config.data.augment.eval_crop if files.stored_shape is None else 1.0


def _local_batch(size: int, key: str, process_index: int, process_count: int) -> int:
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index={process_index} must lie between 0 and process_count - 1 = {process_count - 1}"
        )
    if size % process_count:
        raise ValueError(
            f"{key}={size} does not divide among {process_count} processes: use a multiple of {process_count}"
        )
    return size // process_count


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
