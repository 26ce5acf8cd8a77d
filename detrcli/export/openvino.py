"""OpenVINO: the ONNX graph as .xml and .bin, the description inside. The mask is always given; a single False is "no padding"."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch.export import ExportedProgram

from detrcli.export import onnx
from detrcli.export.description import KEY, Description


def write(path: Path, program: ExportedProgram, description: Description) -> None:
    """`path` and, beside it, the weights in a file of the same name that ends in .bin."""
    import openvino

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        between = Path(folder) / "between.onnx"
        onnx.write(between, program, description, optional_mask=False)
        model = openvino.Core().read_model(between)
        model.set_rt_info(description.dumps(), KEY)
        openvino.save_model(model, path, compress_to_fp16=False)
