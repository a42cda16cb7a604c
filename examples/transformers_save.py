"""Prune a small BERT, train it for a step, and save and load it in the way of transformers.

Run it with ``uv run python examples/transformers_save.py``; it needs ``pip install 'fxprune[transformers]'``.
"""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification

import fxprune


def main(sparsity: float = 0.8) -> float:
    """Return the sparsity of the model that was loaded."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    words, labels = torch.randint(1, 60, (4, 9)), torch.tensor([0, 1, 0, 1])
    model = fxprune.apply(
        BertForSequenceClassification(config), "magnitude", sparsity,
        example_inputs={"input_ids": words}, returns="module",
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters())
    model.train()(input_ids=words, labels=labels).loss.backward()
    optimizer.step()
    fxprune.verify(model)  # the masks held

    plain = fxprune.finalize(model).eval()
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        loaded = BertForSequenceClassification.from_pretrained(folder)
    assert torch.equal(loaded(words).logits, plain(words).logits)
    report = fxprune.analyze(loaded, example_inputs={"input_ids": words})
    print(report)
    return report.sparsity


if __name__ == "__main__":
    main()
