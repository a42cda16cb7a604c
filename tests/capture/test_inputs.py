"""Arguments: what may be passed, what is read off known models, and what is refused."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision import models

from fxprune.capture import capture, example_inputs_for


def shape_of(model: nn.Module) -> tuple[int, ...]:
    args, kwargs = example_inputs_for(model, None)
    assert not kwargs
    return tuple(args[0].shape)


def test_tensors_tuples_and_dicts() -> None:
    x = torch.ones(2)
    assert example_inputs_for(nn.ReLU(), x) == ((x,), {})
    assert example_inputs_for(nn.ReLU(), (x, x)) == ((x, x), {})
    assert example_inputs_for(nn.ReLU(), {"input": x}) == ((), {"input": x})


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("resnet18", {}, (2, 3, 224, 224)),
        ("resnet18", {"in_chans": 1}, (2, 1, 224, 224)),
        ("vit_tiny_patch16_224", {"img_size": 96}, (2, 3, 96, 96)),
        ("maxvit_pico_rw_256", {}, (2, 3, 256, 256)),
    ],
)
def test_timm_models(name: str, options: dict[str, Any], expected: tuple[int, ...]) -> None:
    with torch.device("meta"):
        assert shape_of(timm.create_model(name, **options)) == expected


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("resnet18", {}, 224),
        ("resnet50", {"num_classes": 10}, 224),
        ("efficientnet_b3", {}, 300),
        ("efficientnet_b1", {"num_classes": 7}, 240),
        ("inception_v3", {}, 299),
        ("swin_v2_t", {}, 256),
    ],
)
def test_torchvision_models(name: str, options: dict[str, Any], size: int) -> None:
    with torch.device("meta"):
        model = models.get_model(name, weights=None, **options)
    assert shape_of(model) == (2, 3, size, size)


@pytest.mark.slow
def test_ambiguous_and_unknown_models_are_refused() -> None:
    with torch.device("meta"):
        odd = models.EfficientNet(
            models.efficientnet._efficientnet_conf("efficientnet_b0", width_mult=0.5, depth_mult=1)[0], 0.1
        )
    for model in (odd, nn.Linear(3, 3), models.video.r3d_18()):
        with pytest.raises(ValueError, match=r"example_inputs: the input size of \w+ is not known; pass"):
            capture(model)


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="example_inputs: expected a tensor, a tuple or a dict, got list"):
        capture(nn.ReLU(), [torch.ones(2)])
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got a str"):
        capture("resnet18")
    with pytest.raises(ValueError, match="capture the module in it"):
        capture(nn.DataParallel(nn.ReLU()), torch.ones(2))
    with pytest.raises(ValueError, match="has no shape yet"):
        capture(nn.LazyLinear(3), torch.ones(2))


def test_inputs_that_do_not_fit_are_refused_with_the_models_own_error() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(
        ValueError, match=r"example_inputs: Sequential does not accept .*\[2, 5\].*module '1'"
    ) as e:
        capture(model, torch.empty(2, 5))
    assert isinstance(e.value.__cause__, RuntimeError)
    with pytest.raises(ValueError, match="example_inputs: Sequential does not accept"):
        capture(model, {"wrong": torch.empty(2, 4)})


class Options(nn.Module):
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *more: Tensor,
        scale: float = 2.0,
        flag: bool = False,
        **rest: Any,
    ) -> dict[str, Tensor]:
        y = x * scale if mask is None else x * mask
        for other in (*more, *rest.values()):
            y = y + other
        return {"out": -y if flag else y}


def test_defaults_stay_python_values() -> None:
    gm = capture(Options(), torch.empty(2))
    assert gm(torch.ones(3))["out"].tolist() == [2, 2, 2]
    assert gm(x=torch.ones(1), mask=None, scale=2.0)["out"].tolist() == [2]
    with pytest.raises(AssertionError, match=r"scale: Options was captured with 2\.0, .*; capture it again"):
        gm(torch.ones(1), scale=3.0)
    with pytest.raises(AssertionError, match="mask: Options was captured with None"):
        gm(torch.ones(1), mask=torch.ones(1))


def test_keywords_varargs_and_constants() -> None:
    x = torch.ones(2)
    gm = capture(Options(), {"x": x, "mask": x, "scale": 5.0, "flag": True, "extra": x})
    assert gm(x=x, mask=x * 3, scale=5.0, flag=True, extra=x)["out"].tolist() == [-4, -4]
    gm = capture(Options(), (x, None, x, x))
    assert gm(x, None, x, x)["out"].tolist() == [4, 4]


class Nested(nn.Module):
    def forward(self, batch: dict[str, Any]) -> Tensor:
        a, b = batch["pair"]
        return batch["x"] * len(batch["pair"]) + a - b


def test_nested_inputs() -> None:
    x = torch.ones(2)
    gm = capture(Nested(), ({"x": x, "pair": (x, x)},))
    assert gm({"x": torch.ones(3), "pair": (torch.ones(3), torch.zeros(3))}).tolist() == [3, 3, 3]


def test_images_of_other_sizes() -> None:
    model = timm.create_model("test_resnet").eval()
    gm = capture(model)
    for size in (96, 130):
        x = torch.randn(1, 3, size, size)
        assert torch.equal(gm(x), model(x))


class BakesSize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        half = int(x.shape[-1] / 2)
        return x[..., :half]


def test_a_size_that_became_constant_is_checked() -> None:
    gm = capture(BakesSize(), torch.empty(2, 3, 8, 8))
    for network in (gm, capture(gm)):
        assert network(torch.ones(5, 3, 8, 8)).shape == (5, 3, 8, 4)
        with pytest.raises(AssertionError, match="x: BakesSize was captured with size 8 in dimension 3"):
            network(torch.ones(5, 3, 8, 6))


class Batch:
    def __init__(self, images: Tensor, sizes: list[int]) -> None:
        self.images, self.sizes = images, sizes


class Gathers(nn.Module):
    def forward(self, images: list[Tensor]) -> Batch:
        return Batch(torch.stack(images), [image.shape[0] for image in images])


class Scatters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gather = Gathers()

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        batch = self.gather(images)
        return [image * size for image, size in zip(batch.images, batch.sizes, strict=True)]


def test_objects_pass_between_modules_and_lists_have_a_length() -> None:
    images = [torch.ones(3), torch.zeros(3)]
    gm = capture(Scatters(), (images,))
    assert [image.tolist() for image in gm(images)] == [[3, 3, 3], [0, 0, 0]]
    with pytest.raises(AssertionError, match="images: Scatters was captured with 2 entries"):
        gm([*images, images[0]])


class Pools(nn.Module):
    def forward(self, batch: Batch) -> Batch:
        mean = batch.images.mean()
        return Batch(batch.images * 2 if mean > 0 else batch.images, batch.sizes)


def test_objects_go_into_and_out_of_leaves() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gather, self.pool = Gathers(), Pools()

        def forward(self, images: list[Tensor]) -> Tensor:
            return self.pool(self.gather(images)).images + 1

    images = [torch.ones(3), torch.zeros(3)]
    with pytest.warns(UserWarning, match=r"pool \(Pools\) kept whole"):
        gm = capture(Net(), (images,))
    assert torch.equal(gm(images), Net()(images))
