from typing import Any

import pytest

from fxprune.methods import Scores
from fxprune.scoring import contract
from fxprune.sparsity.masks import Masks


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
