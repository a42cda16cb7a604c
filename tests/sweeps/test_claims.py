"""A claim is made once, and given up when nobody touches it."""

import json
import os
import time
from pathlib import Path

import pytest

from fxprune.sweeps import claims as claiming
from fxprune.sweeps.claims import Claims


def test_a_claim_is_made_once_and_given_up_when_nobody_touches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = Claims(tmp_path)
    with claims.claim("cell") as mine:
        assert mine
        with Claims(tmp_path).claim("cell") as again:
            assert not again
        elsewhere = {"host": "another", "pid": os.getpid()}
        (tmp_path / "cell.0.claim").write_text(json.dumps(elsewhere))
        assert claims.is_claimed("cell")
        old = time.time() - claiming.ALIVE - 5
        os.utime(tmp_path / "cell.0.claim", (old, old))
        assert not claims.is_claimed("cell")
        other = Claims(tmp_path)
        with other.claim("cell") as taken:
            assert taken
            assert not claims.write("cell", {"who": "the one that was given up"})
            assert other.write("cell", {"who": "the one that took over"})
    assert claims.read("cell") == {"who": "the one that took over"}
