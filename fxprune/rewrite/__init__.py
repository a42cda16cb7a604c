"""Masks go into a model and come out again: masked modules, their checks, their files."""

from fxprune.rewrite.files import load_masks, provenance, read_header, read_ticket, save, stamp
from fxprune.rewrite.finalize import bare, finalize
from fxprune.rewrite.names import read
from fxprune.rewrite.reads import direct_reads
from fxprune.rewrite.verify import verify
from fxprune.rewrite.write import install, set_masks

__all__ = [
    "bare", "direct_reads", "finalize", "install", "load_masks", "provenance", "read",
    "read_header", "read_ticket", "save", "set_masks", "stamp", "verify",
]  # fmt: skip
