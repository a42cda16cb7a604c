"""Parameters read without calling their owner: in graphs by a node, in plain modules by telling."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, symbolic_trace

import fxprune
from fxprune.capture import capture
from fxprune.rewrite import bare, direct_reads, finalize, install, read, set_masks, verify
from fxprune.rewrite.masking.graph_reads import is_mask_product
from rewrite import nets

NETS = {
    "functional": (nets.FunctionalConv, (2, 3, 6, 6)),
    "child": (nets.ReadsChild, (4, 6)),
    "standardised": (nets.Standardised, (2, 3, 7, 7)),
}
every_net = pytest.mark.parametrize("name", NETS)


@pytest.fixture(params=["symbolic_trace", "capture"])
def traced(request):
    """A model, its graph by one of two tracers, an input, masks."""

    def make(name):
        make_model, shape = NETS[name]
        torch.manual_seed(0)
        model = make_model()
        x = torch.randn(*shape)
        gm = symbolic_trace(model) if request.param == "symbolic_trace" else capture(model, x)
        return model, gm, x, nets.masks_for(model)

    return make


def garbage(model, masks):
    """Fills the pruned storage, so that only masks in the computation can hide it."""
    stored = dict(model.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            stored[name].masked_fill_(~mask, 3.0)


@every_net
def test_graph(name, traced):
    model, gm, x, masks = traced(name)
    keys = set(gm.state_dict())
    install(gm, masks)
    expected = gm(x)
    if name != "standardised":
        assert torch.equal(expected, model(x)), "the parameters are shared, so the model has the zeros too"
    assert set(gm.state_dict()) == keys | {key + "_mask" for key in masks}
    verify(gm)
    expected.square().sum().backward()
    assert nets.pruned_gradients_are_zero(gm, masks)
    code = gm.code
    changed = nets.masks_for(model, seed=1)
    set_masks(gm, changed)
    assert gm.code == code, "a second mask only changes buffers"
    assert all(torch.equal(read(gm)[key], changed[key]) for key in changed)
    verify(gm)


@every_net
def test_graph_computes_with_the_mask(name, traced):
    _, gm, x, masks = traced(name)
    install(gm, masks)
    expected = gm(x)
    garbage(gm, masks)
    assert torch.equal(gm(x), expected)
    with pytest.raises(RuntimeError, match="pruned weights are not zero in storage"):
        verify(gm)


@every_net
def test_graph_copies_and_bare(name, traced):
    model, gm, x, masks = traced(name)
    code = gm.code
    install(gm, masks)
    expected = gm(x)
    for twin in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert torch.equal(twin(x), expected)
        assert set(read(twin)) == set(masks)
        verify(twin)
        set_masks(twin, nets.masks_for(model, seed=3))
        assert torch.equal(gm(x), expected)
        verify(twin)
    plain = bare(gm)
    assert plain.code == code
    assert read(plain) == {}
    assert dict(plain.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert torch.equal(gm(x), expected)


@every_net
def test_graph_finalized(name, traced):
    _, gm, x, masks = traced(name)
    install(gm, masks)
    code = gm.code
    final = finalize(gm)
    assert torch.equal(final(x), gm(x))
    assert gm.code == code
    assert not any(key.endswith("_mask") for key in final.state_dict())
    assert not any(is_mask_product(final, node) for node in final.graph.nodes)
    assert "_mask" not in final.code
    assert nets.raw_zero(final, masks)


@pytest.mark.slow
@every_net
def test_graph_compiled_and_exported(name, traced):
    model, gm, x, masks = traced(name)
    install(gm, masks)
    torch._dynamo.reset()
    compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), gm(x), atol=1e-6)
    set_masks(compiled, nets.masks_for(model, seed=2))
    assert torch.allclose(compiled(x), gm(x), atol=1e-6)
    assert torch.allclose(torch.export.export(gm, (x,)).module()(x), gm(x), atol=1e-6)


@every_net
def test_graph_keeps_pruned_weights_at_zero(name, traced):
    _, gm, x, masks = traced(name)
    optimizer = torch.optim.AdamW(gm.parameters(), lr=0.1, weight_decay=0.1)
    gm(x).square().sum().backward()
    optimizer.step()
    install(gm, masks)
    for model in (gm, copy.deepcopy(gm)):
        if model is not gm:
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
            assert nets.raw_zero(model, masks)


def test_graph_loads_dense_checkpoints(traced):
    model, gm, _, masks = traced("functional")
    dense = {key: value.clone() for key, value in model.state_dict().items()}
    install(gm, masks)
    for target in (gm, copy.deepcopy(gm)):
        with pytest.warns(UserWarning, match="no masks: the model keeps its own"):
            target.load_state_dict(dense)
        assert all(torch.equal(read(target)[name], mask) for name, mask in masks.items())
        assert all(
            torch.equal(target.get_parameter(name), dense[name] * mask) for name, mask in masks.items()
        )
        loaded = target.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in dense.items() if key not in masks)


def test_the_mask_stands_after_standardisation(traced):
    _, gm, x, masks = traced("standardised")
    install(gm, masks)
    (kernel,) = [node for node in gm.graph.nodes if node.target is torch.conv2d]
    assert is_mask_product(gm, kernel.args[1])
    seen = {}

    class Spy(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):
            if target is torch.conv2d:
                seen["kernel"] = args[1]
            return super().call_function(target, args, kwargs)

    Spy(gm).run(x)
    assert (seen["kernel"][~masks["weight"]] == 0).all()
    assert (seen["kernel"][masks["weight"]] != 0).all()


def test_a_moved_operand_is_masked_at_the_read_only():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return nn.functional.linear(x, self.weight.t() * 2)

    model = Turned()
    gm = symbolic_trace(model)
    masks = nets.masks_for(model)
    install(gm, masks)
    x = torch.randn(2, 4)
    assert torch.equal(gm(x), model(x))
    verify(gm)


@pytest.mark.parametrize("told", [True, False])
def test_plain_module_told_of_a_direct_read(told):
    torch.manual_seed(0)
    model = nn.Sequential(nets.ReadsChild(), nn.ReLU())
    masks = nets.masks_for(model)
    x = torch.randn(4, 6)
    install(model, masks, direct=direct_reads(symbolic_trace(model)) if told else [])
    verify(model)
    expected = model(x)
    model(x).square().sum().backward()
    assert nets.pruned_gradients_are_zero(model, masks) == told
    assert isinstance(model[0], nets.ReadsChild)
    assert isinstance(model[0].qkv.weight, nn.Parameter)
    final = finalize(model)
    assert type(final[0]) is nets.ReadsChild
    assert torch.equal(final(x), expected)
    garbage(model, masks)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected) == told


def test_plain_modules_with_raw_parameters():
    torch.manual_seed(0)
    model = nn.Sequential(nets.Standardised(), nets.Block(nn.Conv2d(4, 2, 1)))
    masks = nets.masks_for(model)
    x = torch.randn(2, 3, 7, 7)
    gm = symbolic_trace(copy.deepcopy(model))
    install(model, masks)
    install(gm, masks)
    assert torch.equal(model(x), gm(x)), "the layer of one's own is masked behind its standardisation"
    model(x).square().sum().backward()
    assert nets.pruned_gradients_are_zero(model, masks)
    verify(model)
    final = finalize(model)
    assert torch.equal(final(x), model(x))


def test_lists_of_parameters():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.ParameterList([torch.randn(5, 4), torch.randn(3, 5)])

        def forward(self, x):
            for weight in self.weights:
                x = nn.functional.linear(x, weight)
            return x

    model = Listed()
    x = torch.randn(2, 4)
    masks = nets.masks_for(model)
    gm = symbolic_trace(copy.deepcopy(model))
    for target in (model, gm):
        install(target, masks)
        target(x).square().sum().backward()
        assert nets.pruned_gradients_are_zero(target, masks)
    assert torch.equal(model(x), gm(x))
    assert len(finalize(model).weights) == 2


def test_called_and_read():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return nn.functional.linear(self.fc(x), self.fc.weight)

    model = Both()
    x = torch.randn(2, 4)
    masks = nets.masks_for(model)
    gm = symbolic_trace(model)
    install(gm, masks)
    expected = gm(x)
    expected.square().sum().backward()
    assert nets.pruned_gradients_are_zero(gm, masks)
    garbage(gm, masks)
    for twin in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert isinstance(twin, GraphModule)
        assert torch.equal(twin(x), expected)


def test_a_graph_inside_a_plain_module(traced):
    model, gm, x, masks = traced("functional")
    outer = nn.Sequential(gm, nn.ReLU())
    set_masks(outer, {"0." + name: mask for name, mask in masks.items()})
    assert torch.equal(outer(x), model(x).relu())
    outer(x).sum().backward()
    assert nets.pruned_gradients_are_zero(gm, masks)
    verify(outer)


def test_results_kept_in_attributes_do_not_hinder_copies():
    class Caches(nn.Linear):
        def train(self, mode=True):
            self.kept = None if mode else self.bias * 2
            return super().train(mode)

        def forward(self, x):
            return nn.functional.linear(x, self.weight, self.bias * 2 if self.kept is None else self.kept)

    model = Caches(3, 2).eval()
    set_masks(model, nets.masks_for(model))
    x = torch.randn(4, 3)
    assert torch.equal(finalize(model)(x), model(x))
    assert torch.equal(bare(model)(x), model(x))
    verify(model)


@every_net
def test_a_masked_plain_module_is_captured_with_its_masks(name):
    make, shape = NETS[name]
    torch.manual_seed(0)
    model = make()
    x = torch.randn(*shape)
    original = capture(model, x)
    masks = nets.masks_for(model)
    install(model, masks, direct=direct_reads(original))
    gm = capture(model, x)
    assert torch.equal(gm(x), model(x))
    assert set(read(gm)) == set(masks)
    verify(gm)
    changed = nets.masks_for(model, seed=1)
    set_masks(gm, changed)
    assert torch.equal(gm(x), model(x)), "they share parameters and masks"
    assert bare(model)(x).shape == bare(gm)(x).shape, "nothing that is left needs the masks"
    assert sorted(str(node.target) for node in bare(gm).graph.nodes) == sorted(
        str(node.target) for node in original.graph.nodes
    )
    assert torch.equal(finalize(gm)(x), gm(x))


class Deep(nn.Module):
    """A parameter of its own, read before a long chain of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.inner, self.last = nn.Parameter(torch.ones(4)), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x) + self.bias
        for _ in range(1200):
            y = torch.relu(y)
        return self.last(nn.functional.layer_norm(y, (4,)))


@pytest.mark.slow
def test_a_long_chain_behind_a_parameter_is_no_matter() -> None:
    x = torch.randn(2, 3)
    pruned = fxprune.apply(Deep(), "magnitude", 0.5, granularity="channel", example_inputs=x, progress=False)
    dense = Deep()
    dense.load_state_dict(fxprune.finalize(pruned).state_dict())
    assert torch.allclose(pruned(x), dense(x))
    assert 0 < int(fxprune.masks(pruned)["bias"].sum()) < 4
