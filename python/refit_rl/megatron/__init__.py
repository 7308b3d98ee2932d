"""Publishes the parameters of a Megatron-Core trainer, in place.

::

    publisher = Publisher(model, hf_config, rendezvous="etcd:https://meet:2379", model="qwen3-4b")
    publisher.publish(0)                        # the weights that training starts from
    for step in range(1, steps):
        loss = forward_backward(...)
        publisher.before_step()                 # waits until nobody reads the weights
        optimizer.step()
        publisher.publish(step)

`modules` reads the trainer's modules and `groups` its process groups. Importing this needs neither torch nor Megatron.
"""

from __future__ import annotations

from .groups import Coordinates, Place, coordinates, place
from .modules import Held, Span, walk
from .publisher import Publisher

__all__ = ["Coordinates", "Held", "Place", "Publisher", "Span", "coordinates", "place", "walk"]
