"""What TFDS declares of a data set that is not prepared here: enough to build its network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aaconv.data import catalog, own
from aaconv.data.catalog import DatasetInfo

if TYPE_CHECKING:
    from aaconv.config import ConfigDict


def declared_info(config: ConfigDict) -> DatasetInfo:
    """Describes the data set a config names without its files, from TFDS's own description.

    Returns:
      As `aaconv.data.info`, with 0 images in each split.

    Raises:
      ValueError: TFDS does not know the set, or not its labels, or it does not fit the config.
    """
    name = config.data.name
    if own.is_own(name):
        builder = own.builder(name, catalog.locate(config))
    else:
        builder = _code(name)
    files = catalog.describe(builder)
    return DatasetInfo(
        name=name,
        num_classes=len(files.label_names),
        num_train=0,
        num_eval=0,
        image_shape=catalog.image_shape(config, files),
        label_names=files.label_names,
        decoded=files.stored_shape is None,
    )


def _code(name: str) -> Any:
    import tensorflow_datasets as tfds

    try:
        builder: Any = tfds.builder(name, data_dir="/nonexistent", try_gcs=False)
        builder.info.features.items()
    except Exception as error:  # whatever a set's own code raises without TensorFlow
        raise ValueError(
            f"TFDS does not say what {name!r} holds before it is prepared: run `{catalog.prepare_command(name)}`"
        ) from error
    return builder
