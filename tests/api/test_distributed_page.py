"""The program in docs/distributed.md runs under torchrun."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent.parent / "docs" / "distributed.md"


@pytest.mark.slow  # torchrun starts three interpreters, and each imports all of torch
def test_the_program_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    (tmp_path / "prune.py").write_text(code, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "prune.py"], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Older releases of PyTorch let gloo write lines of its own there.
    assert any(line.startswith("538 weights left") for line in done.stdout.splitlines()), done.stdout
    assert (tmp_path / "masks.safetensors").exists()
