"""From chosen weights to a file that has proven itself: trace, write, run, compare, and only then give it its name."""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from detrcli.config import assign, to_plain
from detrcli.data.annotations import Dataset
from detrcli.data.coco_classes import classes_for
from detrcli.errors import DetrError, VerificationError
from detrcli.evaluate.run import evaluate, match_categories
from detrcli.export import onnx, openvino, program
from detrcli.export import verify as verification
from detrcli.export.description import Description
from detrcli.export.graph import Graph, trace
from detrcli.export.plan import NEEDS, Request, check_place, check_software
from detrcli.export.runtime import Fitted, load
from detrcli.export.shortcuts import samples_have_shapes, types_without_running
from detrcli.export.verify import Pair, Report
from detrcli.files import replacing
from detrcli.nn.speed import fastest
from detrcli.plugins import Model
from detrcli.plugins.contract import Preprocess
from detrcli.types import Categories
from detrcli.weights.hub import fetch
from detrcli.weights.ledger import sha256_of
from detrcli.weights.opened import open_weights
from detrcli.weights.resolve import Choice

WRITERS = {"onnx": onnx.write, "pt2": program.write, "openvino": openvino.write}
AP_TOLERANCE = {False: 0.001, True: 0.005}  # of AP in 0..1, for full and for half precision
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Subject:
    """What is exported: a network with its weights, and what is known of both."""

    model: Model
    module: nn.Module
    categories: Categories
    preprocess: Preprocess
    weights: str
    sha256: str = ""
    license: str = ""


@dataclass(frozen=True, slots=True)
class Exported:
    """The file, what it says about itself, and how its answers compare; None where nobody asked."""

    file: Path
    description: Description
    report: Report | None

    @property
    def report_file(self) -> Path:
        return report_file(self.file)

    def to_dict(self) -> dict[str, Any]:
        about: dict[str, Any] = {"file": str(self.file), **to_plain(self.description)}
        return about | {"verification": self.report.to_dict() if self.report else None}


def chosen(choice: Choice, changes: Mapping[str, Any] | None = None) -> Subject:
    """The subject with chosen weights; `changes` are settings of the model's configuration that its weights do not depend on."""
    opened = open_weights(choice)
    model, module = opened.model, opened.module
    if changes:
        model = model.configured(assign(model.config, changes))
        module, state = model.build(len(opened.categories)), module.state_dict()
        module.load_state_dict(state)
    path = choice.source if isinstance(choice.source, Path) else fetch(choice.source).path
    license = choice.declared.license if choice.declared else ""
    weights = path.name if isinstance(choice.source, Path) else str(choice.source)  # no paths of this machine
    return Subject(model, module, opened.categories, opened.preprocess, weights, sha256_of(path), license)


def untrained(model: Model, changes: Mapping[str, Any] | None = None) -> Subject:
    """The subject with random weights, always the same ones: to try what an export costs and whether it works.

    What starts as a constant (offsets of zero, heads that answer nothing) is shaken, so that no part of the file is silent.
    """
    model = model.configured(assign(model.config, changes or {}))
    count = model.variant.num_classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = model.build(count)
        shake(module)
    return Subject(model, module, classes_for(count), model.variant.preprocess, "random weights")


@torch.no_grad()
def shake(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(0.02 * torch.randn_like(parameter))


def export(
    subject: Subject,
    out: Path,
    request: Request,
    *,
    verify: bool = True,
    data: Dataset | None = None,
    tell: Tell = lambda text: None,
) -> Exported:
    """Write `out` and its report `out`.json; a VerificationError, and no file, where the answers differ.

    With `data` the AP of the model and of the file are compared too.
    """
    check_software(request.format)
    check_place(out, request.format)
    if data is not None:
        match_categories(subject.categories, data.categories)  # an error before minutes of work
    after = partial(subject.model.family.postprocess, subject.model.config)
    described = describe(subject, request)
    tell("tracing the model")
    graph = Graph(subject.module, request, subject.preprocess, after)
    with samples_have_shapes():
        traced = trace(graph, request, subject.preprocess)
    with workplace(out) as folder:
        at = folder / out.name
        tell(f"writing {request.format}")
        with samples_have_shapes(), types_without_running():
            write(at, traced, described, out)
        del graph, traced  # their copies of the weights
        tell("running both on the same pictures" if verify else "not verified")
        made = Exported(out, described, verified(at, subject, request, data) if verify else None)
        write_report(made)
        if made.report is not None and not made.report.passed:
            raise VerificationError(
                f"the exported model answers differently: {made.report.reasons[0]}",
                hint=f"{out} was not written; all comparisons are in {made.report_file}",
            )
        for file in sorted(folder.iterdir()):  # the weights of an OpenVINO model before the model
            with replacing(out.parent / file.name) as temporary:
                file.replace(temporary)
    return made


def describe(subject: Subject, request: Request) -> Description:
    """What the file will say about itself."""
    model, preprocess = subject.model, subject.preprocess
    if request.size is not None:
        preprocess = replace(preprocess, short_side=min(request.size), long_side=max(request.size))
    return Description(
        model=model.name,
        config=to_plain(model.config),
        categories=subject.categories,
        preprocess=preprocess,
        format=request.format,
        precision="float16" if request.half else "float32",
        msda=request.msda,
        dynamic=request.dynamic,
        size=request.size,
        values="uint8" if request.preprocess else "normalised",
        postprocessed=request.postprocess,
        only_batch=model.family.eval_batch_size(model.config),
        weights=subject.weights,
        weights_sha256=subject.sha256,
        license=subject.license,
        made={"at": datetime.now(UTC).isoformat(timespec="seconds")} | versions(request),
    )


def versions(request: Request) -> dict[str, str]:
    """Of the software that makes and checks the file."""
    found = {"python": platform.python_version()}
    for name in ("detrcli", "torch", *NEEDS[request.format]):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@contextlib.contextmanager
def workplace(out: Path) -> Iterator[Path]:
    """A folder beside `out`, gone afterwards, in which a file is whole before it gets its name."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.")
    except OSError as error:
        raise _cannot_write(out, error) from error
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write(path: Path, traced: ExportedProgram, description: Description, out: Path) -> None:
    """In the format that is asked for; what cannot be written is said of `out`."""
    try:
        WRITERS[description.format](path, traced, description)
    except (OSError, RuntimeError) as error:  # torch and OpenVINO have no other name for a full disk
        raise _cannot_write(out, error) from error


def _cannot_write(out: Path, error: Exception) -> DetrError:
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
    return DetrError(
        f"cannot write {out}: {said}", hint="free some space, or choose a folder you may write to with --out"
    )


def verified(path: Path, subject: Subject, request: Request, data: Dataset | None) -> Report:
    """The file at `path` against the subject; with data also their AP."""
    predictor = load(path, "cpu")
    after = partial(subject.model.family.postprocess, subject.model.config)
    pair = Pair(
        model=fastest(subject.module),
        exported=predictor.model,
        after=after,
        exported_after=predictor.postprocess,
        preprocess=predictor.preprocess,
        request=request,
    )
    report = verification.verify(pair)
    return with_ap(report, pair, subject, data) if data is not None and report.passed else report


def with_ap(report: Report, pair: Pair, subject: Subject, data: Dataset) -> Report:
    """The report, with the AP of both on data; it fails where they differ by more than rounding can explain."""
    batch = subject.model.family.eval_batch_size(subject.model.config) or 1
    eager = Fitted(pair.model, pair.request.size) if pair.request.size else pair.model
    model, file = (
        evaluate(
            module, data, preprocess=pair.preprocess, postprocess=after, categories=subject.categories, batch_size=batch
        ).metrics["ap"]
        for module, after in ((eager, pair.after), (pair.exported, pair.exported_after))
    )  # fmt: skip
    allowed = AP_TOLERANCE[pair.request.half]
    ap = {"model": model, "file": file, "allowed": allowed, "images": len(data)}
    if abs(model - file) <= allowed:
        return replace(report, ap=ap)
    reason = f"AP on {len(data)} images is {model:.4f} for the model and {file:.4f} for the file"
    return replace(report, ap=ap, passed=False, reasons=(reason,))


def report_file(out: Path) -> Path:
    """The report's place, beside the file it is about."""
    return out.with_name(out.name + ".json")


def write_report(made: Exported) -> None:
    with replacing(made.report_file) as temporary:
        text = json.dumps({"schema_version": 1, **made.to_dict()}, ensure_ascii=False, indent=1)
        temporary.write_text(text + "\n", encoding="utf-8")
