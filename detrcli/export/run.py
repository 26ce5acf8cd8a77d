"""From chosen weights to a file that has proven itself: trace, write, run, compare, and only then give it its name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import platform
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from detrcli import ops
from detrcli.config import assign, to_plain
from detrcli.data.annotations import Dataset
from detrcli.data.coco_classes import classes_for
from detrcli.errors import DetrError, UsageError, VerificationError
from detrcli.evaluate.run import evaluate, match_categories
from detrcli.export import onnx, openvino, program
from detrcli.export import verify as verification
from detrcli.export.description import Description
from detrcli.export.graph import Graph, trace
from detrcli.export.plan import NEEDS, Request, check_place, check_software, failed_report_file, report_file
from detrcli.export.runtime import Fitted, load
from detrcli.export.shortcuts import samples_have_shapes, types_without_running
from detrcli.export.verify import Pair, Report
from detrcli.export.workplace import cannot_write, parts, workplace
from detrcli.files import replacing
from detrcli.nn.speed import fastest
from detrcli.plugins import Model
from detrcli.plugins.contract import Preprocess
from detrcli.predict.run import Predictor
from detrcli.types import Categories
from detrcli.weights.hub import fetch
from detrcli.weights.ledger import sha256_of
from detrcli.weights.metadata import SHARD_INDEX, shard_names
from detrcli.weights.opened import open_weights
from detrcli.weights.resolve import Choice

WRITERS = {"onnx": onnx.write, "pt2": program.write, "openvino": openvino.write}
AP_TOLERANCE = {False: 0.001, True: 0.005}  # of AP in 0..1, for full and for half precision
TRACING = threading.Lock()  # torch traces, and its doors open, for the whole process: exports take turns
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
    sha256: Mapping[str, str] = field(
        default_factory=dict
    )  # by name: of the file, and of the weights beside it

    @property
    def report_file(self) -> Path:
        return report_file(self.file)

    @property
    def size(self) -> int:
        """Bytes, of the file and of the weights beside it."""
        return sum(self.file.with_name(name).stat().st_size for name in self.sha256)

    def to_dict(self) -> dict[str, Any]:
        about: dict[str, Any] = {
            "file": str(self.file),
            "sha256": dict(self.sha256),
            **to_plain(self.description),
        }
        return about | {"verification": strict(self.report.to_dict()) if self.report else None}


def chosen(choice: Choice, changes: Mapping[str, Any] | None = None) -> Subject:
    """The subject with chosen weights; `changes` are settings of the model's configuration that its weights do not depend on."""
    opened = open_weights(choice)
    model, module = opened.model, opened.module
    if changes:
        model = model.configured(assign(model.config, changes))
        module, state = model.build(len(opened.categories)), module.state_dict()
        refuse_misfits(changes, module, state)
        module.load_state_dict(state)
    path = choice.source if isinstance(choice.source, Path) else fetch(choice.source).path
    license = choice.declared.license if choice.declared else ""
    weights = path.name if isinstance(choice.source, Path) else str(choice.source)  # no paths of this machine
    return Subject(
        model, module, opened.categories, opened.preprocess, weights, sha256_of_weights(path), license
    )


def refuse_misfits(changes: Mapping[str, Any], module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """An error where weights would be needed that are not there, or others than are there."""
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    odd = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
    if not odd:
        return
    there, wanted = (sides.get(odd[0]) for sides in (given, own))
    told = f"{odd[0]} is {shape_in_words(there)} in them, and would be {shape_in_words(wanted)}"
    more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
    said = " ".join(f"{key}={value}" for key, value in changes.items())
    raise UsageError(
        f"these weights do not fit a model with {said}: {told}{more}",
        hint="leave that --set out, or try what it costs with --weights random",
    )


def shape_in_words(shape: tuple[int, ...] | None) -> str:
    if shape is None:
        return "absent"
    return "x".join(map(str, shape)) or "one number"


def sha256_of_weights(path: Path) -> str:
    """Of the file; of weights in several files that an index names, of all their bytes, file by file in the order of names."""
    if not path.name.endswith(SHARD_INDEX):
        return sha256_of(path)
    digest = hashlib.sha256()
    for name in shard_names(path):
        with path.with_name(name).open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


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
    """Write `out` and its report `out`.json; a VerificationError, `out`.failed.json and no file, where the answers differ.

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
    with TRACING, samples_have_shapes(), ops.watched() as calls:
        traced = trace(graph, request, subject.preprocess)
    if request.msda == "gather" and not calls:
        tell(f"--msda gather changes nothing: {subject.model.name} has no deformable attention")
    with workplace(out) as folder:
        at = folder / out.name
        tell(f"writing {request.format}")
        with TRACING, samples_have_shapes(), types_without_running():
            write(at, traced, described, out)
        del graph, traced  # their copies of the weights
        tell("running both on the same pictures" if verify else "not verified")
        made = Exported(out, described, verified(at, out, subject, request, data) if verify else None)
        if made.report is not None and not made.report.passed:
            raise refused(made)
        made = replace(made, sha256={file.name: sha256_of(file) for file in parts(folder, out)})
        for file in parts(folder, out):
            with replacing(out.parent / file.name) as temporary:
                file.replace(temporary)
        write_report(made.report_file, made)
        failed_report_file(out).unlink(missing_ok=True)
    return made


def refused(made: Exported) -> VerificationError:
    """The error of a file that does not get its name; its report stands beside that of an older file, which stays."""
    assert made.report is not None
    path = failed_report_file(made.file)
    write_report(path, made)
    return VerificationError(
        f"the exported model {'answers differently' if made.report.cases else 'does not work'}: {made.report.reasons[0]}",
        hint=f"{made.file} was not written; all that was compared is in {path}",
    )


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


def write(path: Path, traced: ExportedProgram, description: Description, out: Path) -> None:
    """In the format that is asked for; what cannot be written is said of `out`."""
    try:
        WRITERS[description.format](path, traced, description)
    except OSError as error:
        raise cannot_write(out, error) from error


def verified(path: Path, out: Path, subject: Subject, request: Request, data: Dataset | None) -> Report:
    """The file at `path`, which will be `out`, against the subject; with data also their AP. A file that does not work fails."""
    report = Report((), verification.tolerances(request.half))
    try:
        pair = pair_of(load(path, "cpu"), subject, request)
        report = verification.verify(pair)
        return with_ap(report, pair, subject, data) if data is not None and report.passed else report
    except DetrError as error:
        if not isinstance(error, VerificationError) and str(path) not in error.message:
            raise
        reason = named(error.message, path, out)
        return replace(report, passed=False, reasons=(reason,))


def named(text: str, path: Path, out: Path) -> str:
    """What is said of the file at `path`, said of `out`; a runtime's message may have been cut within the path."""
    hidden = re.escape(str(path.parent.with_name(f".{out.name}.")))
    return re.sub(rf"{hidden}[^\s:'\",]*", lambda found: str(out), text)


def pair_of(predictor: Predictor, subject: Subject, request: Request) -> Pair:
    return Pair(
        model=fastest(subject.module),
        exported=predictor.model,
        after=partial(subject.model.family.postprocess, subject.model.config),
        exported_after=predictor.postprocess,
        preprocess=predictor.preprocess,
        request=request,
    )


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


def write_report(path: Path, made: Exported) -> None:
    with replacing(path) as temporary:
        document = {"schema_version": 1, **made.to_dict()}
        text = json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1)
        temporary.write_text(text + "\n", encoding="utf-8")


def strict(value: Any) -> Any:
    """Without numbers that JSON does not have: they become words."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    return [strict(item) for item in value] if isinstance(value, (list, tuple)) else value
