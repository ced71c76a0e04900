"""The registry of task families.

`FAMILIES` maps a name to a factory; a factory draws a concrete family (sizes, noise, batch size, activation) from a
`random.Random`. The first line of a factory's docstring describes the family in the docs.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable

from lightning_hrnn.tasks.base import TaskFamily, named

Factory = Callable[[random.Random], TaskFamily]

FAMILIES: dict[str, Factory] = {}


def register(name: str) -> Callable[[Factory], Factory]:
    """Enter a factory into `FAMILIES` under `name`; the families it draws carry that name.

    Raises:
        TypeError: what is registered cannot be called, or returns no family, once it is drawn from.
        ValueError: the name is taken.

    Example::

        >>> from lightning_hrnn.tasks.functions import Quadratic
        >>> @register("tiny-quadratic")
        ... def tiny_quadratic(rng):
        ...     return Quadratic(rng.randint(2, 4))
        >>> family = get_family("tiny-quadratic", random.Random(0))
        >>> family.name, family.dim
        ('tiny-quadratic', 3)
        >>> del FAMILIES["tiny-quadratic"]
    """

    def enter(factory: Factory) -> Factory:
        if name in FAMILIES:
            raise ValueError(f"task family {name!r} is registered already; choose another name")

        if not callable(factory):
            raise TypeError(f"task family {name!r}: register a function of a random.Random, not {factory!r}")

        @functools.wraps(factory)
        def draw(rng: random.Random) -> TaskFamily:
            family = factory(rng)
            if not isinstance(family, TaskFamily):
                raise TypeError(f"task family {name!r}: its factory returned {family!r}, no TaskFamily")
            return named(name, family)

        FAMILIES[name] = draw
        return factory

    return enter


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Say that `name` is no known `kind`, and list those that are."""
    return f"unknown {kind} {name!r}; known: {', '.join(sorted(known))}"


def get_family(name: str, rng: random.Random) -> TaskFamily:
    """Draw a concrete family registered under `name`.

    Raises:
        ValueError: no family has that name; the message lists all.
    """
    if name not in FAMILIES:
        raise ValueError(unknown("task family", name, FAMILIES))
    return FAMILIES[name](rng)
