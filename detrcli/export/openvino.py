"""OpenVINO: the ONNX graph as .xml and .bin, the description inside. The mask is always given; where sizes vary a
single False is "no padding"."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from torch.export import ExportedProgram

from detrcli.errors import ModelError
from detrcli.export import onnx
from detrcli.export.description import KEY, Description


def write(path: Path, program: ExportedProgram, description: Description) -> None:
    """`path` and, beside it, the weights in a file of the same name that ends in .bin."""
    import openvino

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        between = Path(folder) / "between.onnx"
        onnx.write(between, program, description, optional_mask=False)
        try:
            model = openvino.Core().read_model(between)
        except RuntimeError as error:
            raise _cannot_read(error, description) from error
        model.set_rt_info(description.dumps(), KEY)
        try:
            openvino.save_model(model, path, compress_to_fp16=False)
        except RuntimeError as error:  # it has no other name for a full disk
            raise OSError(" ".join(str(error).split())) from error


def _cannot_read(error: Exception, description: Description) -> ModelError:
    """What OpenVINO does not understand: an operator, or what follows one of which it does not know the answer's shape."""
    places = list(dict.fromkeys(re.findall(r"ONNX node '<Node\((\w+)\)", str(error))))
    where = f" at {', '.join(places)}" if places else f": {str(error).strip().splitlines()[-1]}"
    if "DeformConv" in str(error):
        hint = "write it with other operators: --set operators=grid_sample"
    elif "GridSample" in str(error) and description.msda == "gridsample":
        hint = "write it with other operators: --msda gather"
    else:
        hint = "export to onnx or pt2, or replace the operator in the model"
    return ModelError(f"OpenVINO does not understand the model's graph{where}", hint=hint)
