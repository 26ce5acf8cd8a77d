"""Measures docs/export-support.md: tiny models of every family, exported to every format that is installed, and compared.

    python docs/export_support.py              a quarter of an hour on one core; starts anew
    python docs/export_support.py --more       only what is not measured yet

Weights are random, seeded. A cell holds the differences of logits and of boxes by which the verification of `detr export` judged.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import detrcli
from detrcli.errors import DetrError
from detrcli.export.description import SUFFIXES
from detrcli.export.plan import NEEDS
from detrcli.export.verify import worst

HERE = Path(__file__).parent
PAGE, NUMBERS = HERE / "export-support.md", HERE / "export-support.json"
SOFTWARE = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino")
COLUMNS = {
    "ONNX": (".onnx", {}),
    "pt2": (".pt2", {}),
    "OpenVINO": (".xml", {}),
    "ONNX, gather": (".onnx", {"msda": "gather"}),
    "ONNX, half": (".onnx", {"half": True}),
}
NEEDED = {("dynamic_detr", ".xml"): {"operators": "grid_sample"}}  # OpenVINO has no DeformConv
INTRO = """# Formats and models

<!-- written by docs/export_support.py; changes are lost -->

The largest difference of logits / of boxes between the model and the exported file, in the file's own runtime on a CPU, over the
batches that `detr export` verifies: sizes and batch vary, pictures are padded. Models are the `tiny` variants with random weights.
Columns with *half*, and batches on which the model itself is not steady, count with their median difference instead (see
[export](export.md)). What a cell needs besides is said in it.
"""


def cell(family: str, suffix: str, options: dict[str, object]) -> str:
    missing = [name for name in NEEDS[SUFFIXES[suffix]] if find_spec(name) is None]
    if missing:
        return f"not tried: no {missing[0]}"
    settings = NEEDED.get((family, suffix), {})
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / f"model{suffix}"
        try:
            report = detrcli.export(
                f"{family}/tiny", out, weights="random", settings=settings, **options
            ).report
        except DetrError as error:
            return f"fails: {error.message}"
    assert report is not None
    needs = "".join(f"; `--set {key}={value}`" for key, value in settings.items())
    judged = worst(case.judged for case in report.cases)
    return f"{judged['logits']:.0e} / {judged['boxes']:.0e}{needs}"


def page(cells: dict[str, str], families: list[str]) -> str:
    lines = [INTRO, f"| family | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for family in families:
        row = [cells.get(f"{family} {column}", "not measured") for column in COLUMNS]
        lines.append(f"| `{family}` | {' | '.join(row)} |")
    used = ", ".join(f"{name} {version(name)}" for name in SOFTWARE if find_spec(name))
    return "\n".join([*lines, "", f"Measured with {used}.", ""])


def main(more: bool) -> None:
    cells: dict[str, str] = json.loads(NUMBERS.read_text()) if more and NUMBERS.exists() else {}
    families = [name.removesuffix("/tiny") for name in detrcli.list_models("*/tiny")]
    for column, (suffix, options) in COLUMNS.items():
        for family in families:
            key = f"{family} {column}"
            if key not in cells:
                cells[key] = cell(family, suffix, options)
                sys.stderr.write(f"{key}: {cells[key]}\n")
                NUMBERS.write_text(json.dumps(cells, indent=1) + "\n")
                PAGE.write_text(page(cells, families))


if __name__ == "__main__":
    main("--more" in sys.argv)
