"""A file of flags in place of words."""

import json
from pathlib import Path
from typing import Any

from fxprune.cli import run


def test_a_file_of_flags(file: str, tmp_path: Path, capsys: Any) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        f'model = "{file}:small"\nmethod = "snip"\ndata = "{file}:data"\nsparsity = 0.25\nexclude = ["2"]\n'
        'mode = "eval"\njson = true\n'
    )
    assert run(["prune", "--config", str(config)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["method"], report["options"]) == ("snip", {"mode": "eval"})
    assert [layer["kept_params"] for layer in report["layers"].values()] == [72, 64]
    assert run(["prune", f"--config={config}", "-s", "0.5", "-m", "random", "--mode", "eval"]) == 2
    assert "no option 'mode'" in capsys.readouterr().err
    config.write_text('modell = "x"\n')
    assert run(["prune", "--config", str(config)]) == 2
    assert "'modell' is no flag of this command; did you mean 'model'?" in capsys.readouterr().err
