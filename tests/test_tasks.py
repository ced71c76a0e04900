"""Every registered family keeps the interface, and the registry and corpora answer by name."""

import random

import torch

from lightning_hrnn.tasks import FAMILIES, check_task, get_family


def test_every_family_conforms():
    torch.set_num_threads(1)
    for name in FAMILIES:
        for seed in range(2):
            family = get_family(name, random.Random(seed))
            assert family.name == name
            check_task(family, torch.Generator().manual_seed(seed))
