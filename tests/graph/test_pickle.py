"""A lowered graph is data: it pickles, copies, and two lowerings of equal networks are equal."""

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from types import FunctionType
from typing import Any

import pytest
import timm
import torch
from nets import NETS, lowered_net
from thinning import one_in

from fxprune import capture, lower
from fxprune.graph import ChannelGraph
from fxprune.paths.count import flow

TIMM = {
    "cait_xxs24_224": 224,
    "coat_tiny": 224,
    "convit_tiny": 224,
    "efficientvit_b0": 32,
    "ghostnet_100": 64,
    "hrnet_w18_small": 64,
    "maxvit_pico_rw_256": 256,
    "mixer_s32_224": 224,
    "mobilevit_s": 64,
    "regnetx_002": 32,
    "res2net50_26w_4s": 32,
    "resnest14d": 32,
    "swin_tiny_patch4_window7_224": 224,
    "test_convnext": 32,
    "test_efficientnet": 32,
    "test_nfnet": 64,
    "test_resnet": 32,
    "test_vit": 160,
    "vgg11_bn": 32,
    "volo_d1_224": 224,
}


def build(name: str) -> ChannelGraph:
    torch.manual_seed(0)
    return lower(capture(*NETS[name]()))


def functions_in(x: Any) -> Iterator[Any]:
    """Functions without a name that can be imported, anywhere in ``x``."""
    if isinstance(x, FunctionType):
        if "<" in x.__qualname__:
            yield x
    elif is_dataclass(x):
        for one in fields(x):
            yield from functions_in(getattr(x, one.name))
    elif isinstance(x, dict):
        yield from functions_in(list(x.values()))
    elif isinstance(x, (list, tuple)):
        for item in x:
            yield from functions_in(item)


def check(make: Callable[[], ChannelGraph]) -> None:
    graph = make()
    assert list(functions_in(graph)) == []
    assert make() == graph
    for twin in (pickle.loads(pickle.dumps(graph)), copy.deepcopy(graph)):
        assert twin == graph
        assert twin.ops == graph.ops
        assert twin.kernels == graph.kernels


@pytest.mark.parametrize("name", one_in(2, NETS))
def test_net(name: str) -> None:
    check(lambda: build(name))


# One network takes up to seven seconds: lowered twice, pickled and copied.
QUICK = ("test_convnext", "test_vit")


@pytest.mark.filterwarnings("ignore:.*kept whole")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in TIMM]
)
def test_timm(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    gm = capture(model, torch.ones(2, 3, TIMM[name], TIMM[name], device="meta"))
    check(lambda: lower(gm))


def test_compiled_traversals_stay_behind() -> None:
    graph = build("flatten")
    masks = {name: torch.ones(kernels.shape) for name, kernels in graph.kernels.items()}
    paths = flow(graph, masks).log_total
    assert graph.programs
    twin = pickle.loads(pickle.dumps(graph))
    assert not twin.programs
    assert flow(twin, masks).log_total == paths


def test_different_networks_are_not_equal() -> None:
    graphs = {name: lowered_net(name) for name in NETS}
    for name in ("flatten", "dense", "max_pool", "reflected"):
        assert [other for other in NETS if graphs[other] == graphs[name]] == [name]
