"""The operators against float64 numbers of the official Deformable DETR and Lite DETR code, values and gradients."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from detrcli import ops

GOLDENS = Path(__file__).parent.parent / "goldens" / "ops"
KDA_SHAPES = {
    "core_a": [(6, 5), (3, 4)],
    "core_b": [(4, 6), (2, 3), (1, 2), (1, 1)],
    "core_edge": [(5, 7), (3, 3), (1, 1)],
    "core_key_is_value": [(6, 5), (3, 4)],
}


def case(file: str, name: str, place: str) -> dict[str, Tensor]:
    tensors = load_file(GOLDENS / f"{file}.safetensors", device=place)
    return {
        key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")
    }


def close(actual: Tensor | None, expected: Tensor) -> None:
    assert actual is not None
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def away_from_kinks(locations: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
    """(B, Q, M, L, P): where the gradient by location is two-sided, x and y not on a pixel centre."""
    sizes = locations.new_tensor([(w, h) for h, w in shapes]).view(len(shapes), 1, 2)
    pixel = locations * sizes - 0.5
    return ((pixel - pixel.round()).abs() > 1e-9).all(-1)


@pytest.mark.parametrize("name", ["b_odd_p3", "c_1lvl_p4", "d_edges", "e_self"])
def test_msda_gives_the_official_numbers(name: str, form: ops.Mode, place: str) -> None:
    g = case("msda", name, place)
    shapes = [(int(h), int(w)) for h, w in g["spatial_shapes"]]
    value, locations, weights = (g[n].requires_grad_() for n in ("value", "locations", "weights"))
    out = ops.msda(value, shapes, locations, weights, form=form)
    close(out, g["output"])
    out.backward(g["grad_output"])
    close(value.grad, g["grad_value"])
    close(weights.grad, g["grad_weights"])
    assert locations.grad is not None
    smooth = away_from_kinks(locations.detach(), shapes)
    close(locations.grad[smooth], g["grad_locations"][smooth])


@pytest.mark.parametrize("name", list(KDA_SHAPES))
def test_kda_gives_the_official_numbers(name: str, form: ops.Mode, place: str) -> None:
    g = case("kda", name, place)
    shapes = KDA_SHAPES[name]
    value, locations = g["value"].requires_grad_(), g["sampling_locations"]
    key = value if name == "core_key_is_value" else g["key"].requires_grad_()
    heads, depth = value.shape[2:]
    query = g["query"].unflatten(-1, (heads, depth)).requires_grad_()
    # a reference of zero and offsets in pixels are the official code's free locations
    sizes = locations.new_tensor([(w, h) for h, w in shapes]).view(len(shapes), 1, 2)
    offsets = (locations * sizes).requires_grad_()
    reference = locations.new_zeros(*locations.shape[:2], len(shapes), 2)
    out = ops.kda(query, key, value, shapes, reference, offsets, form=form)
    close(out, g["output"])
    out.backward(g["grad_output"])
    assert query.grad is not None
    assert offsets.grad is not None
    close(query.grad.flatten(2), g["grad_query"])
    close(value.grad, g["grad_value"])
    if key is not value:
        close(key.grad, g["grad_key"])
    smooth = away_from_kinks(locations, shapes)
    close((offsets.grad * sizes)[smooth], g["grad_sampling_locations"][smooth])
