"""Arguments forgive: shapes come from data, and a wrong argument is answered with the right one."""

import inspect
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune.keywords import MEANT, TRAINING_METHODS
from fxprune.request import ARGUMENTS as APPLY
from fxprune.training.methods import ARGUMENTS, METHODS

X, Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def images_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )


class Words(nn.Module):
    """Takes keywords, as transformers models do."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(10, 4), nn.Linear(4, 2)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.table(ids)
        return self.head((x if mask is None else x * mask.unsqueeze(-1)).sum(1))


def words_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch["ids"], batch["mask"]), batch["y"])


WORDS = {
    "ids": torch.randint(10, (8, 5), generator=torch.Generator().manual_seed(0)),
    "mask": torch.ones(8, 5),
    "y": Y,
}


def stream() -> Iterator[Any]:
    yield X, Y


@pytest.mark.parametrize(
    "data",
    [(X, Y), [X, Y], [(X, Y)], DataLoader(TensorDataset(X, Y), 8), stream()],
    ids=["pair", "list", "batches", "loader", "iterator"],
)
def test_data_supply_the_shapes(data: Any) -> None:
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = fxprune.apply(model, "snip", 0.5, data=data)
        again = fxprune.apply(model, "snip", 0.5, data=(X, Y), example_inputs=X)
    assert all(torch.equal(mask, fxprune.masks(again)[name]) for name, mask in fxprune.masks(found).items())


def test_several_inputs_and_mappings_supply_the_shapes() -> None:
    pair = fxprune.apply(Words(), "snip", 0.25, data=((WORDS["ids"], WORDS["mask"]), Y))
    assert [node.name for node in pair.graph.nodes if node.op == "placeholder"] == ["ids", "mask"]
    keyed = fxprune.apply(Words(), "snip", 0.25, data=[WORDS], loss_fn=words_loss)
    assert fxprune.analyze(keyed).sparsity == 0.25
    with pytest.raises(ValueError, match="its batches are mappings of x, y, forward of Words asks for 'ids'"):
        fxprune.apply(Words(), "snip", 0.5, data={"x": X, "y": Y}, loss_fn=words_loss)


def test_shapes_in_data_go_before_the_size_that_a_model_was_published_with() -> None:
    model = timm.create_model("test_resnet", num_classes=2)
    found = fxprune.apply(
        model, "magnitude", 0.5, data=(torch.randn(2, 3, 32, 32), Y[:2]), on_collapse="warn"
    )
    assert next(node for node in found.graph.nodes if node.op == "placeholder").meta["val"].shape[-1] == 32


def test_a_loaders_generator_is_where_it_was() -> None:
    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(TensorDataset(X, Y), 8, shuffle=True, generator=generator)
    before = generator.get_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        fxprune.apply(net(), "magnitude", 0.5, data=loader)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    "data",
    [X, [X], (X,), [X, X, X], [[X], [X]], DataLoader(TensorDataset(X), 8)],
    ids=["tensor", "in a list", "in a tuple", "batches", "rows of lists", "loader"],
)
@pytest.mark.parametrize(("method", "options"), [("wanda", {}), ("sparsegpt", {}), ("px", {"rounds": 3})])
def test_inputs_need_no_labels_where_no_loss_is_asked_for(
    method: str, options: dict[str, int], data: Any
) -> None:
    model = net()
    found = fxprune.apply(model, method, 0.5, data=data, **options)
    labelled = fxprune.apply(model, method, 0.5, data=(X, Y), **options)
    assert all(map(torch.equal, found.parameters(), labelled.parameters()))
    assert fxprune.evaluate(found, X, reference=model) == replace(
        fxprune.evaluate(found, (X, Y), reference=model), loss=None
    )


def test_two_batches_in_a_list_look_like_a_pair() -> None:
    """One of them would be left out in silence."""
    model, other = net(), torch.randn(6, 4)
    with pytest.warns(UserWarning, match=r"data: a list of two tensors.*\[\[x1\], \[x2\]\]") as said:
        pruned = fxprune.apply(model, "wanda", 0.5, data=[X, other])
    assert [one.filename for one in said] == [__file__]
    with pytest.warns(UserWarning, match="data: a list of two tensors") as said:
        fxprune.reconstruct(pruned, [X, other], model, progress=False)
    assert [one.filename for one in said] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in ([X, Y], (X, other), [[X], [other]]):
            fxprune.apply(model, "wanda", 0.5, data=data)


def test_a_loss_needs_labels_or_is_the_caller_s_own() -> None:
    for data in ([X], DataLoader(TensorDataset(X), 8)):
        with pytest.raises(ValueError, match=r"'snip': data hold no labels.*pass pairs"):
            fxprune.apply(net(), "snip", 0.5, data=data)
        found = fxprune.apply(net(), "snip", 0.5, data=data, loss_fn=lambda output, _: output.square().mean())
        assert fxprune.analyze(found).sparsity == 0.5
    with pytest.raises(ValueError, match="data: it holds no labels, so that there is nothing to measure"):
        fxprune.evaluate(net(), X)


class Repeated(nn.Module):
    """Repeats a layer by what it computes, so that there is no graph of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        for _ in range(3):
            if float(x.detach().mean()) > -1:
                x = self.again(x).relu()
        return self.last(x)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "snip"])
def test_a_model_without_a_graph_runs_on_the_first_batch(method: str) -> None:
    model = Repeated()
    with pytest.warns(UserWarning, match="pruned without a graph"):
        found = fxprune.apply(model, method, 0.5, data=(X, Y), returns="module")
    with pytest.warns(UserWarning, match="pruned without a graph"):
        given = fxprune.apply(model, method, 0.5, data=(X, Y), example_inputs=X, returns="module")
    assert set(fxprune.masks(found)) == {"first.weight", "again.weight", "last.weight"}
    assert all(torch.equal(mask, fxprune.masks(given)[name]) for name, mask in fxprune.masks(found).items())
    # Shapes alone will do for weights.
    with pytest.warns(UserWarning, match="pruned without a graph"):
        shapes = fxprune.apply(model, "magnitude", 0.5, example_inputs=X.to("meta"), returns="module")
    assert set(fxprune.masks(shapes)) == set(fxprune.masks(found))


NUMPY = (X.numpy(), Y.numpy())
FORMS = [
    ((X, Y, Y), TypeError, r"data is a tuple of 3, expected a pair .*\(\(x1, x2\), y\)"),
    ([(X, Y, Y)], ValueError, r"batch 0 of data is a tuple of 3, expected a pair .*\(\(x1, x2\), y\)"),
    (TensorDataset(X, Y), TypeError, r"data is a TensorDataset, which yields samples.*DataLoader\(data"),
    (NUMPY, TypeError, r"data holds numpy arrays, expected tensors: \(torch\.from_numpy\(x\)"),
    ([NUMPY], ValueError, r"batch 0 of data holds numpy arrays.*torch\.from_numpy\(x\)"),
    (np.ones((3, 4)), TypeError, r"data is a numpy array.*torch\.from_numpy\(x\)"),
    (X, TypeError, r"data is a Tensor, expected a pair"),
    (lambda: [(X, Y)], TypeError, r"data is a function, expected a pair.*; call it, if it returns them"),
    ([], ValueError, "data yields no batch"),
]


@pytest.mark.parametrize(("data", "kind", "words"), FORMS, ids=[row[2][:24] for row in FORMS])
def test_messages_about_data_come_before_those_about_inputs(data: Any, kind: Any, words: str) -> None:
    with pytest.raises(kind, match=words) as caught:
        fxprune.apply(net(), "snip", 0.5, data=data)
    assert "\n" not in str(caught.value)


MISFITS = [
    (IMAGES.half(), "float16 of (4, 3, 8, 8)", "pass x.to(torch.float32)"),
    ((IMAGES * 9).to(torch.uint8), "uint8 of (4, 3, 8, 8)", "pass x.float() / 255"),
    (IMAGES.permute(0, 2, 3, 1), "float32 of (4, 8, 8, 3)", "pass x.permute(0, 3, 1, 2)"),
    (IMAGES[:, :1], "float32 of (4, 1, 8, 8)", "pass x.expand(-1, 3, -1, -1)"),
]


@pytest.mark.parametrize(("x", "given", "remedy"), MISFITS, ids=[row[2] for row in MISFITS])
@pytest.mark.parametrize("inputs", [None, IMAGES], ids=["from data", "given"])
def test_images_that_do_not_fit(x: torch.Tensor, given: str, remedy: str, inputs: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"data: x is {given}")) as caught:
        fxprune.apply(images_net(), "snip", 0.5, data=(x, Y[:4]), example_inputs=inputs)
    assert remedy in str(caught.value)
    assert "takes float32 of (N, 3, " in str(caught.value)


def test_tokens_that_are_no_whole_numbers() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(tokens).mean(1))

    with pytest.raises(
        ValueError, match=r"data: x is float32 of \(4, 5\), Words takes int64.*pass x\.to\(torch\.int64\)"
    ):
        fxprune.apply(Words(), "snip", 0.5, data=(torch.ones(4, 5), torch.zeros(4).long()))


def test_images_of_a_size_that_the_model_does_not_take() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, depth=1)
    remedy = "pass torch.nn.functional.interpolate(x, (224, 224)), or build the model for that size"
    for inputs in (None, torch.ones(1, 3, 224, 224)):
        with pytest.raises(ValueError, match=re.escape(f"float32 of (N, 3, 224, 224): {remedy}")):
            fxprune.apply(model, "snip", 0.5, data=(torch.randn(4, 3, 32, 32), Y[:4]), example_inputs=inputs)


def test_an_error_of_the_models_own_stays_what_it_is() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x)

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fxprune.apply(Broken(), "snip", 0.5, data=(X, Y), loss_fn=loss)


def test_a_loss_of_model_and_batch_on_pairs() -> None:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(TypeError, match=r"loss_fn is called with \(output, target\).*\(model, batch\) goes"):
        fxprune.apply(net(), "snip", 0.5, data=(X, Y), loss_fn=loss)


KEYWORDS = [
    ("example_input", "did you mean 'example_inputs'"),
    ("density", "did you mean 'sparsity', the fraction to remove, 1 - density"),
    ("amount", "did you mean 'sparsity'"),
    ("input_size", "did you mean 'example_inputs'"),
    ("epochs", "did you mean 'total', the number of calls of step, of a fxprune.Pruner"),
    ("micro_batches", "did you mean 'micro_batch'"),
    ("rounds", "methods that have it: force, grasp-it"),
    ("zzz", "its options: batches, mode"),
]


@pytest.mark.parametrize(("name", "words"), KEYWORDS, ids=[row[0] for row in KEYWORDS])
def test_a_misspelt_argument_names_the_nearest_of_all(name: str, words: str) -> None:
    with pytest.raises(TypeError, match=re.escape(words)):
        fxprune.apply(net(), "snip", 0.5, data=(X, Y), **{name: 3})


def test_the_pruner_does_so_too() -> None:
    with pytest.raises(TypeError, match="did you mean 'total'"):
        fxprune.Pruner(net(), "gmp", 0.5, total=3, example_inputs=X, epochs=3)
    with pytest.raises(TypeError, match="did you mean 'example_inputs'"):
        fxprune.Pruner(net(), "gmp", 0.5, total=3, example_input=X)


def test_the_arguments_that_are_meant_exist() -> None:
    known = {*inspect.signature(fxprune.apply).parameters, *inspect.signature(fxprune.Pruner).parameters}
    assert {meant for meant, _ in MEANT.values()} <= known
    assert not set(MEANT) & set(inspect.signature(fxprune.apply).parameters)
    others = {"model", "method", "method_options"}
    assert set(APPLY) == set(inspect.signature(fxprune.apply).parameters) - others
    assert set(ARGUMENTS) == set(inspect.signature(fxprune.Pruner).parameters) - others


def test_a_method_of_the_pruner_given_to_apply() -> None:
    assert set(TRAINING_METHODS) == set(METHODS)
    for name, place in TRAINING_METHODS.items():
        function = METHODS[name]
        assert f"{function.__module__}.{function.__name__}" == f"fxprune.training.methods.{place}"
        with pytest.raises(ValueError, match=re.escape(f"fxprune.Pruner(model, {name!r}, total=epochs)")):
            fxprune.apply(net(), name, 0.5, example_inputs=X)


@pytest.mark.parametrize(
    "call",
    [
        lambda make: fxprune.apply(make, "magnitude", 0.5, example_inputs=X),
        lambda make: fxprune.analyze(make, example_inputs=X),
        lambda make: fxprune.capture(make, X),
        lambda make: fxprune.Pruner(make, "gmp", 0.5, total=3, example_inputs=X),
        lambda make: fxprune.compact(make),
        lambda make: fxprune.save(make, "net.safetensors"),
        lambda make: fxprune.channel_groups(make),
    ],
)
def test_a_factory_in_the_place_of_a_model(call: Any) -> None:
    with pytest.raises(TypeError, match=r"got the function net; call it: net\(\.\.\.\)"):
        call(net)
    with pytest.raises(TypeError, match=r"got the class Linear; call it: Linear\(\.\.\.\)"):
        call(nn.Linear)


def test_a_pattern_has_a_sparsity_of_its_own() -> None:
    for text in ("2:4", "nm(2,4)"):
        layer, x = nn.Linear(8, 4), torch.ones(1, 8)
        pruned = fxprune.apply(layer, "magnitude", granularity=text, example_inputs=x)
        groups = fxprune.masks(pruned)["weight"].view(4, 2, 4).sum(2)
        assert bool((groups == 2).all())
    assert fxprune.analyze(pruned).asked == "0.5"


def test_a_pattern_under_another_sparsity_says_what_happens() -> None:
    layer, x = nn.Linear(8, 4), torch.ones(1, 8)
    with pytest.warns(UserWarning, match=r"sparsity=0\.75: more than the 0\.5 of 2:4.*leave sparsity out"):
        fxprune.apply(layer, "magnitude", 0.75, granularity="2:4", example_inputs=x)
    with pytest.raises(ValueError, match=r"room for 16 weights .* a higher sparsity, 0\.5 or more"):
        fxprune.apply(layer, "magnitude", 0.25, granularity="2:4", example_inputs=x)


def test_a_default_sparsity_is_in_the_first_line_of_the_report() -> None:
    layer, x = nn.Linear(10, 10), torch.ones(1, 10)
    first = str(fxprune.analyze(fxprune.apply(layer, "magnitude", example_inputs=x))).splitlines()[0]
    assert first == "Linear, spatial resolution; no sparsity was asked for: 0.9, the default"
    first = str(fxprune.analyze(fxprune.apply(layer, "magnitude", 0.9, example_inputs=x))).splitlines()[0]
    assert first == "Linear, spatial resolution"


def test_a_percentage_in_the_place_of_a_fraction() -> None:
    with pytest.raises(ValueError, match=r"sparsity=90: .*; 0\.9\?"):
        fxprune.apply(net(), "magnitude", 90, example_inputs=X)


def test_a_step_beyond_total_warns_once() -> None:
    pruner = fxprune.Pruner(net(), "gmp", 0.5, total=2, example_inputs=X)
    with pytest.warns(UserWarning, match="at=50: beyond total=2") as caught:
        pruner.step(50)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.step(51)
        fresh = fxprune.Pruner(net(), "gmp", 0.5, total=2, example_inputs=X)
        fresh.step(1)
        fresh.step(2)


def test_saving_into_a_folder_that_is_not_there(tmp_path: Any) -> None:
    pruned = fxprune.apply(net(), "magnitude", 0.5, example_inputs=X)
    with pytest.raises(FileNotFoundError, match=r"nowhere/net\.safetensors: there is no folder .*nowhere"):
        fxprune.save(pruned, tmp_path / "nowhere" / "net.safetensors")


def test_scores_of_ones_own() -> None:
    with pytest.raises(TypeError, match=r"its criterion is called with \(problem, masks\)"):
        fxprune.methods.from_scores(lambda problem: {})
    method = fxprune.Method("own", fxprune.methods.from_scores(lambda problem, masks: [1.0]))
    with pytest.raises(TypeError, match="its criterion returned a list, expected a dict of parameter name"):
        fxprune.apply(net(), method, 0.5, example_inputs=X)
    with pytest.raises(ValueError, match="needs='dta', expected 'data' or 'graph'"):
        fxprune.Method("own", lambda problem: {}, needs=frozenset({"dta"}))
    with pytest.raises(TypeError, match=r"needs='data', expected a set: \{'data'\}"):
        fxprune.Method("own", lambda problem: {}, needs="data")  # type: ignore[arg-type]

    def arrays(problem: Any, masks: Any) -> Any:
        return {name: weight.numpy() for name, weight in problem.weights.items()}

    method = fxprune.Method("own", fxprune.methods.from_scores(arrays, name="own"))
    with pytest.raises(TypeError, match=r"own: scores of '0\.weight' are a ndarray, expected a tensor"):
        fxprune.apply(net(), method, 0.5, example_inputs=X)
    assert fxprune.Method("own", lambda problem: {}, needs={"data"}).needs == {"data"}  # type: ignore[arg-type]
