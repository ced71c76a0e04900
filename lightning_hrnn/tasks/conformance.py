"""`check_task`: does a task family keep the interface? For the registry's tests and for families of your own.

`check_interface` is the part of it that costs nothing: what training cannot do without.

Shapes: B instances, P scalar parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_hrnn.tasks.base import Data, Params, TaskFamily
from lightning_hrnn.tasks.draws import normal_like


class TaskError(ValueError):
    """A task family breaks the interface; the message names the family, what is wrong and how to mend it."""


def check_task(family: TaskFamily, generator: torch.Generator, count: int = 3, draws: int = 64) -> None:
    """Check that `family` keeps the interface of `TaskFamily`.

    Checked: shapes, device and finiteness; one seed gives one task; instances differ and never mix; the loss is
    non-negative; its gradient agrees with finite differences (float64) and has a derivative of its own; the
    stochastic gradient averages to the full one.

    Args:
        family: the family to check.
        generator: source of randomness; the checks run on its device.
        count: instances to make, at least 2.
        draws: stochastic gradients to average; very sparse ones need some thousands.

    Raises:
        TaskError: the first check that fails.
        ValueError: `count` is less than 2, or `draws` less than 2.
    """
    for name, number in (("count", count), ("draws", draws)):
        if number < 2:
            raise ValueError(f"{name} must be at least 2, not {number}: one alone has nothing to differ from.")
    check_interface(family, generator, count)
    with _float64():
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        params, data = family.init(count, _seeded(generator, seed))
        _check_tensors(family, params, data, count, generator.device)
        again = family.init(count, _seeded(generator, seed))
        _demand(
            _equal(params, again[0]) and _equal(list(data.values()), list(again[1].values())),
            family,
            "init gives different tasks for the same seed; draw from `generator` alone",
        )
        _check_losses(family, params, data, generator)
        _check_independence(family, params, data)
        _check_derivatives(family, params, data, generator)
        _check_stochastic(family, params, data, generator, draws)
    _check_float32(family, count, generator)


def check_interface(family: TaskFamily, generator: torch.Generator, count: int = 2) -> None:
    """Check that `family` can be trained on: kinds, shapes, a first loss that is finite, a gradient of each parameter.

    Args:
        family: the family to check.
        generator: source of randomness; the checks run on its device.
        count: instances to make.

    Raises:
        TaskError: the first check that fails.
    """
    if not isinstance(family, TaskFamily):
        if isinstance(family, type) and issubclass(family, TaskFamily):
            raise TaskError(f"{family.__name__} is the class: give an instance, {family.__name__}().")
        raise TaskError(f"{family!r} is no task family: give an instance of a subclass of TaskFamily.")
    _demand(isinstance(getattr(family, "name", None), str), family, "it has no name; give the class `name = ...`")
    made = _called(family, "init", count, generator)
    _demand(isinstance(made, tuple) and len(made) == 2, family, f"init returned {_kind(made)}; return (params, data)")
    params, data = made
    _demand(
        isinstance(params, list | tuple) and all(isinstance(value, Tensor) for value in params),
        family,
        f"params are {_kind(params)}; return a list of tensors",
    )
    _demand(
        isinstance(data, dict) and all(isinstance(value, Tensor) for value in data.values()),
        family,
        f"data are {_kind(data)}; return a dict of tensors, an empty one if there are none",
    )
    _check_tensors(family, list(params), data, count, generator.device)
    for source in (None, generator):
        leaves = [value.detach().requires_grad_() for value in params]
        losses = _called(family, "loss", leaves, data, source)
        _demand(
            isinstance(losses, Tensor), family, f"loss returned {_kind(losses)}; return a tensor of shape [{count}]"
        )
        shape = tuple(losses.shape)
        _demand(shape == (count,), family, f"loss has shape {shape}; return [{count}], one each")
        finite = losses.isfinite().all()
        _demand(finite, family, f"the loss at the start is not finite in {losses.dtype}: {losses.tolist()}")
        _demand(losses.requires_grad, family, "the loss has no gradient; is it detached, or computed without torch?")
        grads: tuple[Tensor | None, ...] = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
        idle = [k for k, grad in enumerate(grads) if grad is None]
        _demand(
            not idle, family, f"the parameters {idle} have no part in the loss; leave them out, or put them in data"
        )


def _called(family: TaskFamily, method: str, *arguments: Any) -> Any:
    """Call a method of a family; whatever it raises names the family."""
    try:
        return getattr(family, method)(*arguments)
    except Exception as error:
        what = f"{method} raised {type(error).__name__}: {error}"
        raise TaskError(f"task family {getattr(family, 'name', None)!r}: {what}") from error


def _kind(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}: {', '.join(type(item).__name__ for item in value)}"
    return "None" if value is None else f"of type {type(value).__name__}"


def _demand(holds: bool | Tensor, family: TaskFamily, message: str) -> None:
    if not holds:
        raise TaskError(f"task family {getattr(family, 'name', type(family).__name__)!r}: {message}")


@contextmanager
def _float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _seeded(generator: torch.Generator, seed: int) -> torch.Generator:
    return torch.Generator(generator.device).manual_seed(seed)


def _equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def _check_tensors(family: TaskFamily, params: Params, data: Data, count: int, device: torch.device) -> None:
    _demand(len(params) > 0, family, "init returns no parameters")
    dtype = torch.get_default_dtype()
    for name, tensor in [*((f"params[{k}]", p) for k, p in enumerate(params)), *data.items()]:
        _demand(
            tensor.dim() > 0 and len(tensor) == count,
            family,
            f"{name} has shape {tuple(tensor.shape)}; its first dimension must be the {count} instances",
        )
        _demand(tensor.device.type == device.type, family, f"{name} is on {tensor.device}, the generator on {device}")
        _demand(tensor.isfinite().all(), family, f"{name} is not finite")
        _demand(not tensor.requires_grad, family, f"{name} requires a gradient; init must return plain tensors")
    for k, tensor in enumerate(params):
        _demand(tensor.dtype == dtype, family, f"params[{k}] is {tensor.dtype}; make it torch.get_default_dtype()")


def _check_losses(family: TaskFamily, params: Params, data: Data, generator: torch.Generator) -> None:
    losses = family.loss(params, data)
    count = len(params[0])
    _demand(losses.shape == (count,), family, f"loss has shape {tuple(losses.shape)}; return [{count}], one each")
    _demand(losses.dtype == params[0].dtype, family, f"loss is {losses.dtype}; keep the parameters' dtype")
    _demand(losses.isfinite().all(), family, f"the loss at the start is not finite: {losses.tolist()}")
    _demand((losses >= 0).all(), family, f"negative loss {losses.tolist()}; shift the function so its minimum is 0")
    _demand(torch.equal(losses, family.loss(params, data)), family, "the full loss changes from call to call")
    _demand(losses.unique().numel() > 1, family, "all instances have one loss; draw every instance apart")
    first, second = (family.loss(params, data, _seeded(generator, 7)) for _ in range(2))
    _demand(torch.equal(first, second), family, "the stochastic loss is not reproducible; draw from `generator`")
    _demand(first.isfinite().all() and (first >= 0).all(), family, f"bad stochastic loss {first.tolist()}")


def _check_independence(family: TaskFamily, params: Params, data: Data) -> None:
    losses = family.loss(params, data)
    for i in range(len(losses)):
        alone = family.loss([p[i : i + 1] for p in params], {key: value[i : i + 1] for key, value in data.items()})
        _demand(
            torch.allclose(alone, losses[i : i + 1], rtol=1e-9, atol=1e-12),
            family,
            f"instance {i} has loss {losses[i]:.6g} among others, {float(alone):.6g} alone; never reduce over B",
        )


def _gradient(family: TaskFamily, params: Params, data: Data, generator: torch.Generator | None = None) -> Tensor:
    """Return the gradient of every instance, flat, `[B, P]`."""
    leaves = [p.detach().requires_grad_() for p in params]
    grads = torch.autograd.grad(family.loss(leaves, data, generator).sum(), leaves)
    return torch.cat([g.flatten(1) for g in grads], 1)


def _check_derivatives(family: TaskFamily, params: Params, data: Data, generator: torch.Generator) -> None:
    step = 1e-7  # relative to each entry, however badly scaled, so that few kinks of a ReLU lie in between
    direction = [normal_like(p, generator) * (p.abs() + 1e-3 * p.abs().mean() + 1e-6) for p in params]
    plus, minus = ([p + s * d for p, d in zip(params, direction, strict=True)] for s in (step, -step))
    flat = torch.cat([d.flatten(1) for d in direction], 1)  # [B, P]

    slope = (_gradient(family, params, data) * flat).sum(-1)
    difference = (family.loss(plus, data) - family.loss(minus, data)) / (2 * step)
    scale = slope.abs() + family.loss(params, data)
    _demand(
        ((slope - difference).abs() <= 1e-4 * scale).all(),
        family,
        f"gradient {slope.tolist()} against finite differences {difference.tolist()}; is a part detached?",
    )

    leaves = [p.detach().requires_grad_() for p in params]
    grads = torch.autograd.grad(family.loss(leaves, data).sum(), leaves, create_graph=True)
    product = sum(((g * d).sum() for g, d in zip(grads, direction, strict=True)), start=torch.zeros(()))
    if product.requires_grad:  # a piecewise linear loss has no second derivative
        seconds = torch.autograd.grad(product, leaves, materialize_grads=True)
        finite = all(bool(s.isfinite().all()) for s in seconds)
        _demand(finite, family, "the second derivative at the start is not finite; keep roots away from zero")


def _check_stochastic(family: TaskFamily, params: Params, data: Data, generator: torch.Generator, draws: int) -> None:
    """Check that stochastic gradients average to the full one, but for sampling error and 1 % (rounding)."""
    full = _gradient(family, params, data)  # [B, P]
    samples = torch.stack([_gradient(family, params, data, generator) for _ in range(draws)])  # [draws, B, P]
    _demand(samples.isfinite().all(), family, "a stochastic gradient is not finite")

    along = (samples * full).sum(-1) / full.square().sum(-1).clamp_min(1e-300)  # [draws, B]
    allowed = 5 * along.std(0) / draws**0.5 + 0.01
    _demand(
        ((along.mean(0) - 1).abs() <= allowed).all(),
        family,
        f"the stochastic gradient is biased: along the full one it is {along.mean(0).tolist()} times as long",
    )
    bias = (samples.mean(0) - full).norm(dim=-1)  # [B]
    sampling = samples.var(0).sum(-1).div(draws).sqrt()
    _demand(
        (bias <= 4 * sampling + 0.01 * full.norm(dim=-1)).all(),
        family,
        f"the stochastic gradient is biased by {bias.tolist()}, more than sampling explains",
    )


def _check_float32(family: TaskFamily, count: int, generator: torch.Generator) -> None:
    params, data = family.init(count, generator)
    _check_tensors(family, params, data, count, generator.device)
    for source in (None, generator):
        losses = family.loss(params, data, source)
        _demand(
            losses.dtype == params[0].dtype and losses.isfinite().all() and (losses >= 0).all(),
            family,
            f"bad loss in {params[0].dtype}: {losses.tolist()} of {losses.dtype}",
        )
        _demand(
            _gradient(family, params, data, source).isfinite().all(),
            family,
            f"a gradient in {params[0].dtype} is not finite",
        )
