"""Other people's loops, with the real libraries: Lightning, transformers, timm; and the examples."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import example
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune.training import Pruner
from training import nets


@pytest.mark.slow
def test_plain_loop_example(tmp_path: Path, capsys: Any) -> None:
    plain = example("plain_loop")
    plain.main("gmp", epochs=3, checkpoint_dir=str(tmp_path))
    said = capsys.readouterr().out.splitlines()
    assert "epoch 3: sparsity 90.0%" in said[-1]
    plain.main("gmp", epochs=3, checkpoint_dir=str(tmp_path))
    assert capsys.readouterr().out == "", "it is done already"


@pytest.mark.slow
def test_plain_loop_example_with_gradients(capsys: Any) -> None:
    example("plain_loop").main("rigl", epochs=2)
    assert "epoch 2: sparsity" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.slow
def test_timm_example() -> None:
    found = example("timm_script").main("test_resnet", epochs=2, size=16, batch=128)
    assert found["sparsity"] == pytest.approx(0.8, abs=1e-4)
    assert found["loss"] < 2.6


@pytest.mark.slow
def test_lightning_example() -> None:
    pytest.importorskip("lightning")
    found = example("lightning_callback").main(epochs=3)
    assert found["sparsity"] == pytest.approx(0.9 / (1 + 2.718281828 ** (-5)), abs=1e-3)
    assert found["accuracy"] > 0.6


def lightning_run(
    folder: Path, epochs: int, ckpt: Any = None, every: Any = "epoch", method: str = "gmp"
) -> Any:
    lightning = pytest.importorskip("lightning")
    from fxprune.training.callbacks.lightning import PruningCallback

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = nets.mlp()

        def training_step(self, batch: Any, index: int) -> Any:
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    module = Module()
    total = 4 if every == "epoch" else 16
    pruner = Pruner(module.net, method, 0.8, total=total, example_inputs=nets.X, returns="inplace",
                    **({"frequency": 2} if method == "rigl" else {}))  # fmt: skip

    def loss(module: Any, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(module.net(batch[0]), batch[1])

    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, enable_checkpointing=False,
        accumulate_grad_batches=2, callbacks=[PruningCallback(pruner, every=every, loss=loss)],
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(*nets.batch(0, 64)), 8), ckpt_path=ckpt)
    fxprune.verify(module)
    return pruner, trainer


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lightning_goes_on_from_its_checkpoints(tmp_path: Path) -> None:
    whole, _ = lightning_run(tmp_path, 4)
    _, trainer = lightning_run(tmp_path, 2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = lightning_run(tmp_path, 4, tmp_path / "half.ckpt")
    assert nets.digest(resumed.model) == nets.digest(whole.model)
    assert resumed.history == whole.history
    assert whole.sparsity == pytest.approx(0.8, abs=0.002)


@pytest.mark.filterwarnings("ignore")
def test_lightning_by_steps_with_gradients(tmp_path: Path) -> None:
    pruner, _ = lightning_run(tmp_path, 4, every="step", method="rigl")
    assert [event.at for event in pruner.history] == [0, 2, 4, 6, 8, 10]
    assert pruner.sparsity == pytest.approx(0.8, abs=0.005)


def transformers_run(folder: Path, epochs: int, resume: bool = False, every: Any = "epoch") -> Any:
    transformers = pytest.importorskip("transformers")
    from fxprune.training.callbacks.transformers import PruningCallback

    sentences = example("transformers_callback").Sentences(32, 0)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    inputs = {"input_ids": torch.ones(2, 8, dtype=torch.long)}
    method, total = ("gmp", 4) if every == "epoch" else ("rigl", 16)
    pruner = Pruner(model, method, 0.7, total=total, returns="inplace", example_inputs=inputs,
                    **({} if every == "epoch" else {"frequency": 3}))  # fmt: skip
    arguments = transformers.TrainingArguments(
        str(folder), num_train_epochs=epochs, per_device_train_batch_size=8, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="epoch", logging_strategy="epoch", lr_scheduler_type="constant",
    )  # fmt: skip

    def loss(model: Any) -> torch.Tensor:
        found: torch.Tensor = model(input_ids=sentences.words[:4], labels=sentences.labels[:4]).loss
        return found

    trainer = transformers.Trainer(
        model, arguments, train_dataset=sentences, callbacks=[PruningCallback(pruner, every=every, loss=loss)]
    )
    trainer.train(resume_from_checkpoint=resume)
    fxprune.verify(model)
    return pruner, trainer


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_transformers_goes_on_from_its_checkpoints(tmp_path: Path) -> None:
    whole, trainer = transformers_run(tmp_path / "a", 4)
    assert [event.at for event in whole.history] == [1, 2, 3, 4]
    assert any(entry.get("sparsity", 0) > 0.3 for entry in trainer.state.log_history)
    transformers_run(tmp_path / "b", 2)
    resumed, _ = transformers_run(tmp_path / "b", 4, resume=True)
    assert nets.digest(resumed.model) == nets.digest(whole.model)
    assert resumed.history == whole.history


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_transformers_by_steps_with_gradients(tmp_path: Path) -> None:
    pruner, _ = transformers_run(tmp_path, 4, every="step")
    assert [event.at for event in pruner.history] == [0, 3, 6, 9]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_transformers_example() -> None:
    pytest.importorskip("transformers")
    accuracy, sparsity = example("transformers_callback").main(epochs=3)
    assert sparsity == pytest.approx(0.8, abs=1e-3)
    assert accuracy > 0.9


@pytest.mark.parametrize("library", ["lightning", "transformers"])
def test_units_are_epochs_or_steps(library: str) -> None:
    pytest.importorskip(library)
    module = importlib.import_module(f"fxprune.training.callbacks.{library}")
    with pytest.raises(ValueError, match="every='batch'"):
        module.PruningCallback(None, every="batch")


@pytest.mark.parametrize("library", ["lightning", "transformers"])
def test_a_missing_library_is_named(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"fxprune.training.callbacks.{library}", raising=False)
    with pytest.raises(ImportError, match=rf"fxprune\[{library}\]"):
        importlib.import_module(f"fxprune.training.callbacks.{library}")
