"""`check_task` refuses every way of breaking the interface, and says which."""

import random

import pytest
import torch

from lightning_hrnn.datamodule import TaskDataModule
from lightning_hrnn.tasks import FAMILIES, Corpus, TaskError, TaskFamily, check_task, get_family, register


class Sphere(TaskFamily):
    """A right family, to be broken in one place at a time."""

    name = "sphere"

    def init(self, count, generator):
        return [torch.randn(count, 3, generator=generator)], {"at": torch.randn(count, 3, generator=generator)}

    def loss(self, params, data, generator=None):
        loss = 0.5 * (params[0] - data["at"]).square().sum(-1)
        if generator is not None:
            noise = torch.randn(params[0].shape, generator=generator)
            loss = loss + (noise * (params[0] - params[0].detach())).sum(-1)
        return loss


class NoParams(Sphere):
    def init(self, count, generator):
        return [], {}


class UnseededInit(Sphere):
    def init(self, count, generator):
        return [torch.randn(count, 3)], super().init(count, generator)[1]


class SingleInstance(Sphere):
    def init(self, count, generator):
        params, _ = super().init(count, generator)
        return params, {"at": torch.zeros(1, 3)}


class WantsGradient(Sphere):
    def init(self, count, generator):
        params, data = super().init(count, generator)
        return [params[0].requires_grad_()], data


class FixedDtype(Sphere):
    def init(self, count, generator):
        params, data = super().init(count, generator)
        return [params[0].half()], data


class Infinite(Sphere):
    def init(self, count, generator):
        params, data = super().init(count, generator)
        return [params[0] / 0], data


class Scalar(Sphere):
    def loss(self, params, data, generator=None):
        return super().loss(params, data, generator).mean()


class Negative(Sphere):
    def loss(self, params, data, generator=None):
        return super().loss(params, data, generator) - 100


class LossDtype(Sphere):
    def loss(self, params, data, generator=None):
        return super().loss(params, data, generator).float()


class NoisyFull(Sphere):
    def loss(self, params, data, generator=None):
        loss = super().loss(params, data, generator)
        return loss * (1 + 0.1 * torch.rand(len(loss)))


class UnseededLoss(Sphere):
    def loss(self, params, data, generator=None):
        loss = super().loss(params, data, generator)
        return loss if generator is None else loss * (1 + 0.1 * torch.rand(len(loss)))


class SameForAll(Sphere):
    def init(self, count, generator):
        return [torch.ones(count, 3)], {"at": torch.zeros(count, 3)}


class Mixing(Sphere):
    def loss(self, params, data, generator=None):
        loss = super().loss(params, data, generator)
        return loss + 0.1 * loss.mean()


class Detached(Sphere):
    def loss(self, params, data, generator=None):
        return super().loss([torch.cat([params[0][:, :1].detach(), params[0][:, 1:]], 1)], data, generator)


class Biased(Sphere):
    def loss(self, params, data, generator=None):
        if generator is not None:
            data = {"at": data["at"] + 1}
        return super().loss(params, data, generator)


class Shrunk(Sphere):
    def loss(self, params, data, generator=None):
        loss = super().loss(params, data, generator)
        return loss if generator is None else 0.2 * loss


class NoGradientInFloat32(Sphere):
    def loss(self, params, data, generator=None):
        return super().loss(params, data, generator) + 1e200 * params[0].square().sum(-1) / 1e200


def returning(method, value):
    """Return a family one of whose methods returns something else."""
    return type("Returning", (Sphere,), {method: lambda self, *arguments: value})()


def raising(self, *_):
    raise KeyError("where")


def idle(self, count, generator):
    return [torch.ones(count, 3), torch.ones(count, 3)], {"at": torch.zeros(count, 3)}


UNFIT = {
    "the class": (Sphere, r"Sphere is the class: give an instance, Sphere\(\)"),
    "no family": (3, "3 is no task family"),
    "no name": (type("Nameless", (Sphere,), {"name": None})(), "it has no name"),
    "init gives nothing": (returning("init", None), r"init returned None; return \(params, data\)"),
    "init gives params": (returning("init", [torch.ones(2, 3)]), "init returned a list of 1: Tensor"),
    "init gives three": (returning("init", (1, 2, 3)), "init returned a tuple of 3: int, int, int"),
    "one tensor": (returning("init", (torch.ones(2, 3), {})), "params are of type Tensor; return a list"),
    "no data": (returning("init", ([torch.ones(2, 3)], None)), "data are None; return a dict of tensors, an empty"),
    "data in a list": (returning("init", ([torch.ones(2, 3)], [])), "data are a list of 0"),
    "numbers for data": (returning("init", ([torch.ones(2, 3)], {"at": 3})), "data are of type dict"),
    "uneven": (returning("init", ([torch.ones(2, 3), torch.ones(3)], {})), r"params\[1\] has shape \(3,\)"),
    "an error": (type("Raising", (Sphere,), {"init": raising})(), "init raised KeyError: 'where'"),
    "a loss that is a float": (returning("loss", 1.0), r"loss returned of type float; return a tensor of shape \[\d\]"),
    "a loss that is none": (returning("loss", None), "loss returned None"),
    "a list of losses": (returning("loss", [1.0, 2.0]), "loss returned a list of 2: float, float"),
    "a column": (returning("loss", torch.ones(2, 1)), r"loss has shape \(2, 1\); return \[2\]"),
    "not a number": (returning("loss", torch.full((2,), torch.nan)), "the loss at the start is not finite"),
    "detached": (returning("loss", torch.ones(2)), "the loss has no gradient"),
    "an idle parameter": (type("Idle", (Sphere,), {"init": idle})(), r"the parameters \[1\] have no part in the loss"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_what_cannot_be_trained_on_is_refused_at_once(kind):
    family, complaint = UNFIT[kind]
    with pytest.raises(TaskError, match=complaint):
        TaskDataModule(family=family)
    with pytest.raises(TaskError):
        check_task(family, torch.Generator().manual_seed(0))


def test_one_instance_or_draw_is_too_few_to_check():
    for wrong in ({"count": 1}, {"draws": 1}):
        with pytest.raises(ValueError, match="must be at least 2, not 1"):
            check_task(Sphere(), torch.Generator().manual_seed(0), **wrong)


def test_factories_that_make_no_family_are_refused():
    with pytest.raises(TypeError, match=r"register a function of a .*, not None"):
        register("nothing")(None)
    register("empty")(lambda rng: None)
    try:
        with pytest.raises(TypeError, match="its factory returned None, no TaskFamily"):
            get_family("empty", random.Random(0))
        with pytest.raises(ValueError, match="must be positive, got 'x'"):
            Corpus("mine", "1", {"empty": "x"})
    finally:
        del FAMILIES["empty"]


BROKEN = {
    NoParams: "init returns no parameters",
    UnseededInit: "different tasks for the same seed",
    SingleInstance: r"at has shape \(1, 3\)",
    WantsGradient: "requires a gradient",
    FixedDtype: "float16",
    Infinite: r"params\[0\] is not finite",
    Scalar: "loss has shape",
    Negative: "negative loss",
    LossDtype: "keep the parameters' dtype",
    NoisyFull: "the full loss changes",
    UnseededLoss: "stochastic loss is not reproducible",
    SameForAll: "all instances have one loss",
    Mixing: "never reduce over B",
    Detached: "against finite differences",
    Biased: "is biased",
    Shrunk: "is biased",
    NoGradientInFloat32: "float32",
}


def test_a_right_family_passes():
    check_task(Sphere(), torch.Generator().manual_seed(0))
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_a_broken_family_is_refused(broken):
    with pytest.raises(TaskError, match=BROKEN[broken]) as caught:
        check_task(broken(), torch.Generator().manual_seed(0))
    assert "'sphere'" in str(caught.value)
    assert torch.get_default_dtype() == torch.float32
