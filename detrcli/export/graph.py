"""A model as one graph of plain operators: pictures and padding in, named tensors out.

    images (B, 3, H, W), mask (B, H, W) True on padding  ->  logits (B, Q, K), boxes (B, Q, 4) cxcywh, what else the paper's
                                                             post-processing reads (d2etr: iou, centerness)
    with post-processing                                 ->  scores (B, N), labels (B, N), boxes (B, N, 4) xyxy, best first

Boxes are parts of the picture without its padding. A pt2 holds deformable attention in plain torch, never as our own operator.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config

from detrcli import ops
from detrcli.errors import ModelError
from detrcli.export import layers
from detrcli.export.plan import Request
from detrcli.nn.speed import fold_frozen_norms
from detrcli.ops import whole
from detrcli.plugins.contract import Preprocess
from detrcli.types import Detections, Output

Postprocess = Callable[[Output, Tensor], list[Detections]]

FORMS: dict[str, ops.Mode] = {"gridsample": "reference", "gather": "gather"}
SHARE = 0.64  # of the short side that a model is meant for: size of the pictures that it is traced with


class Graph(nn.Module):
    """What is exported: the model, and what is asked for before and behind it."""

    scale: Tensor  # bytes to what the model takes: scale * x + shift
    shift: Tensor

    def __init__(
        self, model: nn.Module, request: Request, preprocess: Preprocess, after: Postprocess
    ) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).eval()
        fold_frozen_norms(self.model)
        if request.half:
            self.model.half()
        self.half_precision, self.normalises = request.half, request.preprocess
        self.is_program = request.format == "pt2"
        self.after = after if request.postprocess else None
        mean, std = (torch.tensor(values)[:, None, None] for values in (preprocess.mean, preprocess.std))
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        with sizes_left_open() if self.is_program else nullcontext():
            if self.normalises:
                images = (images.float() * self.scale + self.shift).masked_fill(mask[:, None], 0.0)
            output = self.model(images.half() if self.half_precision else images, mask)
            answers = {"logits": output.logits.float(), "boxes": output.boxes.float()}
            answers |= {name: value.float() for name, value in output.extras.items()}
            return answers if self.after is None else detections(self.after, answers)


def sizes_left_open() -> AbstractContextManager[None]:
    """Inside, torch does not ask of a size that varies whether it is one, nor whether a part of a map lies together in memory.

    It would bind a pt2 to what is so at the size it was traced with: a window of Swin that is cut off at an edge, for one. (ONNX holds
    no such conditions, and OpenVINO needs the shapes that they settle.) To be entered inside what is traced: sizes that are
    made inside it may be zero, and a convolution asks whether they are.
    """
    return _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined, no-any-return]


def detections(after: Postprocess, answers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Post-processing for a batch of any size, with boxes as parts of the picture."""
    logits, boxes = answers.pop("logits"), answers.pop("boxes")
    whole = boxes.new_ones(boxes.shape[0], 2)
    [found] = after(Output(logits, boxes, extras=answers), whole)  # see `postprocess.per_picture`
    return {"scores": found.scores, "labels": found.labels, "boxes": found.boxes}


def trace(graph: Graph, request: Request, preprocess: Preprocess) -> ExportedProgram:
    """The graph with the axes variable that are asked for, or an error that says what stands in the way."""
    images, mask = example(request, preprocess)
    batch = Dim.DYNAMIC if "batch" in request.dynamic else Dim.STATIC
    side = Dim.DYNAMIC if request.size is None else Dim.STATIC
    shapes = {"images": {0: batch, 2: side, 3: side}, "mask": {0: batch, 1: side, 2: side}}
    with torch.no_grad(), whole_parts(request), watched(graph) as path:
        try:
            return torch.export.export(graph, (images, mask), dynamic_shapes=shapes, strict=False)
        except Exception as error:  # torch has many kinds for what a model does that no graph can
            raise _cannot_trace(error, path) from error


@contextmanager
def whole_parts(request: Request) -> Iterator[None]:
    """For ONNX what the writer spells out is traced as one operator: layers, and attention unless indexing is asked for."""
    spelled_out = request.format != "pt2"
    as_one = layers.AsOne() if spelled_out else nullcontext()
    sampled = whole.use() if spelled_out and request.msda == "gridsample" else nullcontext()
    with ops.use(FORMS[request.msda]), sampled, as_one:
        yield


def example(request: Request, preprocess: Preprocess) -> tuple[Tensor, Tensor]:
    """Two pictures (or one, where the batch is fixed) of which nothing but the size matters."""
    height, width = request.size or traced_size(preprocess)
    batch = 2 if "batch" in request.dynamic else 1
    kind = torch.uint8 if request.preprocess else torch.float32
    return torch.zeros(batch, 3, height, width, dtype=kind), torch.zeros(
        batch, height, width, dtype=torch.bool
    )


def traced_size(preprocess: Preprocess) -> tuple[int, int]:
    """Large enough for as many tokens as queries; sides differ, so that none is taken for another."""
    height = max(64, round(SHARE * preprocess.short_side / 32) * 32)
    return height, height + 32


@contextmanager
def watched(graph: nn.Module) -> Iterator[list[str]]:
    """The names of the modules that are running, innermost last; left as it is by an error."""
    path: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: path.append(name)

    def leave(*_: Any) -> None:
        path.pop()

    hooks = [
        hook
        for name, module in graph.named_modules()
        for hook in (module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave))
    ]
    try:
        yield path
    finally:
        for hook in hooks:
            hook.remove()


def _cannot_trace(error: Exception, path: list[str]) -> ModelError:
    text = str(error)
    fixed = re.findall(
        r"L\['(\w+)'\]\.size\(\)\[(\d)\] as dynamic but your code specialized it .* \((\d+)\)", text
    )
    if fixed:
        axes = sorted({"batch" if axis == "0" else "size" for _, axis, _ in fixed})
        return ModelError(
            f"this model fixes the {' and the '.join(axes)} that it is exported with: it cannot be dynamic",
            hint=f"leave {' and '.join(axes)} out of --dynamic (none: --dynamic none --size HEIGHTxWIDTH)",
        )
    where = path[-1].removeprefix("model.") if path else "the model"
    return ModelError(
        f"the model cannot be exported: {where} does what no graph can hold: {text.strip().splitlines()[0]}",
        hint="its forward must not branch on the values of tensors",
    )


def module_of(node: torch.fx.Node) -> str:
    """The path of the module in which an operator of the graph stands."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path) for path, _ in stack.values() if path]
    return paths[-1].removeprefix("model.") if paths else "the post-processing"
