"""What the rule learns from: task families and the corpora that mix them. Plain torch; knows no optimizer."""

from lightning_hrnn.tasks.base import Data, Params, TaskFamily
from lightning_hrnn.tasks.conformance import TaskError, check_interface, check_task
from lightning_hrnn.tasks.corpus import CORPORA, Corpus, get_corpus
from lightning_hrnn.tasks.registry import FAMILIES, get_family, register

__all__ = [
    "CORPORA",
    "FAMILIES",
    "Corpus",
    "Data",
    "Params",
    "TaskError",
    "TaskFamily",
    "check_interface",
    "check_task",
    "get_corpus",
    "get_family",
    "register",
]
