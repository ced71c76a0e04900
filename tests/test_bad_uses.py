"""Each bad use is refused by a message that names the cause and what to do about it."""

import re
from types import SimpleNamespace

import pytest
import torch
from helpers.modules import Batches, NoOptimizer, Regression, adamw, quiet_trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR

from lightning_hrnn import HRNN, HRNNOptimizerCallback, configure_hrnn, hrnn_optimizers, load_pretrained


def fit(module, *callbacks, **arguments):
    """Fit as a user would; nothing is written."""
    callbacks = callbacks or (HRNNOptimizerCallback(telemetry="off"),)
    quiet_trainer(None, *callbacks, max_epochs=1, **arguments).fit(module, Batches(1))


def under(strategy):
    """A strategy that would not run here is refused before it is asked for anything."""
    callback = HRNNOptimizerCallback()
    callback.setup(SimpleNamespace(callbacks=[callback], strategy=strategy.__new__(strategy)), Regression(), "fit")


class Sparse(Regression):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 4, sparse=True)

    def forward(self, x):
        return super().forward(x + self.table(torch.zeros(len(x), dtype=torch.int64)))


class Complex(Regression):
    def __init__(self):
        super().__init__()
        self.phase = nn.Parameter(torch.zeros(3, dtype=torch.complex64))


class Stepped:
    """A scheduler that is none of torch's."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        pass


class WithForeignScheduler(Regression):
    def configure_optimizers(self):
        optimizer = adamw(self)
        return [optimizer], [{"scheduler": Stepped(optimizer)}]

    def lr_scheduler_step(self, scheduler, metric):
        scheduler.step()


def with_step_lr(module):
    optimizer = adamw(module)
    return [optimizer], [StepLR(optimizer, 1)]


class AllFrozen(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1).requires_grad_(False)


def several_devices():
    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, device="meta"))]
    for param in params:
        param.grad = torch.zeros_like(param)
    HRNN(params).step()


# What is done -> the error, its cause, its mend
BAD_USES = {
    "no configure_optimizers": (
        lambda: fit(NoOptimizer()),
        (MisconfigurationException, "Lightning asks for one before any callback can act", "configure_hrnn(module)"),
    ),
    "LBFGS": (
        lambda: fit(Regression(lambda module: torch.optim.LBFGS(module.parameters()))),
        (MisconfigurationException, "cannot stand in for LBFGS: it evaluates the closure many times", "AdamW"),
    ),
    "SparseAdam": (
        lambda: fit(Regression(lambda module: torch.optim.SparseAdam(list(module.parameters())))),
        (MisconfigurationException, "it takes sparse gradients", "sparse=False"),
    ),
    "maximize": (
        lambda: fit(Regression(lambda module: SGD(module.parameters(), lr=0.1, maximize=True))),
        (MisconfigurationException, "SGD(maximize=True): it minimises", "Negate the loss"),
    ),
    "FSDP1": (lambda: under(FSDPStrategy), (MisconfigurationException, "flattens parameters", "ModelParallelStrategy")),
    "DeepSpeed": (
        lambda: under(DeepSpeedStrategy),
        (MisconfigurationException, "takes the step itself", "ModelParallelStrategy"),
    ),
    "sparse gradients": (lambda: fit(Sparse()), (RuntimeError, "of shape [10, 4] is sparse", "sparse=False")),
    "complex parameters": (lambda: fit(Complex()), (ValueError, "of shape [3] is complex", "torch.view_as_real")),
    "a scheduler that cannot be kept": (
        lambda: fit(WithForeignScheduler(), HRNNOptimizerCallback(schedulers="keep")),
        (MisconfigurationException, "cannot keep Stepped: it is no torch.optim.lr_scheduler", "schedulers='drop'"),
    ),
    "a scheduler where none may be": (
        lambda: fit(Regression(with_step_lr), HRNNOptimizerCallback(schedulers="refuse")),
        (MisconfigurationException, "returned a StepLR and schedulers='refuse'", "return no scheduler"),
    ),
    "unknown weights": (
        lambda: HRNNOptimizerCallback(weights="hrnn-v99"),
        (ValueError, "Unknown weights 'hrnn-v99'", "choose from ['hrnn-v"),
    ),
    "weights that are no safetensors": (
        lambda: HRNNOptimizerCallback(weights="weights.pt"),
        (ValueError, "Unknown weights 'weights.pt'", "the path of a .safetensors file"),
    ),
    "two callbacks": (
        lambda: fit(Regression(), HRNNOptimizerCallback(), HRNNOptimizerCallback()),
        (MisconfigurationException, "has 2 HRNNOptimizerCallbacks, and each would replace", "Leave one"),
    ),
    "a fall of its own HRNN": (
        lambda: fit(Regression(lambda module: HRNN(module.parameters())), HRNNOptimizerCallback(on_divergence="adamw")),
        (MisconfigurationException, "returns a plain HRNN", "Return torch.optim.AdamW"),
    ),
    "configure_hrnn of a plain module": (
        lambda: configure_hrnn(nn.Linear(2, 1)),
        (TypeError, "takes a LightningModule, not Linear", "HRNN(module.parameters())"),
    ),
    "nothing to train": (
        lambda: hrnn_optimizers(AllFrozen()),
        (ValueError, "AllFrozen has no trainable parameter", "Unfreeze some"),
    ),
    "a negative multiplier": (
        lambda: HRNNOptimizerCallback(lr=-1),
        (ValueError, "lr is a multiplier of the learned rates", "must be >= 0"),
    ),
    "an unknown kernel": (
        lambda: HRNN(nn.Linear(2, 1).parameters(), kernel="cuda"),
        (ValueError, "Unknown kernel 'cuda'", "choose from ['auto'"),
    ),
    "parameters on several devices": (
        several_devices,
        (RuntimeError, "lie on several devices, ['cpu', 'meta']", "an optimizer of their own"),
    ),
    "the state of Adam": (
        lambda: HRNN(nn.Linear(2, 1).parameters()).load_state_dict(Adam(nn.Linear(2, 1).parameters()).state_dict()),
        (ValueError, "This is not the state of HRNN", "load it into that one, or start HRNN without it"),
    ),
    "not an optimizer's state": (
        lambda: HRNN(nn.Linear(2, 1).parameters()).load_state_dict(nn.Linear(2, 1).state_dict()),
        (ValueError, "This is not an optimizer's state", "it has the keys ['bias', 'weight']"),
    ),
}


@pytest.mark.parametrize("use", BAD_USES)
def test_the_message_names_cause_and_mend(use):
    act, (error, cause, mend) = BAD_USES[use]
    with pytest.raises(error, match=f"(?s){re.escape(cause)}.*") as caught:
        act()
    assert mend in str(caught.value)


def test_a_module_that_returns_hrnn_already_is_served():
    """No bad use: the callback leaves the optimizer as it is, and attends, logs and watches for it."""
    module = Regression(lambda module: HRNN(module.parameters(), weights=load_pretrained(), lr=0.5))
    trainer = quiet_trainer(None, HRNNOptimizerCallback(telemetry="off"), max_epochs=1)
    trainer.fit(module, Batches(2))
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5
    assert trainer.global_step == 2
