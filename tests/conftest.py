"""Verify every lowered graph; seed every test by its name; shuffle the tests: ``pytest --shuffle SEED``."""

import functools
import os
import random
import sys
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from thinning import mark_slow_cases
from torch import fx

from fxprune import lowering
from fxprune.graph import ChannelGraph
from fxprune.methods import Scores
from fxprune.scoring import contract
from fxprune.sparsity.masks import Masks

# Workers share the cores: one thread each, and each of the processes that they start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def verify_what_is_lowered() -> None:
    """Replace ``lower`` wherever it is imported by one that verifies what it returns.

    This runs before any test module is imported. It costs about two milliseconds for one of the small nets,
    a tenth of what capturing and lowering it costs.
    """
    original = lowering.lower

    @functools.wraps(original)
    def lower(gm: fx.GraphModule, **options: Any) -> ChannelGraph:
        graph = original(gm, **options)
        graph.verify(gm)
        return graph

    for name, module in list(sys.modules.items()):
        if name.startswith("fxprune"):
            for key, known in list(vars(module).items()):
                if known is original:
                    setattr(module, key, lower)


verify_what_is_lowered()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run the tests in a random order")


@pytest.hookimpl(tryfirst=True)  # before tests that are marked slow are left out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mark_slow_cases(items)
    seed = config.getoption("--shuffle")
    if seed is not None:
        random.Random(seed).shuffle(items)


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Seed Python, numpy and torch by the name of the test, whatever ran before it."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[Scores]:
    """The scores that methods hand to selection."""
    seen: list[Scores] = []
    select = contract.select

    def recording(scores: Scores, *args: Any, **kwargs: Any) -> Masks:
        seen.append(scores)
        return select(scores, *args, **kwargs)

    monkeypatch.setattr(contract, "select", recording)
    return seen
