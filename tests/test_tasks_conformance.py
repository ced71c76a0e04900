"""`check_task` refuses every way of breaking the interface, and says which."""

import pytest
import torch

from lightning_hrnn.tasks import TaskError, TaskFamily, check_task


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
