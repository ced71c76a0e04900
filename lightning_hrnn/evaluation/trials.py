"""Run trials, several at a time, and remember their outcomes on disk, so that a run that was killed goes on."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from dataclasses import asdict
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import NamedTuple

import torch

from lightning_hrnn.evaluation.protocol import Learned, Outcome, Trial
from lightning_hrnn.meta.memory import keep_freed_memory
from lightning_hrnn.optimizer.hierarchical_rnn import HierarchicalRNN
from lightning_hrnn.optimizer.kernels import choose_engine

POLL = 0.5  # seconds between looks at how far the trials have come


class Cache(NamedTuple):
    """Keep outcomes in a folder, a file for each trial."""

    folder: Path

    def path(self, trial: Trial) -> Path:
        """Return where a trial's outcome lies; the name holds a hash of all that it depends on."""
        digest = hashlib.sha256(json.dumps(trial.key(), sort_keys=True).encode()).hexdigest()[:12]
        return self.folder / f"{trial.setting.suite}-{trial.task.replace('/', '-')}-{trial.optimizer}-{digest}.json"

    def read(self, trial: Trial) -> Outcome | None:
        """Return an outcome; None if there is none, or the file is damaged or of another trial."""
        try:
            content = json.loads(self.path(trial).read_text(encoding="utf-8"))
            outcome = Outcome(**content["outcome"])
            return outcome if content["trial"] == trial.key() and _belongs(outcome, trial) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, trial: Trial, outcome: Outcome) -> None:
        """Store an outcome, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(trial)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({"trial": trial.key(), "outcome": asdict(outcome)}), encoding="utf-8")
        part.replace(path)


def _belongs(outcome: Outcome, trial: Trial) -> bool:
    """Tell whether an outcome is of as many instances as the trial, and has a rate if that has one."""
    has_rate = isinstance(outcome.lr, int | float) and outcome.lr > 0
    return len(outcome.final) == trial.setting.seeds and has_rate != trial.learns_rates


def run_trials(
    trials: Sequence[Trial],
    rule: HierarchicalRNN,
    cache: Cache,
    processes: int,
    report: Callable[[float, Trial | None], None] = lambda done, trial: None,
) -> dict[Trial, Outcome]:
    """Return the outcomes of trials, those that the cache lacks by running them.

    Args:
        trials: what to run, in this order.
        rule: the learned optimizer.
        cache: where outcomes are kept.
        processes: how many trials to run at once, each on one thread; 1 runs them in this process.
        report: called with the number of trials done, fractions of running ones included, and with each trial that
            has just ended.

    Raises:
        RuntimeError: a process was killed from outside.
    """
    outcomes: dict[Trial, Outcome] = {}
    for trial in trials:
        outcome = cache.read(trial)
        if outcome is not None:
            outcomes[trial] = outcome
    report(float(len(outcomes)), None)
    missing = [trial for trial in trials if trial not in outcomes]
    run = _here if processes == 1 else _in_processes
    for trial, outcome in run(missing, rule, min(processes, len(missing)), len(outcomes), report):
        cache.write(trial, outcome)
        outcomes[trial] = outcome
    return {trial: outcomes[trial] for trial in trials}


Report = Callable[[float, Trial | None], None]


def _here(
    trials: Sequence[Trial], rule: HierarchicalRNN, processes: int, before: int, report: Report
) -> Iterator[tuple[Trial, Outcome]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them only wait for each other on tasks this small
    try:
        done = float(before)

        def tick(share: float) -> None:
            nonlocal done
            done += share
            report(done, None)

        for trial in trials:
            yield trial, trial.run(_learned(trial, rule), tick)
            report(done, trial)
    finally:
        torch.set_num_threads(threads)


def _in_processes(
    trials: Sequence[Trial], rule: HierarchicalRNN, processes: int, before: int, report: Report
) -> Iterator[tuple[Trial, Outcome]]:
    if not trials:
        return
    context = multiprocessing.get_context("spawn")
    done = context.Value("d", float(before))
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(processes, context, _begin_worker, (done,))
    try:
        running: dict[Future[Outcome], Trial] = {pool.submit(_run_in_worker, trial, rule): trial for trial in trials}
        while running:
            for future in wait(running, POLL, FIRST_COMPLETED).done:
                trial = running.pop(future)
                yield trial, future.result()
                report(done.value, trial)
            report(done.value, None)
    except BrokenProcessPool as error:
        raise RuntimeError(
            "One of the processes was killed from outside, usually because memory ran out. What has ended is kept: "
            "give the same command again, with fewer --processes."
        ) from error
    except BaseException:
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_done: Synchronized[float] | None = None  # in a worker: trials done by all workers


def _begin_worker(done: Synchronized[float]) -> None:
    global _done
    _done = done
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers, and ends its workers
    torch.set_num_threads(1)
    keep_freed_memory()
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_in_worker(trial: Trial, rule: HierarchicalRNN) -> Outcome:
    def tick(share: float) -> None:
        if _done is not None:
            with _done.get_lock():
                _done.value += share

    return trial.run(_learned(trial, rule), tick)


def _learned(trial: Trial, rule: HierarchicalRNN) -> Learned | None:
    if not trial.is_learned:
        return None
    rule = deepcopy(rule).requires_grad_(False)
    return Learned(rule, choose_engine("auto", rule) if trial.setting.device == "cpu" else None)
