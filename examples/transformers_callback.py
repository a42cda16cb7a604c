"""Prune a small BERT while transformers' ``Trainer`` trains it to tell which of two words comes first.

Run it with ``uv run python examples/transformers_callback.py``; it needs
``pip install 'fxprune[transformers]'``. Nothing is downloaded.
"""

import tempfile
from typing import Any

import torch
import typer
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import fxprune
from fxprune.training.callbacks.transformers import PruningCallback

LENGTH = 8


class Sentences(Dataset[Any]):
    """Sentences of random words; the label says whether word 1 or word 2 is in front."""

    def __init__(self, number: int, seed: int) -> None:
        self.words = torch.randint(3, 20, (number, LENGTH), generator=torch.Generator().manual_seed(seed))
        self.labels = torch.arange(number) % 2
        self.words[:, 0] = 1 + self.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.words[index], "labels": self.labels[index]}


def main(epochs: int = 6) -> tuple[float, float]:
    """Trains with the callback; returns accuracy and sparsity."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=LENGTH, num_labels=2,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    pruner = fxprune.Pruner(
        model, "gmp", 0.8, total=epochs, returns="inplace",
        example_inputs={"input_ids": torch.ones(2, LENGTH, dtype=torch.long)},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=epochs, per_device_train_batch_size=16, learning_rate=2e-3,
            report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_strategy="no",
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=Sentences(256, 0), callbacks=[PruningCallback(pruner)]
        )
        trainer.train()
        test = Sentences(128, 1)
        guesses = trainer.predict(test).predictions.argmax(-1)
    accuracy = float((torch.from_numpy(guesses) == test.labels).float().mean())
    fxprune.verify(model)
    print(f"sparsity {pruner.sparsity:.1%}, accuracy {accuracy:.1%}")
    return accuracy, pruner.sparsity


if __name__ == "__main__":
    typer.run(main)
