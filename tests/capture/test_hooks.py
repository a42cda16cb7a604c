"""Forward hooks are traced as ordinary code; those that only observe run with the graph where it calls a
module."""

import copy
import functools
import pickle
from collections import UserDict, UserList, defaultdict, deque
from collections.abc import Callable
from queue import Queue
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import prune

import fxprune
from capture.faithful import assert_close, tensors
from fxprune.capture import CaptureError, capture, capture_leaf

EXAMPLE = torch.empty(2, 3, 8, 8)


class Net(nn.Module):
    """Returns what hooks have left in ``self.kept``, besides its own result."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 5)
        self.kept: dict[str, Any] = {}

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Any, ...]:
        x = self.body(self.stem(x) * scale)
        features, self.kept = list(self.kept.values()), {}
        return self.head(x.mean((2, 3))), *features

    def keep_output(self, module: nn.Module, args: Any, *rest: Any, name: str = "out") -> None:
        self.kept[name] = rest[-1]

    def keep_input(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        self.kept["in"] = args[0]


# -- hooks that are part of what the model computes


def collect(model: Net) -> None:
    for name in ("stem", "body", "body.1"):
        model.get_submodule(name).register_forward_hook(functools.partial(model.keep_output, name=name))


def collect_inputs(model: Net) -> None:
    model.body[0].register_forward_pre_hook(model.keep_input)


def collect_with_kwargs(model: Net) -> None:
    model.stem.register_forward_hook(model.keep_output, with_kwargs=True)
    model.body.register_forward_pre_hook(model.keep_input, with_kwargs=True)


def replace_outputs(model: Net) -> None:
    model.stem.register_forward_hook(lambda module, args, out: out * args[0].mean())
    model.body.register_forward_hook(lambda module, args, out: out + args[0], always_call=True)
    model.body[0].register_forward_hook(lambda module, args, out: out.mul_(2))


def replace_inputs(model: Net) -> None:
    model.stem.register_forward_pre_hook(lambda module, args: args[0] - 1)
    model.body.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.head.register_forward_pre_hook(lambda m, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True)


def hang_on_the_root(model: Net) -> None:
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2, 3.0))
    model.register_forward_pre_hook(lambda m, args, kwargs: ((args[0],), {"scale": 2.0}), with_kwargs=True)
    model.register_forward_hook(lambda module, args, out: (out[0] * 2, out[0]))


def act_in_training_only(model: Net) -> None:
    model.body.register_forward_hook(lambda module, args, out: out * 2 if module.training else None)


def hang_several_on_one(model: Net) -> None:
    model.stem.register_forward_hook(lambda module, args, out: out + 1)
    model.stem.register_forward_hook(model.keep_output)
    model.stem.register_forward_hook(lambda module, args, out: out * 3, prepend=True)


def compute_weights(model: Net) -> None:
    def normalise(module: nn.Module, args: Any) -> None:
        module.weight = module.direction / module.direction.norm()

    for layer in (model.head, model.stem):
        layer.direction = layer.weight
        del layer._parameters["weight"]
        layer.weight = layer.direction.detach().clone()
        layer.register_forward_pre_hook(normalise)


def constrain_weights(model: Net) -> None:
    @torch.no_grad()
    def constrain(module: nn.Module, args: Any) -> None:
        module.weight.clamp_(-0.05, 0.05)

    model.head.register_forward_pre_hook(constrain)


KINDS = [
    collect, collect_inputs, collect_with_kwargs, replace_outputs, replace_inputs, hang_on_the_root,
    act_in_training_only, hang_several_on_one, compute_weights, constrain_weights,
]  # fmt: skip


def attributes_of(model: nn.Module) -> dict[str, Any]:
    """The attributes of all modules, and copies of their tables."""
    return {
        f"{path}.{name}": dict(value) if isinstance(value, dict) else value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
    }


@pytest.mark.thinned(3)
@pytest.mark.parametrize("after_a_run", [False, True])
@pytest.mark.parametrize("hang", KINDS)
def test_the_graph_does_what_hooks_do(hang: Callable[[Net], None], after_a_run: bool) -> None:
    torch.manual_seed(0)
    model = Net()
    hang(model)
    if after_a_run:
        model.eval()(torch.randn(2, 3, 8, 8))
    before, numbers = attributes_of(model), copy.deepcopy(model.state_dict())
    gm = capture(model, EXAMPLE)
    now = attributes_of(model)
    assert now.keys() == before.keys()
    assert all(now[key] is value or now[key] == value for key, value in before.items())
    assert all(torch.equal(value, numbers[name]) for name, value in model.state_dict().items())
    assert list(gm.state_dict()) == list(numbers)
    assert all(gm.get_parameter(name) is value for name, value in model.named_parameters())
    for batch, training in ((1, False), (3, False), (1, True), (3, True)):
        x, runs = torch.randn(batch, 3, 8, 8), []
        state = copy.deepcopy(model.state_dict())
        for network in (model.train(training), gm.train(training)):
            network.load_state_dict(state)
            network.zero_grad()
            out = network(x)
            sum(tensor.square().sum() for tensor in tensors(out)).backward()
            runs.append((out, [p.grad for p in network.parameters()], list(model.state_dict().values())))
            runs[-1] = copy.deepcopy([tensor.detach() for tensor in tensors(runs[-1])])
        assert_close(runs[1], runs[0], f"batch {batch}, training {training}")


@pytest.mark.thinned(4)
@pytest.mark.filterwarnings("ignore:layer collapse")
@pytest.mark.parametrize("hang", KINDS)
def test_pruned(hang: Callable[[Net], None]) -> None:
    torch.manual_seed(0)
    model, reference, x = Net(), Net().eval(), torch.randn(3, 3, 8, 8)
    hang(model)
    hang(reference)
    pruned = fxprune.apply(model, "magnitude", 0.5, example_inputs=EXAMPLE, progress=False).eval()
    assert sum(int((~mask).sum()) for mask in fxprune.masks(pruned).values()) > 0
    reference.load_state_dict(fxprune.finalize(copy.deepcopy(pruned)).state_dict())
    assert_close(pruned(x), reference(x), "pruned")
    own = fxprune.apply(
        model, "magnitude", 0.5, example_inputs=EXAMPLE, progress=False, returns="module"
    ).eval()
    assert_close(own(x), reference(x), "pruned in its own class")


def test_a_layer_loses_the_traced_hook_and_the_model_keeps_it() -> None:
    model = Net()
    replace_outputs(model)
    gm = capture(model, EXAMPLE)
    assert type(gm.stem) is nn.Conv2d
    assert gm.stem.weight is model.stem.weight
    assert not gm.stem._forward_hooks
    assert len(model.stem._forward_hooks) == 1
    assert gm.head is model.head
    again = capture(gm, EXAMPLE)
    x = torch.randn(3, 3, 8, 8)
    for network in (gm, again, pickle.loads(pickle.dumps(again)), copy.deepcopy(again)):
        assert_close(network.eval()(x), model.eval()(x), "as the model")


def test_a_layer_in_two_places_loses_its_hook_in_both() -> None:
    shared = nn.Linear(3, 3)
    shared.register_forward_hook(lambda module, args, out: out + 1)
    model = nn.Sequential(nn.Sequential(shared, nn.ReLU()), nn.Sequential(nn.Tanh(), shared), shared)
    gm, x = capture(model, torch.empty(2, 3)), torch.randn(4, 3)
    assert torch.equal(gm(x), model(x))
    assert gm.get_submodule("0.0") is gm.get_submodule("1.1") is gm.get_submodule("2")
    assert gm.get_submodule("0.0") is not shared


# -- hooks that only observe


class Log:
    """A hook that keeps what it sees, for its owner to read later."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, module: nn.Module, args: Any, out: Any = None) -> None:
        self.seen.append(out)


def test_observers_run_with_the_graph_where_it_calls_their_module() -> None:
    model, log, root = Net(), Log(), Log()
    model.stem.register_forward_hook(log)
    model.register_forward_hook(lambda module, args, out: root(module, args, out))
    gm = capture(model, EXAMPLE)
    assert not log.seen
    assert not root.seen
    assert gm.stem is model.stem
    x = torch.randn(3, 3, 8, 8)
    out = gm(x)
    assert len(log.seen) == len(root.seen) == 1
    assert root.seen[0] is out
    assert torch.equal(log.seen[0], model.stem(x))


def test_an_observer_that_the_graph_cannot_run_is_named() -> None:
    model, log = Net(), Log()
    model.body.register_forward_hook(log)
    with pytest.warns(UserWarning, match=r"body \(Sequential\): its hook Log changes nothing .* register it"):
        gm = capture(model, EXAMPLE)
    gm(torch.randn(2, 3, 8, 8))
    assert not log.seen


GLOBAL: list[Any] = []


@pytest.mark.parametrize(
    "store",
    [
        [], {}, set(), deque(), defaultdict(list), UserList(), UserDict(), WeakKeyDictionary(), Queue(),
        SimpleNamespace(seen=None), GLOBAL,
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:capture")
def test_nothing_of_a_trace_is_left_in_a_store(store: Any) -> None:
    def keep(module: nn.Module, args: Any, out: Any) -> None:
        for method in ("append", "add", "put"):
            if hasattr(store, method):
                getattr(store, method)(out)
        if isinstance(store, SimpleNamespace):
            store.seen = out
        elif hasattr(store, "items"):
            store[module] = out

    def count() -> int:
        return len(store.queue) if isinstance(store, Queue) else len(store)

    model = Net()
    model.stem.register_forward_hook(keep)
    model.body.register_forward_hook(keep)
    capture(model, EXAMPLE)
    assert store.seen is None if isinstance(store, SimpleNamespace) else count() == 0
    model(torch.randn(2, 3, 8, 8))
    assert store.seen is not None if isinstance(store, SimpleNamespace) else count() == 2


def test_a_hook_that_keeps_nothing_gives_no_warning() -> None:
    model = Net()
    for module in model.modules():
        module.register_forward_hook(lambda module, args, out: None)
    assert capture(model, EXAMPLE).code == capture(Net(), EXAMPLE).code


def test_hooks_inside_of_what_stays_whole_run_there() -> None:
    layer, log = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), Log()
    layer.linear1.register_forward_hook(lambda module, args, out: out * 2)
    layer.linear2.register_forward_hook(log)
    model = nn.Sequential(layer).train()
    gm = capture(model, torch.empty(2, 3, 8))
    assert not log.seen
    x, results = torch.randn(2, 3, 8), []
    for network in (model, gm):
        torch.manual_seed(0)
        results.append(network(x))
    assert torch.equal(*results)
    assert len(log.seen) == 2
    opened = capture_leaf(layer, (torch.empty(2, 3, 8),), {})
    assert any(node.args[1:] == (2,) for node in opened.graph.nodes)


# -- hooks that cannot be traced


def looks(module: nn.Module, args: Any, out: Any) -> Tensor | None:
    out = out[0] if isinstance(out, tuple) else out
    return out * 2 if out.sum() > 0 else None


@pytest.mark.parametrize("path", ["stem", "body", "body.2", ""])
def test_a_hook_that_looks_at_numbers_is_refused(path: str) -> None:
    model = Net()
    model.get_submodule(path).register_forward_hook(looks)
    place = f"module '{path}'" if path else "Net"
    match = rf"^{place}: its hook looks cannot be traced: bool.*test_hooks.py:\d+.*handle.remove"
    with pytest.raises(CaptureError, match=match):
        capture(model, EXAMPLE)
    assert not model.kept


def test_a_hook_that_fails_in_training_is_refused() -> None:
    model = Net()
    model.body.register_forward_hook(lambda m, args, out: looks(m, args, out) if m.training else None)
    with pytest.raises(CaptureError, match=r"module 'body': its hook .* cannot be traced"):
        capture(model, EXAMPLE)


def test_a_hook_that_remembers_the_last_call_is_refused() -> None:
    model, last = nn.Sequential(nn.Linear(3, 3)), [torch.zeros(2, 3)]

    def momentum(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        last.append(out + last[-1])
        return last[-1]

    model[0].register_forward_hook(momentum)
    with pytest.raises(CaptureError, match=r"module '0': its hook .*momentum"):
        capture(model, torch.empty(2, 3))
    assert len(last) == 1


def test_hooks_that_change_results_beside_backward_hooks_are_refused() -> None:
    model = Net()
    model.stem.register_full_backward_hook(lambda module, inputs, outputs: None)
    handle = model.stem.register_forward_hook(model.keep_output)
    gm, x = capture(model, EXAMPLE).eval(), torch.randn(3, 3, 8, 8)
    assert_close(gm(x), model.eval()(x), "a collector beside a backward hook")
    handle.remove()
    model.stem.register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(CaptureError, match=r"module 'stem': .* the result of a module with backward hooks"):
        capture(model, EXAMPLE)


def doubled(module: nn.Module, args: Any, out: Any) -> Any:
    return out * 2 if isinstance(out, Tensor) else None


def doubled_in_place(module: nn.Module, args: Any, out: Any) -> None:
    if isinstance(out, Tensor):
        out.mul_(2)


@pytest.mark.parametrize(
    ("register", "hook"),
    [
        (register_module_forward_hook, doubled),
        (register_module_forward_hook, doubled_in_place),
        (register_module_forward_pre_hook, lambda module, args: (args[0] * 2,)),
    ],
)
def test_global_hooks_that_change_values_are_refused(register: Any, hook: Any) -> None:
    handle = register(hook)
    try:
        with pytest.raises(CaptureError, match=r"its global hook .* cannot be traced: it changes what"):
            capture(Net(), EXAMPLE)
    finally:
        handle.remove()


def test_global_hooks_that_observe_are_run() -> None:
    log, model = Log(), Net()
    handle = register_module_forward_hook(log)
    try:
        gm = capture(model, EXAMPLE)
        assert not log.seen
        gm(torch.randn(2, 3, 8, 8))
        assert log.seen
    finally:
        handle.remove()


# -- hooks that a model hangs on itself, and those of PyTorch


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:layer collapse")
@pytest.mark.parametrize("name", ["xception41", "test_resnet"])
def test_features_of_timm(name: str) -> None:
    torch.manual_seed(0)
    options = {} if name == "xception41" else {"feature_cls": "hook"}
    model = timm.create_model(name, features_only=True, **options).eval()
    example, x = torch.empty(2, 3, 64, 64), torch.randn(3, 3, 64, 64)
    gm, wanted = capture(model, example), model(x)
    assert len(gm(x)) == len(wanted) == len(model.feature_info)
    assert_close(gm(x), wanted, name)
    graph = fxprune.lower(gm)
    sink = graph.ops[-1]
    assert len(sink.inputs) == len(wanted)
    assert all(value.live for value in sink.inputs)
    assert not graph.opaque
    pruned = fxprune.apply(model, "magnitude", 0.5, example_inputs=example, progress=False)
    assert len(pruned.eval()(x)) == len(wanted)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_hooks_of_pytorch_stay_with_their_layer() -> None:
    model = Net()
    nn.utils.weight_norm(model.stem)
    nn.utils.spectral_norm(model.head)
    prune.l1_unstructured(model.body[0], "weight", 0.5)
    collect(model)
    gm = capture(model, EXAMPLE)
    assert len(gm.stem._forward_pre_hooks) == len(gm.head._forward_pre_hooks) == 1
    assert not gm.stem._forward_hooks
    with torch.no_grad():
        model.stem.weight_g.mul_(3)
        model.body[0].weight_orig.mul_(2)
    x = torch.randn(3, 3, 8, 8)
    assert_close(gm.eval()(x), model.eval()(x), "weights computed by hooks")
