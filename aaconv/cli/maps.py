"""Attention maps of a trained network, for the commands that draw them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from aaconv.cli.loading import summarise
from aaconv.cli.printing import size
from aaconv.errors import close_matches

if TYPE_CHECKING:
    import numpy as np

    from aaconv.config import ConfigDict
    from aaconv.data import DatasetInfo
    from aaconv.models.summary import Attention
    from aaconv.train import Restored


class Network:
    """A restored network as a function of one uint8 image.

    Args:
      restored: as of `aaconv.train.restore`.
      layer: whose attention maps `look` returns.
    """

    def __init__(self, restored: Restored, layer: Attention | None = None) -> None:
        import jax

        from aaconv.data import augment

        config = restored.config

        def logits_of(variables: Any, image: Any, **kwargs: Any) -> Any:
            images = augment.normalise(image[None], config.data.mean, config.data.std)
            return restored.model.apply(variables, images, train=False, **kwargs)

        def classify(variables: Any, image: Any) -> Any:
            return jax.nn.softmax(logits_of(variables, image)[0])

        def look(variables: Any, image: Any) -> Any:
            logits, sown = logits_of(variables, image, mutable=["intermediates"])
            found = sown["intermediates"]
            assert layer is not None
            for name in layer.path.split("/"):
                found = found[name]
            # Of the other layers' maps nothing is kept, so the compiler leaves them out.
            return jax.nn.softmax(logits[0]), found["attention_weights"][0][0]

        self._variables = restored.variables
        self._classify = jax.jit(classify)
        self._look = jax.jit(look)

    def classify(self, image: np.ndarray) -> np.ndarray:
        """Returns the probabilities of the classes, float32."""
        import numpy as np

        return np.asarray(self._classify(self._variables, image))

    def look(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the probabilities, and the layer's attention weights ``(n, h, w, h, w)``."""
        import numpy as np

        probabilities, weights = self._look(self._variables, image)
        return np.asarray(probabilities), np.asarray(weights)


def choose_layer(config: ConfigDict, info: DatasetInfo, name: str | None) -> Attention:
    """Returns the layer of that name; by default the last of those that attend over the largest map."""
    layers = {layer.path: layer for layer in summarise(config, info).attention}
    if not layers:
        raise ValueError(f"{config.model.name} has no attention to draw: leave --maps out")
    if name is None:
        return max(reversed(layers.values()), key=lambda layer: math.prod(layer.attends_at))
    for path, layer in layers.items():
        if name in (path, path.rpartition("/")[0]):
            return layer
    near = close_matches(name, layers) or f"; it is one of {', '.join(layers)}"
    raise ValueError(f"--layer {name} does not attend{near}")


def maps_title(start: str, layer: Attention) -> str:
    """Returns a picture's title: its start, the layer, and the size of the map it attends over."""
    return f"{start}, {layer.path} ({size(layer.attends_at)})"
