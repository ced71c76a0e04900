"""`HRNN` that can go on as AdamW, in place: whoever holds the optimizer (schedulers, scalers, loops) need not know."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from lightning_hrnn.optimizer.optimizer import HRNN
from lightning_hrnn.optimizer.sharding import local_grad
from lightning_hrnn.optimizer.state import FALLBACK_LR, NOTE, note_of

DEFAULT_FALLBACK_LR = 1e-3


class HRNNWithFallback(HRNN):
    """Step as `HRNN` until told to fall back, from then on as `torch.optim.AdamW` over the same param groups.

    The multiplier `lr` of each group now multiplies `fallback_lr`, so schedules keep their shape, and weight decay its
    value. `betas`, `eps` and `amsgrad` are those of the group if it has them. A saved state says which of the two it
    is of; either can be loaded at any time.

    Args:
        params: parameters, or dicts of parameter groups.
        fallback_lr: AdamW's learning rate for a multiplier of 1; with `rate="given"` AdamW takes `lr` as it is.
        options: see `HRNN`.

    Raises:
        ValueError: `fallback_lr` is not positive, and as `HRNN`.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = HRNNWithFallback(model.parameters(), fallback_lr=3e-4)
        >>> optimizer.fall_back()
        >>> model(torch.ones(3, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.bias])
        ['exp_avg', 'exp_avg_sq', 'step']
    """

    def __init__(self, params: Any, *, fallback_lr: float = DEFAULT_FALLBACK_LR, **options: Any) -> None:
        if not 0 < fallback_lr < math.inf:
            raise ValueError(f"fallback_lr must be positive, not {fallback_lr}.")
        self.fallback_lr = fallback_lr if options.get("rate", "learned") == "learned" else 1.0
        self._adamw: AdamW | None = None
        super().__init__(params, **options)

    @property
    def fallen_back(self) -> bool:
        """Tell whether the steps are AdamW's."""
        return self._adamw is not None

    def fall_back(self) -> None:
        """Go on as AdamW with a new state; that of the learned rule is dropped, and its memory freed."""
        self.end_attention()
        self._adamw = AdamW([self._settings(group) for group in self.param_groups])
        self.state = self._adamw.state  # one state for both: what is saved is AdamW's

    def _settings(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return AdamW's param group for one of ours. A multiplier of zero leaves parameters and state alone."""
        lr = float(group["lr"]) * self.cooldown
        own: dict[str, Any] = {
            "params": group["params"] if lr else [],
            "lr": lr * self.fallback_lr,
            "weight_decay": float(group["weight_decay"]),
        }
        if "betas" in group:  # an optimizer of Adam's family; `eps` of another means something else
            own.update({key: group[key] for key in ("betas", "eps", "amsgrad") if key in group})
        return own

    def _advance(self) -> None:
        if self._adamw is None:
            return super()._advance()
        params = [param for group in self.param_groups for param in group["params"] if param.numel()]
        grads = [local_grad(param) for param in params]
        if any(grad is not None for grad in grads) or self._ranks.several:
            _, finite = self._ranks.agree(grads, params[0].device)
            if not finite:
                return self._count_skipped()
        for mine, adams in zip(self.param_groups, self._adamw.param_groups, strict=True):
            adams.update(self._settings(mine))
        self._adamw.step()

    def _choose_rule(self) -> bool:
        return self._adamw is None and super()._choose_rule()

    def _begin_group(self, group: dict[str, Any]) -> None:
        if self._adamw is None:
            return super()._begin_group(group)
        self._adamw.add_param_group({**self._settings(group), "params": group["params"]})

    @property
    def uses_attention(self) -> bool:
        """Tell whether the gradient is taken elsewhere than at the weights."""
        return self._adamw is None and super().uses_attention

    def log_rates(self) -> list[Tensor]:
        """Return the natural log of the learned rate of each tensor; after falling back, of AdamW's."""
        if self._adamw is None:
            return super().log_rates()
        count = sum(len(group["params"]) for group in self.param_groups)
        return list(torch.full((count,), math.log(self.fallback_lr)).unbind())

    # ------------------------------------------------------------------ saving

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with a note that says whether it is AdamW's."""
        result = super().state_dict()
        if self._adamw is not None:
            result[NOTE][FALLBACK_LR] = self.fallback_lr  # the same note stands in the first group
        return result

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take on a state, of the learned rule or of AdamW; one that is refused changes nothing.

        Raises:
            ValueError: as `HRNN`.
        """
        before = self._adamw, self.state, self.fallback_lr
        try:
            self._load(state_dict, note_of(state_dict))
        except BaseException:
            self._adamw, self.state, self.fallback_lr = before
            raise

    def _load(self, state_dict: dict[str, Any], note: dict[str, Any]) -> None:
        if FALLBACK_LR not in note:
            self._return_to_the_rule()
            super().load_state_dict(state_dict)
            return
        self.fallback_lr = float(note[FALLBACK_LR])
        self.fall_back()
        Optimizer.load_state_dict(self, state_dict)
        for group in self.param_groups:
            group.pop(NOTE, None)
        self._skipped = int(note.get("skipped_steps", 0))
        if self._adamw is not None:
            self._adamw.state = self.state

    def _return_to_the_rule(self) -> None:
        if self._adamw is None:
            return
        self._adamw, self.state = None, defaultdict(dict)
        self._given.clear()
        if not self._choose_rule():
            for group in self.param_groups:
                self._begin_group(group)
