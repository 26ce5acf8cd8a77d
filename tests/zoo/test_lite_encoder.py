"""The interleaved encoder and key-aware attention against the official code, in float64, with all gradients."""

from __future__ import annotations

import doctest
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import detrcli_lite_detr.config
from detrcli_deformable_detr.attention import DeformableAttention
from detrcli_deformable_detr.config import DeformableDetrConfig
from detrcli_deformable_detr.levels import Tokens
from detrcli_lite_detr.config import Interleaving, schedule
from detrcli_lite_detr.interleaved_encoder import InterleavedEncoder
from detrcli_lite_detr.kda import KeyAwareAttention

from .golden import golden, seeded

ATTENTION, ENCODER = golden("lite_detr", "kda"), golden("lite_detr", "encoder")
EXACT = {"atol": 1e-11, "rtol": 1e-9}


def fill(module: nn.Module, manifest: dict[str, list[int]], salt: str, unused: list[str]) -> None:
    drawn = {n: x for n, x in seeded.state_dict(manifest, salt).items() if n not in unused}
    weights = {our_name(n): torch.from_numpy(np.asarray(x)).double() for n, x in drawn.items()}
    module.double().load_state_dict(weights)


def our_name(name: str) -> str:
    name = re.sub(r"linear([12])2\.", r"low.ffn.linear\1.", name).replace("norm22.", "low.norm.")
    return re.sub(r"(layers\.\d+)\.(linear[12])\.", r"\1.ffn.\2.", name)


def part(reference: Any, case: str) -> dict[str, Tensor]:
    return {n.removeprefix(f"{case}."): x for n, x in reference.tensors.items() if n.startswith(f"{case}.")}


@pytest.mark.parametrize("case", ATTENTION.spec["cases"])
def test_attention_equals_the_official_code(case: str) -> None:
    spec, t = ATTENTION.spec["cases"][case], part(ATTENTION, case)
    size = (spec["d_model"], spec["heads"], len(spec["shapes"]), spec["points"])
    module: nn.Module = DeformableAttention(*size)
    if spec["key_aware"]:
        module = KeyAwareAttention(*size, own_keys=spec["proj_key"], shared_offsets=spec["same_loc"])
    fill(module, spec["manifest"], f"lite-fn/{case}", spec["unused"])
    inputs = [t[name].requires_grad_() for name in ("query", "reference_points", "input_flatten")]
    output = module(*inputs, [tuple(shape) for shape in spec["shapes"]], t.get("padding_mask"))
    torch.testing.assert_close(output, t["output"], **EXACT)
    output.backward(t["grad_output"])
    for name, x in zip(("query", "reference_points", "input_flatten"), inputs, strict=True):
        torch.testing.assert_close(x.grad, t[f"grad_{name}"], **EXACT)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, t[f"grad_weight.{name}"], **EXACT)


@pytest.mark.parametrize("case", ENCODER.spec["cases"])
def test_encoder_equals_the_official_code(case: str) -> None:
    spec, t = ENCODER.spec["cases"][case], part(ENCODER, case)
    shapes = tuple((h, w) for h, w in spec["shapes"])
    choice = Interleaving(
        high_levels=spec["enc_scale"],
        blocks=spec["num_expansion"],
        key_aware=spec["key_aware"],
        low_ffn=spec["d_model"] if spec["small_expand"] else None,
    )
    module = InterleavedEncoder(choice, host(spec))
    fill(module, spec["manifest"], spec["salt"], spec["unused_parameters"])
    src, position = t["src"].requires_grad_(), t["pos"].requires_grad_()
    whole = torch.tensor([(w, h) for h, w in shapes])
    tokens = Tokens(src, position, t["padding_mask"], shapes, t["valid_ratios"] * whole, t["valid_ratios"])
    memory = module(tokens)
    torch.testing.assert_close(memory[:, ::4], t["memory"], **EXACT)
    memory.backward(t["grad_output"])
    torch.testing.assert_close(sliced_gradient(src), t["grad_src"], **EXACT)
    torch.testing.assert_close(sliced_gradient(position), t["grad_pos"], **EXACT)
    if "grad_norms" not in spec:  # of one block each, not of the whole encoder
        return
    norms = {n: p.grad.norm().item() for n, p in module.named_parameters() if p.grad is not None}
    assert norms == pytest.approx({our_name(n): x for n, x in spec["grad_norms"].items()}, rel=1e-9)


def sliced_gradient(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad[:, ::4]


def host(spec: dict[str, Any]) -> DeformableDetrConfig:
    return DeformableDetrConfig(
        levels=len(spec["shapes"]),
        points=spec["points"],
        width=spec["d_model"],
        heads=spec["heads"],
        ffn=spec["ffn"],
        encoder_layers=spec["num_layers"],
        dropout=0.0,
    )


# --- laws


def test_the_schedules_read_as_the_documentation_says() -> None:
    assert doctest.testmod(detrcli_lite_detr.config).failed == 0


@pytest.mark.parametrize(("layers", "blocks"), [(6, 1), (6, 2), (6, 3), (6, 6), (4, 2)])
def test_both_readings_update_tokens_equally_often(layers: int, blocks: int) -> None:
    for reading in ("released", "paper"):
        kinds = schedule(layers, blocks, reading)
        assert sum(kind in ("high", "full") for kind in kinds) == layers
        assert sum(kind in ("low", "full") for kind in kinds) == blocks
        assert kinds[-1] in ("low", "full")


SIZES = ((6, 7), (3, 4), (2, 2))
LOW = {1: 54, 2: 42}  # tokens of the low levels, by how many levels are high


def encoder(high: int, **choice: Any) -> InterleavedEncoder:
    torch.manual_seed(0)
    small = DeformableDetrConfig(levels=3, width=32, heads=4, ffn=64, points=2, encoder_layers=2, dropout=0.0)
    module = InterleavedEncoder(Interleaving(high_levels=high, blocks=1, low_ffn=16, **choice), small)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.eval()


def tokens() -> Tokens:
    generator = torch.Generator().manual_seed(1)
    count = sum(h * w for h, w in SIZES)
    sizes = torch.tensor([(w, h) for h, w in SIZES]).float().expand(2, -1, -1)
    x, position = torch.randn(2, 2, count, 32, generator=generator)
    return Tokens(x, position, None, SIZES, sizes, torch.ones(2, 3, 2))


@pytest.mark.parametrize("reading", ["released", "paper"])
@pytest.mark.parametrize("high", [1, 2])
@torch.no_grad()
def test_a_layer_changes_only_the_tokens_that_are_its_own(high: int, reading: Any) -> None:
    states: list[Tensor] = [tokens().x]
    module = encoder(high, reading=reading)
    for layer in module.layers:
        layer.register_forward_hook(lambda *args: states.append(args[2]))
    module(tokens())
    low = LOW[high]
    for layer, before, after in zip(module.layers, states[:-1], states[1:], strict=True):
        assert torch.equal(before[:, :low], after[:, :low]) == (layer.kind == "high")
        assert torch.equal(before[:, low:], after[:, low:]) == (layer.kind == "low")


@torch.no_grad()
def test_high_tokens_read_the_low_ones_and_the_readings_differ() -> None:
    start = tokens()
    moved = start._replace(x=start.x.clone())
    moved.x[:, :42] += 1
    module = encoder(2)
    assert not torch.allclose(module(start)[:, 42:], module(moved)[:, 42:])
    assert len(encoder(2, reading="paper").layers) == len(module.layers) + 1


@torch.no_grad()
def test_a_query_outside_every_picture_answers_with_the_mean_of_nothing() -> None:
    """Samples outside are zero keys with a share of their own, so the answer is the bias alone, not NaN."""
    torch.manual_seed(0)
    module = KeyAwareAttention(32, 4, 2, 2)
    memory = torch.randn(1, 20, 32)
    far = torch.full((1, 3, 2, 2), 9.0)
    answer = module(torch.randn(1, 3, 32), far, memory, [(4, 4), (2, 2)], None)
    torch.testing.assert_close(answer, module.output_proj.bias.expand(1, 3, -1))
