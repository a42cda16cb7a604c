"""More models of vit_pytorch, torch_geometric, monai and segmentation_models_pytorch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["LIBRARIES"]

Build = Callable[[], tuple[nn.Module, Any]]
EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 1, 3], [1, 2, 3, 4, 5, 0, 0, 1]])
PLAIN = {
    "image_size": 32,
    "patch_size": 8,
    "num_classes": 5,
    "dim": 16,
    "depth": 2,
    "heads": 2,
    "mlp_dim": 32,
}
CUBE = {"image_size": 16, "image_patch_size": 8, "frames": 4, "frame_patch_size": 2, **{
    name: PLAIN[name] for name in ("num_classes", "dim", "depth", "heads", "mlp_dim")
}}  # fmt: skip
SEQUENCE = {"seq_len": 16, "patch_size": 4, **{
    name: PLAIN[name] for name in ("num_classes", "dim", "depth", "heads", "mlp_dim")
}}  # fmt: skip


def _image(side: int = 32, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, side, side)


def _vit(module: str, name: str, inputs: Any = None, **own: Any) -> Build:
    def build() -> tuple[nn.Module, Any]:
        made = getattr(importlib.import_module(f"vit_pytorch.{module}"), name)(**own)
        return made, _image() if inputs is None else inputs

    return build


def _edges(layer: str, *sizes: Any, last: tuple[Any, ...] = (12, 4), **own: Any) -> Build:
    """Two layers of a kind on nodes and edges."""

    def build() -> tuple[nn.Module, Any]:
        conv = importlib.import_module("torch_geometric.nn.conv")

        class Graph(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.one, self.two = getattr(conv, layer)(*sizes, **own), getattr(conv, layer)(*last, **own)

            def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
                return self.two(self.one(x, edges).relu(), edges)

        return Graph(), (torch.randn(6, 8), EDGES)

    return build


def _with_weights(layer: str, inputs: Any, *sizes: Any, **own: Any) -> Build:
    """One layer of a kind between two linear ones, on nodes, edges and what else it takes."""

    def build() -> tuple[nn.Module, Any]:
        conv = importlib.import_module("torch_geometric.nn.conv")

        class Graph(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.layer = nn.Linear(8, 8), getattr(conv, layer)(*sizes, **own)
                self.last = nn.Linear(12, 4)

            def forward(self, x: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
                return self.last(self.layer(self.first(x), *more).relu())

        return Graph(), (torch.randn(6, 8), *inputs)

    return build


def _mlp(inputs: int = 8, outputs: int = 12) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 10), nn.ReLU(), nn.Linear(10, outputs))


def _gin(layer: str) -> Build:
    def build() -> tuple[nn.Module, Any]:
        conv = importlib.import_module("torch_geometric.nn.conv")

        class Graph(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                twice = 2 if layer == "EdgeConv" else 1
                self.one = getattr(conv, layer)(_mlp(8 * twice))
                self.two = getattr(conv, layer)(_mlp(12 * twice, 4))

            def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
                return self.two(self.one(x, edges).relu(), edges)

        return Graph(), (torch.randn(6, 8), EDGES)

    return build


def _net(library: str, name: str, inputs: Any, *args: Any, **own: Any) -> Build:
    return lambda: (getattr(importlib.import_module(library), name)(*args, **own), inputs)


LIBRARIES: dict[str, Build] = {
    **{
        f"vit_pytorch:{module}": _vit(module, name, **{**PLAIN, **own})
        for module, name, own in (
            ("learnable_memory_vit", "ViT", {}),
            ("normalized_vit", "nViT", {}),
            ("parallel_vit", "ViT", {"num_parallel_branches": 2}),
            ("rvt", "RvT", {}),
            ("simple_uvit", "SimpleUViT", {}),
            ("simple_vit_with_fft", "SimpleViT", {"freq_patch_size": 8}),
            ("simple_vit_with_hyper_connections", "SimpleViT", {"num_residual_streams": 2}),
            ("simple_vit_with_patch_dropout", "SimpleViT", {}),
            ("simple_vit_with_qk_norm", "SimpleViT", {}),
            ("simple_vit_with_register_tokens", "SimpleViT", {}),
            ("simple_vit_with_value_residual", "SimpleViT", {}),
            ("simple_vit_orthog_residual_update", "SimpleViT", {}),
            ("simple_vit_with_relative_proj_pos_bias", "SimpleViT", {}),
            ("ats_vit", "ViT", {"max_tokens_per_depth": (8, 4)}),
            ("vit_with_decorr", "ViT", {}),
            ("vit_with_patch_dropout", "ViT", {"patch_dropout": 0.25}),
            ("vit_with_keel_post_ln", "ViT", {}),
        )
    },
    "vit_pytorch:vit_1d": _vit("vit_1d", "ViT", torch.randn(2, 3, 16), **SEQUENCE),
    "vit_pytorch:simple_vit_1d": _vit("simple_vit_1d", "SimpleViT", torch.randn(2, 3, 16), **SEQUENCE),
    "vit_pytorch:vit_3d": _vit("vit_3d", "ViT", torch.randn(2, 3, 4, 16, 16), **CUBE),
    "vit_pytorch:simple_vit_3d": _vit("simple_vit_3d", "SimpleViT", torch.randn(2, 3, 4, 16, 16), **CUBE),
    "vit_pytorch:cct": _vit("cct", "CCT", img_size=32, embedding_dim=16, n_conv_layers=1, num_layers=2,
                            num_heads=2, mlp_ratio=2.0, num_classes=5, positional_embedding="learnable"),
    "vit_pytorch:levit": _vit("levit", "LeViT", _image(64), image_size=64, num_classes=5, stages=2,
                              dim=(16, 32), depth=1, heads=(2, 4), mlp_mult=2),
    **{
        f"torch_geometric:{name}": build
        for name, build in {
            "gin": _gin("GINConv"),
            "edge": _gin("EdgeConv"),
            "super_gat": _edges("SuperGATConv", 8, 12),
            "gen": _edges("GENConv", 8, 12),
            "eg": _edges("EGConv", 8, 12, num_heads=2),
            "ssg": _edges("SSGConv", 8, 12, alpha=0.1),
            "mix_hop": _edges("MixHopConv", 8, 4),
            "mf": _edges("MFConv", 8, 12),
            "hypergraph": _edges("HypergraphConv", 8, 12),
            "anti_symmetric": _edges("AntiSymmetricConv", 8, last=(8,)),
            "gated_graph": _edges("GatedGraphConv", 8, 2, last=(8, 2)),
            "cg": _edges("CGConv", 8, last=(8,)),
            "rgcn": _with_weights("RGCNConv", (EDGES, torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])), 8, 12, 2),
            "rgat": _with_weights("RGATConv", (EDGES, torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])), 8, 12, 2),
            "gmm": _with_weights("GMMConv", (EDGES, torch.rand(8, 2)), 8, 12, dim=2, kernel_size=3),
            "pdn": _with_weights("PDNConv", (EDGES, torch.rand(8, 2)), 8, 12, edge_dim=2, hidden_channels=6),
        }.items()
    },
    **{
        f"segmentation_models_pytorch:{name.lower()}": _net(
            "segmentation_models_pytorch", name, _image(64), "resnet18",
            encoder_weights=None, classes=2, **own
        )
        for name, own in (
            ("PSPNet", {"psp_out_channels": 16}),
            ("DeepLabV3", {"decoder_channels": 16}),
            ("Segformer", {"decoder_segmentation_channels": 16}),
        )
    },
    **{
        f"monai:{name.lower()}": _net("monai.networks.nets", name, inputs, **own)
        for name, inputs, own in (
            ("SegResNetDS", torch.randn(1, 1, 16, 16), {"spatial_dims": 2, "init_filters": 8,
                                                        "blocks_down": (1, 1)}),
            ("ResNetFeatures", torch.randn(1, 1, 16, 16, 16), {"model_name": "resnet10",
                                                               "pretrained": False}),
            ("FlexibleUNet", _image(64), {"in_channels": 3, "out_channels": 2, "backbone": "resnet18",
                                          "decoder_channels": (16, 8, 8, 8, 8), "spatial_dims": 2}),
            ("BasicUNetPlusPlus", _image(32, 1), {"spatial_dims": 2, "features": (8, 8, 8, 8, 8, 8)}),
            ("MedNeXtS", _image(32, 1), {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}),
            ("DenseNet", _image(32, 1), {"spatial_dims": 2, "in_channels": 1, "out_channels": 2,
                                         "init_features": 8, "growth_rate": 4, "block_config": (2, 2)}),
            ("PatchDiscriminator", _image(32, 1), {"spatial_dims": 2, "channels": 8, "in_channels": 1,
                                                   "num_layers_d": 2}),
        )
    },
}  # fmt: skip
"""By name: what builds a small model, and its inputs."""
