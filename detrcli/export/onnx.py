"""ONNX: standard operators only, axes with names, the padding mask an optional input, the description inside.

The exporter's own optimisation stays off: of deformable models it makes a file that no runtime loads. Runtimes optimise
what they load themselves.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.export import ExportedProgram

from detrcli.errors import ModelError
from detrcli.export import attention, functional, layers
from detrcli.export.description import KEY, Description
from detrcli.export.graph import module_of

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch.onnx import ONNXProgram

OPSET = 20  # the first whose GridSample is what torch's is
INPUTS = ("images", "mask")
MASK = ("mask_batch", "mask_height", "mask_width")
AXES = {  # of inputs and outputs, by name
    "images": ("batch", None, "height", "width"),
    "mask": MASK,
}


def write(
    path: Path, program: ExportedProgram, description: Description, *, optional_mask: bool = True
) -> None:
    model = convert(program, description)
    expand_mask(model, description)
    if optional_mask:
        give_default(model, description)
    model.metadata_props.add(key=KEY, value=description.dumps())
    path.write_bytes(model.SerializeToString())


def convert(program: ExportedProgram, description: Description) -> ModelProto:
    """The program as ONNX, stripped of what tells about this machine."""
    names = output_names(program)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own about its future
        quick = None if description.precision == "float16" else exported_quickly(program, names)
        made = exported_anew(program, names) if quick is None else quick
    model: ModelProto = made.model_proto
    strip(model)
    for value in (*model.graph.input, *model.graph.output):
        name_axes(value, description)
    return model


def exported(program: ExportedProgram, names: list[str]) -> ONNXProgram:
    made = torch.onnx.export(
        program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False,
        input_names=INPUTS, output_names=names, custom_translation_table=translations(),
    )  # fmt: skip
    assert made is not None  # it is only where a file was named
    return made


def exported_quickly(program: ExportedProgram, names: list[str]) -> ONNXProgram | None:
    """Without tracing again; None where the exporter may know the parts of what it does not know whole.

    Not for half precision: ONNX Runtime 1.32 crashes on what comes out of some models.
    """
    with suppress(torch.onnx.errors.OnnxExporterError):
        return exported(functional.ready(program), names)
    return None


def exported_anew(program: ExportedProgram, names: list[str]) -> ONNXProgram:
    """By the exporter's own way, which takes operators apart; an error that names the one which it cannot write."""
    try:
        return exported(program, names)
    except torch.onnx.errors.OnnxExporterError as error:
        raise _cannot_convert(error, program) from error


def translations() -> dict[Any, Callable[..., Any]]:
    """Operators that the exporter does not know, or writes for one size only, by what they are in the standard."""
    from onnx import numpy_helper
    from onnxscript import opset20

    op: Any = opset20  # its types do not know what a constant is

    def sort(x: Any, stable: bool = False, dim: int = -1, descending: bool = False) -> Any:
        # TopK puts the lower index first where values are equal: a stable sort
        size = op.Shape(x, start=dim, end=dim + 1 if dim != -1 else None)
        return op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)

    def rsub(x: Any, other: float, alpha: float = 1) -> Any:
        return op.Sub(number(other, x), op.Mul(x, number(alpha, x)) if alpha != 1 else x)

    def nan_to_num(
        x: Any, nan: float | None = None, posinf: float | None = None, neginf: float | None = None
    ) -> Any:
        limits = np.finfo(x.dtype.numpy())
        most, least = limits.max if posinf is None else posinf, limits.min if neginf is None else neginf
        infinite = op.Where(op.Less(x, number(0, x)), number(least, x), number(most, x))
        finite = op.Where(op.IsInf(x), infinite, x)
        return op.Where(op.IsNaN(x), number(nan or 0, x), finite)

    def number(value: Any, like: Any) -> Any:
        return op.Constant(value=numpy_helper.from_array(np.asarray(value, like.dtype.numpy())))

    aten = torch.ops.aten
    forms: dict[Any, Callable[..., Any]] = {
        aten.sort.stable: sort,
        aten._adaptive_avg_pool2d.default: pooling(op),
        aten.rsub.Scalar: rsub,
        aten.nan_to_num.default: nan_to_num,
    }
    return forms | attention.translations(op) | layers.translations(op)


def pooling(op: Any) -> Callable[..., Any]:
    """Adaptive average pooling, as products with matrices of means that follow the size."""

    def pool(x: Any, output_size: Sequence[int]) -> Any:
        down, across = (means(x, axis, parts) for axis, parts in zip((-2, -1), output_size, strict=True))
        return op.MatMul(op.MatMul(down, x), op.Transpose(across, perm=[1, 0]))

    def means(x: Any, axis: int, parts: int) -> Any:
        """(parts, size): each row means over one part of an axis; parts are cut as torch does, and may share a place."""
        size = op.Shape(x, start=axis, end=axis + 1 if axis != -1 else None)
        part, following, count = column(range(parts)), column(range(1, parts + 1)), column([parts])
        first = op.Div(op.Mul(part, size), count)
        after = op.Div(op.Add(op.Mul(following, size), column([parts - 1])), count)
        place = op.Range(op.Constant(value_int=0), op.Squeeze(size), op.Constant(value_int=1))
        inside = op.And(op.GreaterOrEqual(place, first), op.Less(place, after))
        return op.Div(op.CastLike(inside, x), op.CastLike(op.Sub(after, first), x))

    def column(values: Sequence[int]) -> Any:
        return op.Unsqueeze(op.Constant(value_ints=list(values)), op.Constant(value_ints=[1]))

    return pool


def output_names(program: ExportedProgram) -> list[str]:
    """The keys of what the graph answers, in order."""
    spec = program.call_spec.out_spec
    assert spec is not None
    return [str(name) for name in spec.context]


def strip(model: ModelProto) -> None:
    """Without notes on each node (stack traces with paths of this machine) and on each value in between."""
    model.producer_name = "detrcli"
    del model.metadata_props[:], model.graph.value_info[:], model.graph.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""


def name_axes(value: Any, description: Description) -> None:
    """Names that mean something for the axes that vary; sizes of answers are the runtime's business."""
    names = AXES.get(value.name, ("batch",))
    for place, dim in enumerate(value.type.tensor_type.shape.dim):
        if dim.HasField("dim_param"):
            name = names[place] if place < len(names) else None
            dim.dim_param = name or f"{value.name}_{place}"


def mask_shape(description: Description) -> list[int | str]:
    """A number where the pictures have one, a name where they vary."""
    fixed = (None if "batch" in description.dynamic else 1, *(description.size or (None, None)))
    return [name if size is None else size for name, size in zip(MASK, fixed, strict=True)]


def expand_mask(model: ModelProto, description: Description) -> None:
    """Let the mask be of any size that expands to the pictures', a single False being "no padding"; but where they are fixed."""
    from onnx import TensorProto, helper

    shape = mask_shape(description)
    [mask] = [value for value in model.graph.input if value.name == "mask"]
    mask.CopyFrom(helper.make_tensor_value_info("mask", TensorProto.BOOL, shape))
    if all(isinstance(size, int) for size in shape):
        return
    given, used = "mask", "mask_of_pictures"
    for node in model.graph.node:
        node.input[:] = [used if name == given else name for name in node.input]
    sizes = {"batch": (0, 1), "height": (2, 3), "width": (3, 4)}
    nodes = [
        helper.make_node("Shape", ["images"], [f"mask_{n}"], start=a, end=b) for n, (a, b) in sizes.items()
    ]
    nodes.append(helper.make_node("Concat", [f"mask_{n}" for n in sizes], ["mask_shape"], axis=0))
    nodes.append(helper.make_node("Expand", [given, "mask_shape"], [used]))
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])


def give_default(model: ModelProto, description: Description) -> None:
    """No padding. An input that has a value in the file may be left out when the model is run; so the standard says, and ONNX
    Runtime does."""
    from onnx import numpy_helper

    shape = [size if isinstance(size, int) else 1 for size in mask_shape(description)]
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(shape, np.bool_), "mask"))


def _cannot_convert(error: Exception, program: ExportedProgram) -> ModelError:
    """The operator that has no ONNX form, and where in the model it stands."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    text = "\n".join(map(str, chain))
    for name in re.findall(r"OpOverload\(op='\w+\.(\w+)'", text):  # the part that a decomposition keeps
        nodes = [n for n in program.graph.nodes if n.op == "call_function" and name in _name(n.target)]
        if nodes:
            return ModelError(
                f"the operator {_name(nodes[0].target)} of {module_of(nodes[0])} has no ONNX form",
                hint="export to pt2, which holds any operator of torch, or replace the operator in the model",
            )
    return ModelError(f"the model cannot be written as ONNX: {str(chain[-1]).strip().splitlines()[0]}")


def _name(target: Any) -> str:
    """`aten.relu` for `aten.relu.default`, as the exporter's messages say it."""
    schema = getattr(target, "_schema", None)
    return schema.name.replace("::", ".") if schema is not None else str(target)
