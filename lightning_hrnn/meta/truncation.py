"""Truncated unrolls: a pool of tasks of different ages, each advanced by one window at a time.

A meta-gradient through thousands of inner steps is out of reach, so inner training is cut into truncation windows:
the state is carried from window to window, the gradient is not. Every window mixes tasks at the start of their
training with others far on. How long a task lives is drawn from a heavy-tailed distribution whose longest lives grow
as meta-training goes on.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_hrnn.meta.loss import refuse_negative
from lightning_hrnn.meta.population import Population, Progress, TaskBatch, join
from lightning_hrnn.meta.unroll import Schedule, begin
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN
from lightning_hrnn.optimizer.schedule import cooldown
from lightning_hrnn.tasks.base import TaskFamily
from lightning_hrnn.tasks.corpus import Corpus

FEWEST = 4  # instances of a large task
DRAWS = 20  # in a row that may begin with losses that are not finite


class TaskStream:
    """Draw fresh tasks without end; the `i`-th draw depends on corpus, seed and `i` alone.

    Args:
        corpus: mixture of task families, or one family.
        count: instances in a batch.
        seed: of all draws.
        shard: index of this stream among `shards`, which share no task.
        shards: number of streams.
        most_params: of a batch: of large tasks there are fewer instances, but `FEWEST` at least.
    """

    def __init__(
        self,
        corpus: Corpus | TaskFamily,
        count: int,
        seed: int,
        shard: int = 0,
        shards: int = 1,
        most_params: int | None = None,
    ) -> None:
        self.corpus, self.count, self.seed, self.most_params = corpus, count, seed, most_params
        self.shard, self.shards = shard, shards
        self.drawn = 0

    @property
    def families(self) -> int:
        """Number of families that tasks are drawn from."""
        return len(self.corpus.weights) if isinstance(self.corpus, Corpus) else 1

    def next_seed(self) -> int:
        """Return the seed of the next draw."""
        index = self.drawn * self.shards + self.shard
        self.drawn += 1
        return random.Random(f"{self.seed}/{index}").getrandbits(62)

    def draw(self, seed: int, device: torch.device | str = "cpu") -> TaskBatch:
        """Draw the task batch that belongs to a seed."""
        family = self.corpus.sample(random.Random(seed)) if isinstance(self.corpus, Corpus) else self.corpus
        count = self.count
        if self.most_params is not None:
            one = TaskBatch.draw(family, 1, seed, device).size
            count = min(count, max(FEWEST, self.most_params // one))
        return TaskBatch.draw(family, count, seed, device)


@dataclass(frozen=True)
class Lives:
    """Distribution of how many inner steps a task lives: log-uniform, its upper end growing with meta-training.

    Args:
        shortest: steps.
        longest: steps, once grown.
        first_longest: longest at the start of meta-training.
        growth_steps: meta-steps until `longest` is reached, geometrically.

    Raises:
        ValueError: the numbers are not in order.
    """

    shortest: int = 50
    longest: int = 5000
    first_longest: int = 500
    growth_steps: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.shortest <= self.first_longest <= self.longest or self.growth_steps < 1:
            raise ValueError(f"Lives need 0 < shortest <= first_longest <= longest and growth_steps >= 1: {self}.")

    def upper(self, meta_step: int) -> float:
        """Return the longest life drawn at a meta-step."""
        grown = min(1.0, meta_step / self.growth_steps)
        return self.first_longest * (self.longest / self.first_longest) ** grown

    def draw(self, rng: random.Random, meta_step: int) -> int:
        """Draw a life."""
        return round(math.exp(rng.uniform(math.log(self.shortest), math.log(self.upper(meta_step)))))


@dataclass
class Place:
    """Hold one task batch of the pool."""

    seed: int
    tasks: TaskBatch
    progress: Progress
    initial_loss: Tensor  # [B]
    age: int
    life: int
    cools: bool  # whether its learned rates cool down over the last half of its life

    @property
    def known_length(self) -> int:
        """Number of steps that its rule is told; 0 if its rates do not cool down."""
        return self.life if self.cools else 0

    def multiplier(self, step: int) -> float:
        """Return the multiplier of its learned rates, `step` steps from now."""
        return cooldown(self.age + step, max(self.life, self.age + step + 1)) if self.cools else 1.0


def schedule_of(places: Sequence[Place], population: Population) -> Schedule:
    """Return the multipliers of the learned rates of places laid end to end."""

    def schedule(step: int) -> Tensor | float:
        multipliers = [place.multiplier(step) for place in places]
        if all(value == 1.0 for value in multipliers):
            return 1.0
        return population.layout.to_params(population.to_tensors(multipliers))

    return schedule


def started(progress: Progress, place: Place, rule: HierarchicalRNN) -> Progress:
    """Let a task at its first step begin from the initial states of `rule`, which then receive meta-gradients.

    There the rule is told how long the task lives, if it cools down.
    """
    if place.age > 0:
        return progress
    state = rule.init(Population([place.tasks]).layout, 0.0, float(place.known_length))
    if progress.state.log_rate.shape == state.log_rate.shape:
        state = state._replace(log_rate=progress.state.log_rate)
    return progress._replace(state=state)


class TaskPool:
    """Keep task batches at different ages.

    Args:
        places: number of task batches in flight.
        lives: how long they live.
        rates: range of first learned rates, log-uniform over the instances of a batch; their tensors differ by up
            to a factor of 2.
        cooling: share of the task batches whose learned rates cool down over the last half of their lives, as they
            do in a run of known length; rules that read the length are told it.
    """

    def __init__(self, places: int, lives: Lives, rates: tuple[float, float], cooling: float = 0.0) -> None:
        if places < 1:
            raise ValueError(f"A pool needs at least one place, not {places}.")
        if not 0 < rates[0] <= rates[1] < math.inf:
            raise ValueError(f"First rates need 0 < low <= high, both finite, not {rates}.")
        if not 0 <= cooling <= 1:
            raise ValueError(f"cooling is a share of the tasks, from 0 to 1, not {cooling}.")
        self.count, self.lives, self.rates, self.cooling = places, lives, rates, cooling
        self.places: list[Place] = []

    def refill(self, stream: TaskStream, rule: HierarchicalRNN, meta_step: int, device: torch.device | str) -> None:
        """Replace tasks whose life is over or whose parameters are no longer finite; fill free places.

        Raises:
            ValueError: a fresh task begins with a negative loss, or `DRAWS` in a row with losses that are not finite.
        """
        self.places = [place for place in self.places if place.age < place.life and _is_finite(place)]
        while len(self.places) < self.count:
            self.places.append(self._draw(stream, rule, meta_step, device))

    def _draw(self, stream: TaskStream, rule: HierarchicalRNN, meta_step: int, device: torch.device | str) -> Place:
        """Draw until all instances begin with a finite loss: one that is not makes the meta-loss of all not finite."""
        for _ in range(DRAWS):
            seed = stream.next_seed()
            place = self._start(seed, stream.draw(seed, device), rule, meta_step)
            name = place.tasks.family.name
            if place.initial_loss.isfinite().all():
                return place
            warnings.warn(
                f"A draw of {name!r} is left out: some of its instances begin with a loss that is not finite.",
                stacklevel=2,
            )
        raise ValueError(
            f"{DRAWS} draws in a row begin with losses that are not finite, the last of the family {name!r}: mend "
            "its init or its loss, which `check_task` checks."
        )

    def _start(self, seed: int, tasks: TaskBatch, rule: HierarchicalRNN, meta_step: int) -> Place:
        population = Population([tasks])
        with torch.no_grad():
            initial_loss = population.losses(population.initial_params())
            refuse_negative(initial_loss, f"The loss of the family {tasks.family.name!r}")
            progress = begin(rule, population, self._first_log_rates(population, tasks)).detach()
        rng = random.Random(seed)
        life = self.lives.draw(rng, meta_step)
        return Place(seed, tasks, progress, initial_loss, age=0, life=life, cools=rng.random() < self.cooling)

    def _first_log_rates(self, population: Population, tasks: TaskBatch) -> Tensor:  # [T]
        device, dtype = tasks.generator.device, tasks.params[0].dtype
        low, high = (math.log(rate) for rate in self.rates)
        of_task = torch.rand(tasks.count, generator=tasks.generator, device=device, dtype=dtype) * (high - low) + low
        tensors = len(population.layout.params_in)
        jitter = torch.rand(tensors, generator=tasks.generator, device=device, dtype=dtype) * 2 - 1
        return population.layout.to_tensors(of_task) + math.log(2) * jitter

    def population(self) -> Population:
        """Lay the tasks of all places end to end."""
        return Population([place.tasks for place in self.places])

    def start(self, rule: HierarchicalRNN) -> Progress:
        """Return the progress of all places, end to end."""
        return join([started(place.progress, place, rule) for place in self.places])

    def initial_losses(self) -> Tensor:
        """Return the loss of every task at the start of its run. [M]"""
        return torch.cat([place.initial_loss for place in self.places])

    def advance(self, population: Population, progress: Progress, steps: int) -> None:
        """Take over the progress after a window."""
        for place, part in zip(self.places, population.split(progress.detach()), strict=True):
            place.progress, place.age = part, place.age + steps

    # A pool is stored as plain values and tensors: tasks are drawn again from their seeds.

    def state_dict(self) -> dict[str, Any]:
        """Return the pool as plain values and tensors."""
        return {"places": [_stored(place) for place in self.places]}

    def load_state_dict(self, state: dict[str, Any], stream: TaskStream, device: torch.device | str) -> None:
        """Restore a pool, drawing its tasks again from `stream`; as many as there are places.

        Raises:
            ValueError: what was stored is no pool, or of tasks that `stream` does not draw.
        """
        try:
            self.places = [_restored(stored, stream, device) for stored in state["places"][: self.count]]
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"The tasks in flight of the checkpoint are damaged ({type(error).__name__}: {error}). Go on from an "
                "earlier one, or start anew from its exported weights."
            ) from error

    def __iter__(self) -> Iterator[Place]:
        """Iterate over the places."""
        return iter(self.places)


def _is_finite(place: Place) -> bool:
    return bool(place.progress.theta.isfinite().all())


def _stored(place: Place) -> dict[str, Any]:
    return {
        "seed": place.seed,
        "age": place.age,
        "life": place.life,
        "cools": place.cools,
        "progress": place.progress.state_dict(),
        "initial_loss": place.initial_loss,
        "generator": place.tasks.generator.get_state(),
    }


def _restored(stored: dict[str, Any], stream: TaskStream, device: torch.device | str) -> Place:
    tasks = stream.draw(stored["seed"], device)
    tasks.generator.set_state(stored["generator"].cpu())
    progress = Progress.from_state_dict(stored["progress"]).to(device)
    if progress.theta.numel() != tasks.size:
        raise ValueError(
            f"The checkpoint's tasks have {progress.theta.numel()} parameters, those drawn here {tasks.size}: it is "
            "another corpus, or its families have changed. Start anew, with --model.weights and the weights exported."
        )
    initial_loss = stored["initial_loss"].to(device)
    return Place(stored["seed"], tasks, progress, initial_loss, stored["age"], stored["life"], stored["cools"])
