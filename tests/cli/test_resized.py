"""``fxprune prune hf:FOLDER --compact``: smaller shapes in ``config.json``, where the class can have them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.cli import run
from fxprune.cli.resized import resized

transformers = pytest.importorskip("transformers")
IDS = torch.arange(24).view(2, 12) % 40
SMALL: dict[str, Any] = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=16, **SMALL, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=4, n_positions=16, **SMALL)
    return transformers.GPT2LMHeadModel(config).eval()


def pruned(model: Any, sparsity: float, exclude: list[str], **options: Any) -> Any:
    """Prune in Python as the command does."""
    asked: dict[str, Any] = {"example_inputs": {"input_ids": IDS}, "returns": "module", "progress": False}
    return fxprune.apply(model, "magnitude", sparsity, exclude=exclude, **asked, **options)


def written(folder: Path, model: Any, *words: str) -> tuple[Path, int]:
    model.save_pretrained(folder / "dense")
    out = folder / "out"
    return out, run(
        ["prune", f"hf:{folder / 'dense'}", "-m", "magnitude", "--compact", *words, "--out", str(out)]
    )


CASES: dict[str, tuple[Any, list[str], dict[str, int]]] = {
    "llama": (
        llama, ["*embed*"],
        {"hidden_size": 32, "intermediate_size": 28, "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "llama-width": (
        llama, [],
        {"hidden_size": 24, "intermediate_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3},
    ),
    "bert": (bert, ["*embeddings*", "*attention*"], {"intermediate_size": 20, "num_attention_heads": 4}),
    "gpt2": (gpt2, ["*wte*", "*attn*"], {"n_inner": 36, "n_head": 4, "n_embd": 16}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama-width", "bert", "gpt2"))],
)
def test_a_compact_folder_is_read_and_computes_what_the_masked_model_does(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, exclude, sizes = CASES[case]
    model = make()
    words = [word for pattern in exclude for word in ("--exclude", pattern)]
    options = ["--granularity", "head", "--scope", "uniform", "--round-to", "4", "-s", "0.4", *words]
    out, code = written(tmp_path, model, *options)
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "dense shapes" not in said.out
    config = json.loads((out / "config.json").read_text())
    assert {name: config[name] for name in sizes} == sizes
    again = type(model).from_pretrained(out).eval()
    assert sum(p.numel() for p in again.parameters()) < 0.9 * sum(p.numel() for p in model.parameters())
    masked = pruned(model, 0.4, exclude, granularity="head", scope="uniform", round_to=4)
    assert torch.allclose(again(input_ids=IDS).logits, masked(input_ids=IDS).logits, atol=1e-5)
    assert transformers.AutoModel.from_pretrained(out).config.to_dict() == again.config.to_dict()
    if case != "bert":
        asked: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        tokens = again.generate(IDS, **asked)
        assert torch.equal(tokens, masked.generate(IDS, **asked))


@pytest.mark.slow
def test_tied_heads_stay_tied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama(tie_word_embeddings=True)
    options = ["--granularity", "head", "--scope", "uniform", "--round-to", "4", "-s", "0.4"]
    out, code = written(tmp_path, model, *options)
    assert code == 0, capsys.readouterr().err
    again = transformers.LlamaForCausalLM.from_pretrained(out)
    assert again.config.hidden_size == 24
    assert again.lm_head.weight is again.model.embed_tokens.weight
    masked = pruned(model, 0.4, [], granularity="head", scope="uniform", round_to=4)
    assert torch.allclose(again(input_ids=IDS).logits, masked(input_ids=IDS).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "words", "why"),
    [
        pytest.param(
            llama,
            ["--granularity", "head", "--exclude", "*embed*"],
            "layers end with different sizes: 'model.lay",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            llama,
            ["--granularity", "head", "--scope", "uniform", "--round-to", "5"],
            "is refused (",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            bert,
            ["--granularity", "head", "--scope", "uniform"],
            "of BertForMaskedLM cannot be told how wide it was; keep that width with --exclude "
            '"bert.embeddings.word_embeddings"',
            marks=pytest.mark.slow,
        ),
        (
            bert,
            ["--granularity", "head", "--scope", "uniform", "--exclude", "*embeddings*"],
            'keep its size with --exclude "bert.encoder.layer.*.attention.self.*"',
        ),
    ],
)
def test_the_folder_is_dense_with_zeros_where_the_class_has_no_such_sizes(
    make: Any, words: list[str], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make()
    out, code = written(tmp_path, model, "-s", "0.4", *words)
    said = capsys.readouterr()
    assert code == 0, said.err
    line = next(line for line in said.out.splitlines() if "dense shapes with zeros, for" in line)
    assert why in line
    again = type(model).from_pretrained(out)
    assert {name: p.shape for name, p in again.named_parameters()} == {
        name: p.shape for name, p in model.named_parameters()
    }
    assert any(int((p == 0).sum()) > p.numel() // 4 for p in again.parameters() if p.dim() > 1)


@pytest.mark.slow
def test_what_the_lines_say_makes_the_folder_smaller(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--granularity", "head", "--scope", "uniform", "-s", "0.3"]
    for name in ("bert.embeddings.word_embeddings", "bert.encoder.layer.*.attention.self.*"):
        words += ["--exclude", name]
    out, code = written(tmp_path, bert(), *words)
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "dense shapes with zeros" not in said.out
    assert transformers.BertForMaskedLM.from_pretrained(out).config.intermediate_size < 36


def test_weights_that_leave_every_channel_are_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for granularity in ("weight", "2:4"):
        _, code = written(tmp_path, llama(), "--granularity", granularity)
        assert code == 2
        assert f"--compact: --granularity {granularity} leaves every channel" in capsys.readouterr().err


class Cut(nn.Module):
    """Stands for a compact network: a model's tensors, of which slices along some axes are left."""

    def __init__(self, model: nn.Module, kept: dict[str, tuple[int, Tensor]]) -> None:
        super().__init__()
        self.model, self.kept = model, kept

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = dict(self.model.state_dict())
        for name, tensor in state.items():
            for part, (axis, places) in self.kept.items():
                if part in name and axis < tensor.dim():
                    state[name] = state[name].index_select(axis, places)
        return state


def zeroed(model: nn.Module, kept: dict[str, tuple[int, Tensor]]) -> None:
    """Zeros in place of the slices that are not left."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            for part, (axis, places) in kept.items():
                if part in name and axis < tensor.dim():
                    gone = torch.ones(tensor.shape[axis], dtype=torch.bool).index_fill(0, places, False)
                    tensor.index_fill_(axis, gone.nonzero().flatten(), 0)


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_a_narrower_width_are_scaled_in_every_dtype(dtype: torch.dtype) -> None:
    sizes = {"hidden_size": 40, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(
        num_hidden_layers=2, head_dim=8, max_position_embeddings=32, **sizes, **SMALL
    )
    torch.manual_seed(0)
    model, left = transformers.LlamaForCausalLM(config).eval(), torch.arange(38)
    rows = dict.fromkeys(("norm", "o_proj", "down_proj"), (0, left))
    inputs = ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    zeroed(model, {"embed_tokens": (1, left), "o_proj": (0, left), "down_proj": (0, left)})
    model = model.to(dtype)
    small: Any = Cut(model, {**rows, **dict.fromkeys(inputs, (1, left))})
    before = torch.get_rng_state()
    new = resized(model, model, small, {"input_ids": IDS})
    assert torch.equal(torch.get_rng_state(), before)
    assert new.dtype == dtype
    assert new.config.hidden_size == 38
    assert new.config.rms_norm_eps == pytest.approx(config.rms_norm_eps * 40 / 38)
    scaled = model.model.norm.weight[:38].float() * (40 / 38) ** 0.5
    assert torch.equal(new.model.norm.weight, scaled.to(dtype))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("dtype", DTYPES)
def test_narrower_heads_are_refused_in_every_dtype(dtype: torch.dtype) -> None:
    """Queries are turned by angles that depend on the width of a head."""
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=8, max_position_embeddings=32, **SMALL,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    left = torch.tensor([place for place in range(32) if place % 8 not in (3, 7)])
    kept = {"q_proj": (0, left), "k_proj": (0, left), "v_proj": (0, left), "o_proj": (1, left)}
    zeroed(model, kept)
    small: Any = Cut(model.to(dtype), kept)
    with pytest.raises(
        ValueError, match=r"computes other outputs where 'model\.layers\.0\.self_attn\.q_proj"
    ):
        resized(model, model, small, {"input_ids": IDS})


def test_the_masked_model_keeps_the_modes_of_its_modules() -> None:
    model = llama().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    resized(model, model, Cut(model, {"gate_proj": (0, torch.arange(48))}), {"input_ids": IDS})  # type: ignore[arg-type]
    assert [module.training for module in model.modules()] == modes
