"""Masks go into a model and come out again: masked modules, their checks, their files."""

from fxprune.rewrite.files.archive import load_masks, provenance, read_header, read_ticket, save, stamp
from fxprune.rewrite.files.export import check_path
from fxprune.rewrite.masking.finalize import bare, finalize, plain
from fxprune.rewrite.masking.graph_reads import direct_reads
from fxprune.rewrite.masking.install import install, put_masks, set_masks
from fxprune.rewrite.masking.parameters import read
from fxprune.rewrite.masking.verify import verify

__all__ = [
    "bare",
    "check_path",
    "direct_reads",
    "finalize",
    "install",
    "load_masks", "plain",
    "provenance",
    "put_masks",
    "read",
    "read_header",
    "read_ticket",
    "save",
    "set_masks",
    "stamp",
    "verify",
]  # fmt: skip
