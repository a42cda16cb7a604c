"""Pruning while a network trains: a model and a loop come in, a sparse trained network goes out."""

from fxprune.training.checkpoints import Checkpoints
from fxprune.training.contract import Moment, TrainingMethod
from fxprune.training.lottery import Lottery, Run, lottery
from fxprune.training.pruner import Event, Pruner
from fxprune.training.tickets import load_ticket

__all__ = [
    "Checkpoints",
    "Event",
    "Lottery",
    "Moment",
    "Pruner",
    "Run",
    "TrainingMethod",
    "load_ticket",
    "lottery",
]
