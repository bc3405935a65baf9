"""Evaluators, one file each: a model folder in, numbers out, and which way each number is better.

Importing the package imports every module in it, so a new evaluator is there by having a file.
"""

from importlib import import_module
from pkgutil import iter_modules

from superpose.evaluators.evaluation import Evaluation, evaluate_model
from superpose.evaluators.registry import (
    Evaluator,
    Measured,
    Report,
    evaluator,
    find_evaluator,
    registered_evaluators,
    silent,
)

__all__ = [
    "Evaluation",
    "Evaluator",
    "Measured",
    "Report",
    "evaluate_model",
    "evaluator",
    "find_evaluator",
    "registered_evaluators",
    "silent",
]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
