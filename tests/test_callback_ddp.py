"""Two processes take the same steps, bit by bit, and those of one process over both their batches."""

import pytest
import torch
from helpers.modules import Batches, Regression, adamw, attentive_rule, by_hand, quiet_trainer
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_hrnn.callbacks import HRNNOptimizerCallback
from lightning_hrnn.optimizer.optimizer import HRNN


def flat(module, optimizer):
    state = [value.float().flatten() for p in module.parameters() for value in optimizer.state[p].values()]
    params = [param.detach().flatten() for param in module.parameters()]
    return torch.cat(params), torch.cat(state)


class Halves(Regression):
    """Each rank takes its half of every batch; at the end they compare weights and state."""

    def __init__(self):
        def adamw_and_cosine(module):
            optimizer = adamw(module)
            return [optimizer], [CosineAnnealingLR(optimizer, T_max=10)]

        super().__init__(adamw_and_cosine)

    def loss(self, batch):
        return super().loss(tuple(value.chunk(self.trainer.world_size)[self.global_rank] for value in batch))

    def on_train_end(self):
        (optimizer,) = self.trainer.optimizers
        assert isinstance(optimizer, HRNN)
        assert (self.trainer.world_size, self.global_step) == (2, 6)
        for mine in flat(self, optimizer):
            gathered = [torch.empty_like(mine) for _ in range(2)]
            torch.distributed.all_gather(gathered, mine)
            assert torch.equal(*gathered), "the ranks have drifted apart"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
def test_two_ranks_are_one(tmp_path):
    rule, batches = attentive_rule(), Batches(5)
    module, single = Halves(), Regression()
    callback = HRNNOptimizerCallback(rule)
    trainer = quiet_trainer(tmp_path, callback, devices=2, strategy="ddp_fork", accumulate_grad_batches=2)
    trainer.fit(module, batches)
    by_hand(single, batches, accumulate=2, weights=rule, weight_decay=0.01)
    for ours, theirs in zip(module.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
