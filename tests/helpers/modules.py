"""Tiny LightningModules over fixed batches, a quiet Trainer, and the same training written out by hand."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_hrnn.optimizer.config import RuleConfig
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN
from lightning_hrnn.optimizer.optimizer import HRNN
from lightning_hrnn.optimizer.pretrained import read_card
from lightning_hrnn.optimizer.schedule import cooldown

INPUTS, HIDDEN = 4, 6
EVERY_PART = RuleConfig(  # of a rule with bounded rates
    readouts=("direction", "attention"),
    slows=True,
    peak_memory=3.0,
    peak_fall=1.0,
    vanished=0.1,
    far_fall=0.5,
    drift_horizon=3.0,
    step_bound=0.01,
    drift_inputs=("tensor", "peak", "length"),
    first_inputs=("size", "model_count"),
    anneals=True,
    warm_up=0.5,
    drift_settles=10.0,
    scale_memory=20.0,
    scale_inputs=("tensor_count", "model_count", "trend"),
)


SMALL_WEIGHTS = str(read_card()["small"]["weights"])  # what models as small as these are stepped with by default


class Batches:
    """Batches `(x [rows, 4], y [rows, 1])` in a fixed order; no DataLoader, so no advice about its workers."""

    def __init__(self, count: int = 5, rows: int = 8, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        teacher = torch.randn(INPUTS, 1, generator=generator)
        inputs = torch.randn(count, rows, INPUTS, generator=generator)
        self.items = [(x, (x @ teacher).sin()) for x in inputs]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.items)


def adamw(module: LightningModule) -> Any:
    return torch.optim.AdamW(module.parameters(), lr=3e-4)


class Regression(LightningModule):
    """A two-layer net; what its `configure_optimizers` returns is an argument."""

    def __init__(self, configure: Callable[["Regression"], Any] = adamw) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.backbone = nn.Linear(INPUTS, HIDDEN)
            self.head = nn.Linear(HIDDEN, 1)
        self.configure = configure

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).tanh())

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (self(x) - y).square().mean()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return self.configure(self)


class Validated(Regression):
    """The same, with a validation loss."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class NoOptimizer(LightningModule):
    """A module that leaves out `configure_optimizers`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(INPUTS, 1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return (self.net(x) - y).square().mean()


class GAN(LightningModule):
    """Two nets and two optimizers, stepped by hand."""

    def __init__(self, configure: Callable[["GAN"], Any] | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = nn.Linear(2, INPUTS), nn.Linear(INPUTS, 1)
        self.configure = configure

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        real, _ = batch
        to_generate, to_criticise = self.optimizers()
        noise = torch.ones(len(real), 2) * (batch_idx + 1)

        self.toggle_optimizer(to_generate)
        loss = nn.functional.softplus(-self.critic(self.generator(noise))).mean()
        to_generate.zero_grad()
        self.manual_backward(loss)
        to_generate.step()
        self.untoggle_optimizer(to_generate)

        self.toggle_optimizer(to_criticise)
        fake = self.generator(noise).detach()
        loss = nn.functional.softplus(self.critic(fake)).mean() + nn.functional.softplus(-self.critic(real)).mean()
        to_criticise.zero_grad()
        self.manual_backward(loss)
        to_criticise.step()
        self.untoggle_optimizer(to_criticise)

        for scheduler in [self.lr_schedulers()] if self.configure else []:
            for one in scheduler if isinstance(scheduler, list) else [scheduler]:
                one.step()

    def configure_optimizers(self) -> Any:
        if self.configure:
            return self.configure(self)
        generate = torch.optim.Adam(self.generator.parameters(), lr=1e-4, betas=(0.5, 0.9))
        criticise = torch.optim.RMSprop(self.critic.parameters(), lr=4e-4)
        return generate, criticise


def quiet_trainer(tmp_path: Any, *callbacks: Any, **arguments: Any) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **arguments})


def attentive_rule() -> HierarchicalRNN:
    """A rule that wants the gradient elsewhere than at the weights, by a distance that a test cannot overlook."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return HierarchicalRNN(RuleConfig(readouts=("direction", "attention")))


def by_hand(
    module: Regression,
    batches: Batches,
    epochs: int = 2,
    accumulate: int = 1,
    before_step: Callable[[list[Tensor]], Any] = lambda params: None,
    cool: bool = True,
    **options: Any,
) -> HRNN:
    """Train as Lightning does, in a plain loop around `HRNN`."""
    params = list(module.parameters())
    optimizer = HRNN(params, **options)
    for epoch in range(epochs):
        for index, batch in enumerate(batches):
            if cool:
                optimizer.cooldown = cooldown(epoch * len(batches) + index, epochs * len(batches))
                optimizer.run_length = epochs * math.ceil(len(batches) / accumulate)
            with optimizer.attend():
                (module.loss(batch) / accumulate).backward()
            if (index + 1) % accumulate == 0 or index + 1 == len(batches):
                before_step(params)
                optimizer.step()
                optimizer.zero_grad()
    return optimizer


def same_state(left: Any, right: Any) -> bool:
    """Compare nested dictionaries, lists and tensors bit by bit."""
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same_state(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same_state, left, right))
    return bool(left == right)
