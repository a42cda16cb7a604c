"""CPU time of ``import torch`` beside that of fxprune's imports and help. Run by hand; prints a table.

Each is a process of its own; they take turns, so that a busy machine slows all of them alike.
"""

import resource
import subprocess
import sys
from statistics import median
from typing import Annotated

import typer

CODE = {
    "import torch": "import torch",
    "import fxprune": "import fxprune",
    "every public name": "import fxprune; [getattr(fxprune, name) for name in fxprune.__all__]",
    "fxprune --help": "from fxprune.cli import run; run(['--help'])",
    "fxprune methods": "from fxprune.cli import run; run(['methods'])",
    "fxprune prune --help": "from fxprune.cli import run; run(['prune', '--help'])",
}


def cpu_seconds(code: str) -> float:
    """Seconds of user and system time of an interpreter that runs ``code``."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(rounds: Annotated[int, typer.Option(help="Processes for each line.")] = 5) -> None:
    """Print the median of each, and its ratio to ``import torch``."""
    found: dict[str, list[float]] = {name: [] for name in CODE}
    for _ in range(rounds + 1):
        for name, code in CODE.items():
            found[name].append(cpu_seconds(code))
    # The first round fills the caches.
    medians = {name: median(times[1:]) for name, times in found.items()}
    for name, seconds in medians.items():
        typer.echo(f"{name:22} {seconds:6.2f} s  {seconds / medians['import torch']:5.2f} x")


if __name__ == "__main__":
    typer.run(main)
