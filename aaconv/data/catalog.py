"""Prepared TFDS data sets: where they lie, what is in them, and how one is made.

A data set is found from its files alone (``DATA_DIR/NAME[/CONFIG]/VERSION``), so reading
needs neither TensorFlow nor the code that prepared it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from aaconv.data import own
from aaconv.errors import close_matches

if TYPE_CHECKING:
    from aaconv.config import ConfigDict

_NAME = re.compile(r"(?P<name>\w[\w.-]*)(/(?P<config>[\w.+-]+))?(:(?P<version>\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


class NotPrepared(ValueError):
    """The data set is known, but its files are not in the folder."""


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What a run needs to know of its data.

    Attributes:
      name: full TFDS name with version, e.g. ``cifar100/3.0.2``.
      num_classes: number of labels.
      num_train: images in ``data.train_split``.
      num_eval: images in ``data.eval_split``.
      image_shape: ``(h, w, c)`` as fed to the network.
      label_names: a name a class, in the order of the labels.
      decoded: True for photographs: stored at varying sizes, so decoded and cut to
        ``image_shape`` while training runs. False for sets of one stored size.
    """

    name: str
    num_classes: int
    num_train: int
    num_eval: int
    image_shape: tuple[int, int, int]
    label_names: tuple[str, ...]
    decoded: bool


@dataclasses.dataclass(frozen=True)
class DataFiles:
    """A prepared data set on disk, checked to hold labelled uint8 images.

    Attributes:
      folder: the version's folder.
      name: full TFDS name with version.
      image_key: the feature with the image.
      label_key: the feature with the label.
      stored_shape: ``(h, w)``, or None where the images differ in size.
      stored_channels: channels of the stored images, or None where they differ.
      label_names: a name a class.
    """

    folder: str
    name: str
    image_key: str
    label_key: str
    stored_shape: tuple[int, int] | None
    stored_channels: int | None
    label_names: tuple[str, ...]

    def num_examples(self, split: str, *, key: str = "split") -> int:
        """Returns how many examples a split expression selects.

        Args:
          split: a TFDS split expression, e.g. ``train[:90%]``.
          key: the config key it came from, for the message.

        Raises:
          ValueError: the split is unknown, malformed or empty.
        """
        splits = _builder(self.folder).info.splits
        known = {name: splits[name].num_examples for name in splits}
        listed = ", ".join(f"{name} ({count} images)" for name, count in known.items())
        try:
            count = splits[split].num_examples
        except (ValueError, KeyError, AssertionError) as error:
            base = re.split(r"[\[+]", split)[0]
            reason = str(error).splitlines()[0] if base in known and str(error) else ""
            near = f" ({reason});" if reason else close_matches(base, known) or ";"
            raise ValueError(
                f"{key}={split!r} is not a split of {self.name}{near} use one of {listed}, "
                "or a slice such as 'train[:90%]'"
            ) from error
        if count <= 0:  # TFDS counts train[95%:90%] below 0
            raise ValueError(f"{key}={split!r} of {self.name} is empty: select at least one image; there are {listed}")
        return count

    def examples(self, split: str, *, key: str = "split") -> Examples:
        """Returns random access to the undecoded examples of a split expression."""
        return Examples(self, split, self.num_examples(split, key=key))


class Examples:
    """Random access to the encoded images and labels of one split.

    Indexing gives ``(bytes, int)``. It pickles as its file names, so worker processes open
    the files themselves.
    """

    def __init__(self, files: DataFiles, split: str, length: int):
        import tensorflow_datasets as tfds

        self.files, self.split, self._length = files, split, length
        builder = _builder(files.folder)
        features = builder.info.features
        # Only these two are parsed, and the image stays as it was encoded.
        self._features = tfds.features.FeaturesDict({key: features[key] for key in (files.image_key, files.label_key)})
        self._decoders = {files.image_key: tfds.decode.SkipDecoding()}
        self._source: Any = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        with _reading(self.files.folder):
            record = self._source[index]
        return self._parse(index, record)

    def read(self, start: int, stop: int) -> list[tuple[bytes, int]]:
        """Returns a run of examples at once, which takes less time than one by one."""
        with _reading(self.files.folder):
            records = self._source.__getitems__(range(start, stop))
        return [self._parse(index, record) for index, record in enumerate(records, start)]

    def _parse(self, index: int, record: bytes) -> tuple[bytes, int]:
        example: Any = self._features.deserialize_example_np(record, decoders=self._decoders)
        label = int(example[self.files.label_key])
        if not 0 <= label < len(self.files.label_names):
            raise ValueError(
                f"example {self.where(index)} has label {label}: labels must lie between 0 and "
                f"{len(self.files.label_names) - 1}; choose a split that is labelled"
            )
        return example[self.files.image_key], label

    def where(self, index: int) -> str:
        """Returns words that find an example again: its index, split and folder."""
        return f"{index} of split {self.split!r} in {self.files.folder}"

    def __reduce__(self) -> tuple[Any, ...]:
        return Examples, (self.files, self.split, self._length)

    def __repr__(self) -> str:
        return f"Examples({self.files.name}, {self.split!r}, {self._length})"


def locate(config_or_path: ConfigDict | str | os.PathLike[str] | None = None) -> epath.Path:
    """Returns the folder of prepared data sets.

    Args:
      config_or_path: a config (its ``data.data_dir``) or a path; where it is empty,
        ``$TFDS_DATA_DIR`` counts, and then ``~/tensorflow_datasets``.
    """
    path: Any = config_or_path
    if path is not None and not isinstance(path, str | os.PathLike):
        path = path.data.data_dir
    return epath.Path(path or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def prepare_command(name: str, data_dir: str | os.PathLike[str] | None = None) -> str:
    """Returns the command that prepares a data set in a folder."""
    return f"aaconv prepare {shlex.quote(name)} --data-dir {shlex.quote(os.fspath(data_dir or locate()))}"


def info(config: ConfigDict) -> DatasetInfo:
    """Describes the data set a config names; reads its metadata, not its images.

    Raises:
      NotPrepared: a set that TFDS knows is not there.
      ValueError: the set is unknown, or does not fit the config.
    """
    files = find(config.data.name, locate(config))
    return DatasetInfo(
        name=files.name,
        num_classes=len(files.label_names),
        num_train=files.num_examples(config.data.train_split, key="data.train_split"),
        num_eval=files.num_examples(config.data.eval_split, key="data.eval_split"),
        image_shape=image_shape(config, files),
        label_names=files.label_names,
        decoded=files.stored_shape is None,
    )


def image_shape(config: ConfigDict, files: DataFiles) -> tuple[int, int, int]:
    """Returns the ``(h, w, c)`` the network is fed; checks channels, mean, std and image_size."""
    channels, size = config.data.channels, config.data.image_size
    if channels not in (1, 3):
        raise ValueError(f"data.channels={channels} is not supported: set 1 (greyscale) or 3 (RGB)")
    if files.stored_channels not in (None, channels):
        raise ValueError(
            f"data.channels={channels} but the images of {files.name} have {files.stored_channels}: "
            f"set data.channels={files.stored_channels}, and as many numbers in data.mean and data.std"
        )
    for key in ("mean", "std"):
        values = config.data[key]
        if len(values) != channels:
            raise ValueError(
                f"data.{key}={tuple(values)} has {len(values)} numbers for data.channels={channels}: give one a channel"
            )
    if any(s <= 0 for s in config.data.std):
        raise ValueError(f"data.std={tuple(config.data.std)} must be greater than 0 in every channel")
    if size is None:
        if files.stored_shape is None:
            raise ValueError(
                f"data.image_size is not set and the images of {files.name} differ in size: "
                "set data.image_size to a side in pixels, e.g. 224"
            )
        return (*files.stored_shape, channels)
    return size, size, channels


def find(name: str, folder: epath.Path) -> DataFiles:
    """Finds a prepared data set.

    Args:
      name: ``NAME``, ``NAME:VERSION``, ``NAME/CONFIG`` or ``NAME/CONFIG:VERSION``; without a
        version the newest prepared one counts; of the project's own sets none older than this package makes.
      folder: where prepared data sets lie.

    Returns:
      The set, with the keys of its image and label.

    Raises:
      NotPrepared: a set that TFDS knows is not there.
      ValueError: no such set, or it is not one of labelled uint8 images in array_record.
    """
    version_folder = _find_version(name, folder)
    if version_folder is None and own.is_own(name):
        # Made in seconds, so nobody has to ask for it.
        prepare(name, os.fspath(folder))
        version_folder = _find_version(name, folder)
    if version_folder is None:
        raise _missing(name, folder)
    return _inspect(version_folder)


def prepare(name: str, data_dir: str | os.PathLike[str] | None = None) -> str:
    """Prepares a data set as array_record and returns its folder; does nothing if it is there.

    The project's own sets are made on the spot. Any other set is downloaded and converted by TFDS, which
    takes TensorFlow: ``pip install 'aaconv[prepare]'``. Some sets (ImageNet) TFDS cannot
    download; it then says which file to fetch by hand and where to put it.

    Args:
      name: as for a config's ``data.name``.
      data_dir: where to put it; None: ``$TFDS_DATA_DIR``, else ``~/tensorflow_datasets``.

    Raises:
      ValueError: the set is unknown, the folder cannot be written, TensorFlow is missing, or
        TFDS failed; the message says what to do.
    """
    root = locate(data_dir)
    present = _find_version(name, root)
    if present is not None:
        _inspect(present)  # a set that cannot be read is not reported as prepared
        return os.fspath(present)
    if own.is_own(name):
        return own.prepare(name, root)
    base = name.partition(":")[0]
    known = _registered()
    if base.partition("/")[0] not in known:
        raise ValueError(
            f"data set {name!r} is unknown to TFDS{close_matches(base, [*known, *own.VERSIONS]) or ';'} "
            "its catalogue lists the names"
        )
    if importlib.util.find_spec("tensorflow") is None:
        raise ValueError(
            f"preparing {name!r} needs TensorFlow, which is not installed (reading it afterwards does not): "
            f"run `pip install 'aaconv[prepare]'`, then `{prepare_command(name, root)}` again"
        )
    return _download_and_prepare(name, root)


def _download_and_prepare(name: str, root: epath.Path) -> str:
    import tensorflow as tf  # pyright: ignore[reportMissingImports]
    import tensorflow_datasets as tfds

    # TensorFlow would otherwise take all of an accelerator's memory from JAX.
    for kind in ("GPU", "TPU"):
        with contextlib.suppress(Exception):
            tf.config.set_visible_devices([], kind)
    try:
        builder = tfds.builder(name, data_dir=os.fspath(root), file_format="array_record")
        builder.download_and_prepare()
    except Exception as error:
        raise ValueError(
            f"TFDS could not prepare {name!r} in {root}: {type(error).__name__}: {error}. "
            f"Nothing was left half made; run `{prepare_command(name, root)}` again once that is put right"
        ) from error
    return os.fspath(builder.data_path)


def _missing(name: str, folder: epath.Path) -> ValueError:
    present = prepared(folder)
    known = {*_registered(), *own.VERSIONS}
    base = name.partition(":")[0]
    here = f"there {'is' if len(present) == 1 else 'are'} {', '.join(present)}" if present else "it has none"
    if base in present or base.partition("/")[0] in known:
        return NotPrepared(
            f"data set {name!r} is not prepared in {folder} ({here}): run `{prepare_command(name, folder)}` "
            "(TFDS downloads need `pip install 'aaconv[prepare]'`), or set data.data_dir or TFDS_DATA_DIR "
            "to the folder that has it"
        )
    near = close_matches(base, [*present, *(known - set(present))])
    return ValueError(
        f"unknown data set {name!r}: neither prepared in {folder} ({here}) nor known to TFDS"
        f"{near or '; set data.data_dir or TFDS_DATA_DIR to the folder that has it'}"
    )


def prepared(folder: epath.Path) -> list[str]:
    """Returns the names (with config) of the data sets prepared in a folder."""
    found = []
    for path in _subfolders(folder):
        if _versions(path):
            found.append(path.name)
        found += [f"{path.name}/{config.name}" for config in _subfolders(path) if _versions(config)]
    return sorted(found)


def _subfolders(folder: epath.Path) -> list[epath.Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir()]


def _versions(folder: epath.Path) -> list[epath.Path]:
    found = [
        path for path in _subfolders(folder) if _VERSION.fullmatch(path.name) and (path / "dataset_info.json").exists()
    ]
    return sorted(found, key=lambda path: _numbers(path.name))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _find_version(name: str, folder: epath.Path) -> epath.Path | None:
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise ValueError(
            f"data.name={name!r} is not the name of a data set: write NAME, NAME:1.0.0, NAME/CONFIG or "
            "NAME/CONFIG:1.0.0"
        )
    home = folder / parts["name"]
    if parts["config"]:
        home = home / parts["config"]
    versions = _versions(home)
    if not versions and not parts["config"]:
        configs = [path for path in _subfolders(home) if _versions(path)]
        if len(configs) > 1:
            names = ", ".join(sorted(f"{parts['name']}/{path.name}" for path in configs))
            raise ValueError(f"data.name={name!r} has several configs in {folder}: name one of {names}")
        versions = [version for config in configs for version in _versions(config)]
    if parts["version"]:
        wanted = [path for path in versions if path.name == parts["version"]]
        if versions and not wanted:
            have = ", ".join(path.name for path in versions)
            raise ValueError(
                f"version {parts['version']} of data.name={name!r} is not prepared in {folder}, which has "
                f"{have}: name one of those, or run `{prepare_command(name, folder)}`"
            )
        versions = wanted
    elif (newest := own.VERSIONS.get(name)) is not None:
        # An older one of the project's own sets is not what its configs mean, and the newest is made in seconds.
        versions = [path for path in versions if _numbers(path.name) >= _numbers(newest)]
    return versions[-1] if versions else None


def _inspect(folder: epath.Path) -> DataFiles:
    builder = _builder(os.fspath(folder))
    full_name = builder.info.full_name
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise ValueError(
            f"data set {full_name} in {folder} is stored as {', '.join(sorted(formats))}, but only array_record "
            f"can be read: prepare it in another folder with "
            f"`{prepare_command(_spoken_name(full_name), '/another/folder')}`, or convert it with `tfds convert_format "
            f"--dataset_dir={folder} --out_file_format=array_record --out_path=/another/folder`"
        )
    return describe(builder, os.fspath(folder))


def describe(builder: Any, folder: str = "") -> DataFiles:
    """Returns what a TFDS builder says of its images and labels, prepared or not.

    Raises:
      ValueError: they are not labelled uint8 images.
    """
    import numpy as np
    import tensorflow_datasets as tfds

    full_name, features = builder.info.full_name, builder.info.features
    image_key = _only(tfds.features.Image, "image", builder, exactly=True)
    label_key = _only(tfds.features.ClassLabel, "label", builder)
    image = features[image_key]
    if image.np_dtype != np.uint8:
        raise ValueError(
            f"the images of {full_name} are {np.dtype(image.np_dtype).name}, not uint8: only integers from 0 to 255 "
            "are read; choose another set, or another config of this one"
        )
    height, width, channels = image.shape
    labels = features[label_key]
    if not labels.num_classes:
        raise ValueError(f"the labels {label_key!r} of {full_name} name no classes: choose an image-classification set")
    return DataFiles(
        folder=folder,
        name=full_name,
        image_key=image_key,
        label_key=label_key,
        stored_shape=None if None in (height, width) else (height, width),
        stored_channels=channels,
        label_names=tuple(labels.names),
    )


def _only(kind: type, what: str, builder: Any, *, exactly: bool = False) -> str:
    """Returns the key of the one feature of a kind, by the set's own word where it gives one."""
    features = builder.info.features
    keys = [
        key for key, feature in features.items() if (type(feature) is kind if exactly else isinstance(feature, kind))
    ]
    supervised = builder.info.supervised_keys or ()
    named = [key for key in (*supervised, what) if key in keys]
    if named:
        return named[0]
    if len(keys) == 1:
        return keys[0]
    listed = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in features.items())
    raise ValueError(
        f"data set {builder.info.full_name} has {'several' if keys else 'no'} {what} features "
        f"({kind.__name__}) and none is named {what!r}: its features are {listed}; "
        "choose an image-classification set"
    )


def _spoken_name(full_name: str) -> str:
    name, _, version = full_name.rpartition("/")
    return f"{name}:{version}"


def _builder(folder: str) -> Any:  # a tfds.core.DatasetBuilder, whose annotations are too loose to check
    import tensorflow_datasets as tfds

    with _reading(folder):
        return tfds.builder_from_directory(folder)


@contextlib.contextmanager
def _reading(folder: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"the prepared data set in {folder} cannot be read ({type(error).__name__}: {error}): its files are "
            "damaged, incomplete or unreadable; delete that folder and prepare the set again"
        ) from error


def _registered() -> Sequence[str]:
    import tensorflow_datasets as tfds

    # Community sets would ask the network for their list.
    return tfds.list_builders(with_community_datasets=False)
