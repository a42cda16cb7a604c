"""Examples with the models of other libraries: pruned, trained for a step, saved and loaded in their way."""

from __future__ import annotations

import pytest
from scripts import example

LIBRARIES = {
    "transformers_save": ("transformers", 0.8),
    "diffusers_unet": ("diffusers", 0.8),
    "segmentation_unet": ("segmentation_models_pytorch", 0.8),
    "geometric_nodes": ("torch_geometric", 0.8),
    "ultralytics_yolo": ("ultralytics", 0.5),
}
"""The library that an example needs, and the sparsity that its saved model has."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:capture:UserWarning", "ignore::UserWarning:torch_geometric")
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_pruned_model_is_saved_and_loaded_as_its_library_does(name: str) -> None:
    library, sparsity = LIBRARIES[name]
    pytest.importorskip(library)
    assert example(name).main() == pytest.approx(sparsity, abs=0.005)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:input's size at dim=1")
def test_a_network_for_volumes_becomes_smaller_and_runs_in_windows() -> None:
    pytest.importorskip("monai")
    assert example("monai_volumes").main() > 0.3  # it compares the outputs itself
