"""Models of ``transformers``, randomly initialised from small configurations, through the same door."""

from collections.abc import Callable

import pytest
import torch
from oracle import effective_parameters, random_masks
from torch import Tensor, nn

import fxprune
from capture.faithful import assert_close
from fxprune.capture import capture
from fxprune.lowering import lower
from fxprune.paths.count import reach

transformers = pytest.importorskip("transformers")

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
IMAGE = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
WORDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))


class Logits(nn.Module):
    """The model with what it returns picked out: a tensor instead of a record."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.model(x).logits
        return result


def vit() -> nn.Module:
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=5, **SMALL)
    return transformers.ViTForImageClassification(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=16, num_labels=5, **SMALL)
    return transformers.BertForSequenceClassification(config)


def swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=5
    )
    return transformers.SwinForImageClassification(config)


def segformer() -> nn.Module:
    config = transformers.SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 16, 32],
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=16,
        num_labels=5,
    )
    return transformers.SegformerForSemanticSegmentation(config)


MODELS: list[tuple[Callable[[], nn.Module], Tensor]] = [
    (vit, IMAGE),
    (bert, WORDS),
    (swin, IMAGE),
    (segformer, IMAGE),
]


@pytest.mark.slow
@pytest.mark.parametrize(("build", "example"), MODELS)
def test_captured_and_lowered(build: Callable[[], nn.Module], example: Tensor) -> None:
    torch.manual_seed(0)
    model = build().eval()
    gm = capture(model, example)
    assert list(gm.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        for batch in (1, 2):
            got, want = gm(example[:batch]), model(example[:batch])
            assert_close(dict(got), dict(want), f"batch of {batch}")
    graph = lower(gm)
    assert not graph.opaque


@pytest.mark.slow
@pytest.mark.parametrize(("build", "example"), MODELS)
def test_effective_weights_are_those_of_the_oracle(build: Callable[[], nn.Module], example: Tensor) -> None:
    torch.manual_seed(0)
    model = Logits(build()).eval()
    graph = lower(capture(model, example))
    masks = random_masks(model, 0.2, 0)
    found, wanted = reach(graph, masks), effective_parameters(model, example, masks)
    assert {n for n in wanted if not torch.equal(found[n], wanted[n])} == set()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:layer collapse")
@pytest.mark.parametrize(("build", "example"), MODELS)
def test_pruned(build: Callable[[], nn.Module], example: Tensor) -> None:
    torch.manual_seed(0)
    pruned = fxprune.apply(build(), "synflow", 0.5, rounds=5, example_inputs=example, progress=False)
    fxprune.verify(pruned)
    assert fxprune.analyze(pruned).density == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("hidden", [False, True])
def test_batches_with_padding_and_without_follow_each_other(hidden: bool) -> None:
    """The encoder by itself leaves out a mask that hides nothing."""
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=16, **SMALL)
    model = transformers.BertModel(config).eval()
    full = torch.ones_like(WORDS)
    padded = full.clone()
    padded[0, 4:] = 0
    graph = capture(model, {"input_ids": WORDS, "attention_mask": padded if hidden else full})
    for mask in (full, padded):
        found = graph(input_ids=WORDS, attention_mask=mask).last_hidden_state
        wanted = model(input_ids=WORDS, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(found, wanted)
