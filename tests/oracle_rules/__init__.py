"""Say what every torch operation does to effective paths: one rule per operation, for `oracle.py`."""

from oracle_rules import attention, moves, pointwise, products, windows
from oracle_rules.duals import Dual, Setting, UnknownOpError, perform

__all__ = [
    "Dual",
    "Setting",
    "UnknownOpError",
    "attention",
    "moves",
    "perform",
    "pointwise",
    "products",
    "windows",
]
