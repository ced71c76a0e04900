"""Whole trainings as their users wrote them, to which nothing but the callback is added: the loss falls."""

import copy
import math

import pytest
import torch
from helpers.modules import quiet_trainer
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.optim import Adam, AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_hrnn import HRNN, HRNNOptimizerCallback

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def loader(*tensors, batch_size=32):
    return DataLoader(TensorDataset(*tensors), batch_size, shuffle=True)


# ---------------------------------------------------------------- a GAN, by hand


class RingGAN(LightningModule):
    """Draws points on a circle of radius two; both nets are stepped by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
        self.critic = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))

    def training_step(self, batch, batch_idx):
        (real,) = batch
        generate, criticise = self.optimizers()
        noise = torch.randn(len(real), 4)

        self.toggle_optimizer(criticise)
        fake = self.generator(noise).detach()
        loss = nn.functional.softplus(-self.critic(real)).mean() + nn.functional.softplus(self.critic(fake)).mean()
        criticise.zero_grad()
        self.manual_backward(loss)
        criticise.step()
        self.untoggle_optimizer(criticise)

        self.toggle_optimizer(generate)
        loss = nn.functional.softplus(-self.critic(self.generator(noise))).mean()
        generate.zero_grad()
        self.manual_backward(loss)
        generate.step()
        self.untoggle_optimizer(generate)

    def configure_optimizers(self):
        return (
            Adam(self.generator.parameters(), lr=2e-4, betas=(0.5, 0.999)),
            Adam(self.critic.parameters(), lr=2e-4, betas=(0.5, 0.999)),
        )

    @torch.no_grad()
    def distance(self):
        """How far the radii of drawn points are from two, on average."""
        noise = torch.randn(512, 4, generator=torch.Generator().manual_seed(7))
        return (self.generator(noise).norm(dim=1) - 2).abs().mean().item()


@pytest.mark.parametrize("rate", ["learned", "given"])
def test_a_gan_with_manual_optimization(tmp_path, rate):
    torch.manual_seed(0)
    gan, angle = RingGAN(), torch.rand(512) * 2 * math.pi
    data = loader(2 * torch.stack([angle.cos(), angle.sin()], 1))
    before = copy.deepcopy(gan)
    trainer = quiet_trainer(tmp_path, HRNNOptimizerCallback(rate=rate), max_epochs=15)
    trainer.fit(gan, data)
    assert [type(optimizer) for optimizer in trainer.optimizers] == [HRNN, HRNN]
    for param, start in zip(gan.parameters(), before.parameters(), strict=True):
        assert param.isfinite().all()
        assert not torch.equal(param, start)
    if rate == "given":  # a game has no minimum to go down to: learned rates rise, and where they end is chance
        assert gan.distance() < 0.92 * before.distance()


# ---------------------------------------------------------------- a transformer


class Reverser(LightningModule):
    """Reads eight symbols and says them backwards."""

    def __init__(self, symbols=6, length=8, width=32):
        super().__init__()
        self.embed = nn.Embedding(symbols, width)
        self.place = nn.Parameter(torch.randn(length, width) * 0.1)
        layer = nn.TransformerEncoderLayer(width, 2, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, symbols)
        self.losses = []

    def training_step(self, batch, batch_idx):
        (symbols,) = batch
        logits = self.head(self.encoder(self.embed(symbols) + self.place))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), symbols.flip(1).flatten())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = AdamW(self.parameters(), lr=1e-3, weight_decay=0.01)
        schedule = OneCycleLR(optimizer, max_lr=1e-3, total_steps=self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("schedulers", ["drop", "keep"])
def test_a_transformer_with_one_cycle_and_bf16_mixed(tmp_path, schedulers):
    torch.manual_seed(0)
    module, data = Reverser(), loader(torch.randint(0, 6, (512, 8)))
    callback = HRNNOptimizerCallback(schedulers=schedulers)
    trainer = quiet_trainer(tmp_path, callback, precision="bf16-mixed", max_epochs=10, gradient_clip_val=1.0)
    trainer.fit(module, data)
    assert type(trainer.optimizers[0]) is HRNN
    assert trainer.global_step == 160
    assert sum(module.losses[:4]) / 4 > 1.7  # six symbols by chance: 1.79
    assert sum(module.losses[-4:]) / 4 < 1.5


# ---------------------------------------------------------------- averages and accumulation


class Spirals(LightningModule):
    """Tells two spirals apart, with batch norm."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)
        )
        self.losses = []

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        loss = nn.functional.cross_entropy(self.net(inputs), targets)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return Adam(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("average_first", [True, False])
def test_a_module_with_moving_average_and_accumulation(tmp_path, average_first):
    torch.manual_seed(0)
    turn = torch.rand(512) * 2 * math.pi + 0.5
    side = torch.randint(0, 2, (512,))
    sign = 1 - 2 * side
    inputs = torch.stack([sign * turn * turn.cos(), sign * turn * turn.sin()], 1) / 4
    module, average = Spirals(), EMAWeightAveraging(decay=0.9)
    callbacks = [average, HRNNOptimizerCallback()]
    trainer = quiet_trainer(
        tmp_path, *(callbacks if average_first else callbacks[::-1]), max_epochs=20, accumulate_grad_batches=2
    )
    trainer.fit(module, loader(inputs, side))
    assert trainer.global_step == 160
    assert sum(module.losses[-8:]) < 0.75 * sum(module.losses[:8])
    with torch.no_grad():  # what is left in the module is the average
        right = (module.train().net(inputs).argmax(1) == side).float().mean().item()
    assert right > 0.75
