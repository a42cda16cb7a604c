"""Every kind of layer, masked: forward, gradient, kernel, copies, compiled, exported, finalized."""

import copy
import io
import pickle
import shutil
from typing import Any, ClassVar

import pytest
import torch
from thinning import one_in
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fxprune
from fxprune.rewrite import bare, finalize, install, read, set_masks, verify
from rewrite import nets

every_layer = pytest.mark.parametrize("name", nets.LAYERS)


def masked_layer(name):
    block, x = nets.layer(name)
    masks = {"layer.weight": nets.masks_for(block)["layer.weight"]}
    reference = copy.deepcopy(block)
    install(block, masks)
    return block, x, masks, reference


def reference_output(name, reference, x, mask):
    """Compute by hand, from the original block, what the masked block must."""
    weight = reference.layer.weight
    with torch.no_grad():
        weight.mul_(mask)
    if name not in nets.STANDARDISED:
        return reference(x)
    recorded = {}
    original = torch.conv2d

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is original:
                recorded["kernel"] = args[1]
                args = (args[0], args[1] * mask, *args[2:])
            return func(*args, **(kwargs or {}))

    with Spy():
        result = reference(x)
    assert (recorded["kernel"][~mask] != 0).any(), "standardisation should move zeros"
    return result


@every_layer
def test_forward_gradient_and_class(name):
    block, x, masks, reference = masked_layer(name)
    mask = masks["layer.weight"]
    expected = reference_output(name, reference, x, mask)
    found = block(x)
    assert torch.equal(found, expected)
    assert isinstance(block.layer, type(reference.layer))
    assert isinstance(block.layer.weight, nn.Parameter)
    found.square().sum().backward()
    expected.square().sum().backward()
    assert (block.layer.weight.grad[~mask] == 0).all()
    assert torch.allclose(block.layer.weight.grad, reference.layer.weight.grad * mask, atol=1e-5)
    assert nets.raw_zero(block, masks)
    assert set(block.state_dict()) == {*reference.state_dict(), "layer.weight_mask"}
    verify(block)
    assert torch.equal(read(block)["layer.weight"], mask)


@every_layer
def test_copies(name):
    block, x, masks, _ = masked_layer(name)
    expected = block(x)
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    copies = {
        "deepcopy": copy.deepcopy(block),
        "pickle": pickle.loads(pickle.dumps(block)),
        "torch.save": torch.load(file, weights_only=False),
    }
    for how, twin in copies.items():
        assert torch.equal(twin(x), expected), how
        assert type(twin.layer) is type(block.layer), how
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
        with torch.no_grad():
            twin.layer.weight.add_(1.0)
        twin(x).sum().backward()
        optimizer.step()
        assert nets.raw_zero(twin, masks), f"{how}: the copy is not looked after"


@every_layer
def test_finalize_and_bare(name):
    block, x, _, reference = masked_layer(name)
    before = {key: value.clone() for key, value in block.state_dict().items()}
    final = finalize(block)
    for size in (x, torch.cat([x, x])):
        assert torch.equal(final(size), block(size))
    assert "layer.weight_mask" not in final.state_dict()
    assert type(final.layer) is type(reference.layer) or name in nets.STANDARDISED
    if name in ("std", "scaled_std"):
        assert type(final.layer) is nn.Conv2d
    assert all(torch.equal(before[key], value) for key, value in block.state_dict().items())
    plain = bare(block)
    assert type(plain.layer) is type(reference.layer)
    assert plain.layer.weight is block.layer.weight
    assert read(plain) == {}
    assert torch.equal(read(block)["layer.weight"], before["layer.weight_mask"])


def test_a_frozen_layer_survives_copies():
    block, x, _, _ = masked_layer("scaled_std_same")
    final = pickle.loads(pickle.dumps(copy.deepcopy(finalize(block))))
    larger = torch.cat([x, x], dim=3)
    assert torch.equal(final(larger), block(larger))


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", one_in(2, nets.LAYERS))
def test_compiled_and_no_recompile_on_a_mask_change(name):
    block, x, _, _ = masked_layer(name)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for seed in (0, 1, 2):
        set_masks(compiled, {"layer.weight": nets.masks_for(block, seed=seed)["layer.weight"]})
        block.zero_grad()
        found = compiled(x)
        found.square().sum().backward()
        gradient = block.layer.weight.grad.clone()
        block.zero_grad()
        expected = block(x)
        expected.square().sum().backward()
        assert torch.allclose(found, expected, atol=1e-5)
        assert torch.allclose(gradient, block.layer.weight.grad, atol=1e-4)
        assert (gradient[~block.layer.weight_mask] == 0).all()
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
def test_inductor():
    block, x, _, _ = masked_layer("linear")
    counter = CompileCounterWithBackend("inductor")
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for seed in (0, 1):
        set_masks(block, {"layer.weight": nets.masks_for(block, seed=seed)["layer.weight"]})
        found = compiled(x)
        (gradient,) = torch.autograd.grad(found.square().sum(), block.layer.weight)
        (expected,) = torch.autograd.grad(block(x).square().sum(), block.layer.weight)
        assert torch.allclose(found, block(x), atol=1e-5)
        assert torch.allclose(gradient, expected, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.thinned(3)
@pytest.mark.filterwarnings("ignore:While .*, we found certain side effects")
@pytest.mark.parametrize(
    ("name", "strict"),
    one_in(2, ["linear", "conv2d", "transposed2d", "same", "std", "scaled_std_same"], [True, False]),
)
def test_exported(name, strict):
    block, x, _, _ = masked_layer(name)
    program = torch.export.export(block, (x,), strict=strict)
    assert torch.allclose(program.module()(x), block(x), atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "conv2d", "transposed2d", "std"])
def test_torch_func(name):
    block, x, masks, _ = masked_layer(name)
    parameters = {key: value.detach() for key, value in block.named_parameters()}

    def loss(values, one):
        return torch.func.functional_call(block, values, (one[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    block(x).square().sum().backward()
    assert torch.allclose(each["layer.weight"].sum(0), block.layer.weight.grad, atol=1e-4)
    assert (each["layer.weight"][:, ~masks["layer.weight"]] == 0).all()


@pytest.mark.parametrize("name", ["linear", "conv2d", "scaled_std"])
def test_types_and_devices(name):
    block, x, masks, _ = masked_layer(name)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        twin = copy.deepcopy(block).to(dtype)
        assert twin.layer.weight_mask.dtype == torch.bool
        assert twin(x.to(dtype)).dtype == dtype
        assert nets.raw_zero(twin, masks)
    assert copy.deepcopy(block).half().layer.weight_mask.dtype == torch.bool
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = block(x)
    assert result.dtype == torch.bfloat16
    result.float().sum().backward()
    assert (block.layer.weight.grad[~masks["layer.weight"]] == 0).all()
    ghost = copy.deepcopy(block).to("meta")
    assert ghost(x.to("meta")).is_meta


@pytest.mark.filterwarnings("ignore:set_masks. 1 masks were set:UserWarning")
def test_a_mask_on_a_model_without_values():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 2), nets.LAYERS["std"][0]())
    set_masks(model, {"0.weight": torch.ones(2, 3, dtype=torch.bool)})
    assert model[0].weight_mask.is_meta
    assert model[0](torch.randn(1, 3, device="meta")).shape == (1, 2)


def test_hooks_and_training_flags_stay():
    block, x, masks, _ = masked_layer("linear")
    block, x = nets.layer("linear")
    calls = []
    block.layer.register_forward_hook(lambda *_: calls.append("forward"))
    block.layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    weight = block.layer.weight
    install(block, masks)
    block(x.requires_grad_()).sum().backward()
    assert calls == ["forward", "backward"]
    assert block.layer.weight is weight


def test_lists_of_weights_are_masked_too():
    torch.manual_seed(0)
    lstm = nn.LSTM(4, 5)
    masks = nets.masks_for(lstm)
    install(lstm, masks)
    lstm(torch.randn(3, 2, 4))[0].sum().backward()
    assert nets.pruned_gradients_are_zero(lstm, masks)
    assert lstm.weight_hh_l0.grad.abs().sum() > 0


class Registered(nn.Module):
    """Keeps a list of the classes that users derive from it, and asks them for a name."""

    known: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, name: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Registered.known[name] = cls


class Named(Registered, name="named"):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


@pytest.mark.parametrize("returns", ["graph", "module"])
def test_classes_that_announce_those_derived_from_them_are_masked_all_the_same(returns: Any) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(2, 4), Named()), torch.randn(5, 2)
    pruned = fxprune.apply(model, "magnitude", 0.5, example_inputs=x, returns=returns)
    fxprune.verify(pruned)
    assert Registered.known == {"named": Named}
    masks = fxprune.masks(pruned)
    assert masks.keys() == {"0.weight", "1.weight"}
    expected = nn.functional.linear(x, model[0].weight * masks["0.weight"], model[0].bias)
    assert torch.allclose(pruned(x), expected @ (model[1].weight * masks["1.weight"]).T)
    loaded = copy.deepcopy(pruned)
    assert isinstance(loaded.get_submodule("1"), Named)
    assert torch.equal(loaded(x), pruned(x))
