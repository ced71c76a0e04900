"""What the learned optimizer costs, beside others: time, memory, share of training, speed of meta-training.

`clock` times calls in turns, `memory` weighs them, `models` are what is optimized, `steps`, `scaling` and `unrolls`
make the rows of the report, `figures` draws them. Everything is compared inside one process, because on a shared
machine the same code takes very different times from run to run.
"""

from lightning_hrnn.evaluation.benchmark.clock import Tick, Timings, interleave
from lightning_hrnn.evaluation.benchmark.memory import peak_temporary_bytes, state_bytes
from lightning_hrnn.evaluation.benchmark.models import Model, load_model
from lightning_hrnn.evaluation.benchmark.scaling import measure_threads
from lightning_hrnn.evaluation.benchmark.steps import Iteration, StepRows, Variant, measure_steps, variants
from lightning_hrnn.evaluation.benchmark.unrolls import UnrollSize, measure_unrolls

__all__ = [
    "Iteration",
    "Model",
    "StepRows",
    "Tick",
    "Timings",
    "UnrollSize",
    "Variant",
    "interleave",
    "load_model",
    "measure_steps",
    "measure_threads",
    "measure_unrolls",
    "peak_temporary_bytes",
    "state_bytes",
    "variants",
]
