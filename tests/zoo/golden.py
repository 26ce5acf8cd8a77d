"""Golden data of reference implementations: weights and pictures drawn from seeds, the expected outputs from files.

A golden is `tests/goldens/<paper>/<name>.json` (how it was made) with `<name>.safetensors` (what came out).
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from detrcli.nn.matcher import HungarianMatcher
from detrcli.types import Losses, Output, Target

FOLDER = Path(__file__).parent.parent / "goldens"


def _seeded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("seeded", FOLDER / "seeded.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


seeded = _seeded()


@dataclass(frozen=True)
class Golden:
    """One reference run."""

    path: Path

    @cached_property
    def spec(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.path.with_suffix(".json").read_text())
        return content

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        content: dict[str, Tensor] = load_file(self.path.with_suffix(".safetensors"))
        return content

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The weights by their official names, each tensor once."""
        drawn = seeded.state_dict(self.spec["manifest"], self.spec["salt"])
        return {name: torch.from_numpy(np.asarray(self._scaled(name, x))) for name, x in drawn.items()}

    def _scaled(self, name: str, value: np.ndarray) -> np.ndarray:
        factor = np.float32(1)
        for pattern, scale in self.spec.get("scales", {}).items():
            if re.search(pattern, name):
                factor = np.float32(factor * np.float32(scale))
        return value * factor if value.dtype == np.float32 else value

    def official_state_dict(self) -> dict[str, Tensor]:
        """As the official code saves it: shared tensors under all their names."""
        aliases: Mapping[str, str] = self.spec.get("aliases") or self.spec.get("alias") or {}
        return self.weights | {name: self.weights[real] for name, real in aliases.items()}

    @cached_property
    def images(self) -> tuple[Tensor, Tensor]:
        """Normalised pictures (B, 3, H, W), padded, and their mask."""
        height, width = self.spec["padded_size"]
        cases = self.spec["images"]
        images = torch.zeros(len(cases), 3, height, width)
        mask = torch.ones(len(cases), height, width, dtype=torch.bool)
        mean, std = torch.tensor(self.spec["mean"]), torch.tensor(self.spec["std"])
        for i, case in enumerate(cases):
            picture = (torch.from_numpy(seeded.image(**case)).float() / 255 - mean) / std
            images[i, :, : case["height"], : case["width"]] = picture.permute(2, 0, 1)
            mask[i, : case["height"], : case["width"]] = False
        return images, mask

    def targets(self, case: str) -> list[Target]:
        return [
            Target(torch.tensor(t["labels"], dtype=torch.int64), torch.tensor(t["boxes"]).reshape(-1, 4))
            for t in self.spec["loss"][case]["targets"]
        ]


def golden(paper: str, name: str) -> Golden:
    return Golden(FOLDER / paper / name)


def probe(x: Tensor, count: int) -> Tensor:
    """Every n-th number of a big tensor: about `count` of them, as the golden files keep them."""
    flat = x.contiguous().flatten()
    return flat[:: max(1, len(flat) // count)][:count]


def check_losses(
    record: Mapping[str, Any], losses: Losses, tolerance: float = 1e-5, absolute: float = 1e-7
) -> None:
    """The weighted total and every unweighted term (official names start with `loss_`), relative."""
    assert losses.total.item() == pytest.approx(record["total"], rel=tolerance)
    found = {f"loss_{name}": value.item() for name, value in losses.terms.items()}
    wanted = {name: value for name, value in record["losses"].items() if name.startswith("loss_")}
    assert found == pytest.approx(wanted, rel=tolerance, abs=absolute)


def check_gradients(
    record: Mapping[str, Any],
    model: nn.Module,
    losses: Losses,
    rename: Callable[[str], str],
    tolerance: float = 1e-3,
) -> None:
    """Norms of the gradients of all trainable parameters, by official name, where they are above 1e-3; and of all together."""
    model.zero_grad()
    losses.total.backward(retain_graph=True)
    norms = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
    wanted = {rename(name): norm for name, norm in record["grad_norms"].items()}
    assert set(norms) == set(wanted)
    together = sum(norm**2 for norm in norms.values()) ** 0.5
    assert together == pytest.approx(record["grad_norm_total"], rel=1e-3)
    plain = {name: norm for name, norm in wanted.items() if norm > 1e-3}
    assert {name: norms[name] for name in plain} == pytest.approx(plain, rel=tolerance)


def aux_boxes(output: Output) -> Tensor:
    return torch.stack([layer.boxes for layer in output.aux])


def check_matches(
    record: Mapping[str, Any], matcher: HungarianMatcher, output: Output, targets: list[Target]
) -> None:
    """Every decoder layer's pairs of query and object."""
    layers = (*output.aux, output)
    logits, boxes = (
        torch.stack([getattr(layer, n) for layer in layers]).detach() for n in ("logits", "boxes")
    )
    matches = matcher(logits, boxes, targets)
    first = [sum(len(t.labels) for t in targets[:i]) for i in range(len(targets))]
    names = [*map(str, range(len(output.aux))), "last"]
    found: dict[tuple[str, int], set[tuple[int, int]]] = {}
    for layer, image, query, target in zip(
        *(p.tolist() for p in (*matches.places, matches.target)), strict=True
    ):
        found.setdefault((names[layer], image), set()).add((query, target - first[image]))
    for name in names:
        for image, (queries, objects) in enumerate(record["indices"][name]):
            assert found.get((name, image), set()) == set(zip(queries, objects, strict=True)), (name, image)


def proposing(model: nn.Module) -> nn.Module:
    """The model as it is, but with the proposals of all tokens in its output, which only training needs."""
    model.get_submodule("queries").train()
    return model
