"""Which part of a cache keeps what for which layer of a model, where layers differ, share or are on several devices."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from attention.kv.layout import Keeping, LayerLayout, SharedLayer


class Place(NamedTuple):
    """Where a layer of a model finds its keys and values: layer `layer` of the cache's part `part`.

    shared: an earlier layer of the model stores them there."""

    part: int
    layer: int
    shared: bool = False


class Pool(NamedTuple):
    """A part of a cache: so many `layers` of one kind on one device."""

    device: torch.device
    kind: Keeping
    layers: int


def assign(layout: LayerLayout, devices: Sequence[torch.device], first: torch.device) -> tuple[list[Pool], list[Place]]:
    """One pool for each device and kind of layers, those on the device `first` before others, and each layer's place.

    devices: of each layer.

    >>> from attention.kv.layout import KeyValueLayer
    >>> wide, narrow, cpu = KeyValueLayer(8, 256, 256), KeyValueLayer(2, 512, 512), torch.device("cpu")
    >>> pools, places = assign(LayerLayout((wide, narrow, wide, SharedLayer(owner=1))), [cpu] * 4, cpu)
    >>> [pool.layers for pool in pools], [tuple(place) for place in places]
    ([2, 1], [(0, 0, False), (1, 0, False), (0, 1, False), (1, 0, True)])
    """
    wanted = {number: (devices[number], kind) for number, kind in layout.keeping}
    order = sorted(dict.fromkeys(wanted.values()), key=lambda pool: pool[0] != first)
    places, counts = list[Place](), [0] * len(order)
    for number, layer in enumerate(layout.layers):
        if isinstance(layer, SharedLayer):
            places.append(places[layer.owner]._replace(shared=True))
        else:
            part = order.index(wanted[number])
            places.append(Place(part, counts[part]))
            counts[part] += 1
    return [Pool(*pool, count) for pool, count in zip(order, counts, strict=True)], places
