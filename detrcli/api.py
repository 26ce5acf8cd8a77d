"""The verbs from Python, with the words of the command line. Nothing heavy is imported until one is called."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Unpack

if TYPE_CHECKING:
    from detrcli.data.annotations import Dataset
    from detrcli.data.images import Source
    from detrcli.evaluate.coco import Backend
    from detrcli.evaluate.run import EvalResult
    from detrcli.export.description import Axis, Format
    from detrcli.export.run import Exported
    from detrcli.predict.result import Result
    from detrcli.predict.run import Options, Predictor
    from detrcli.train.run import RunResult
    from detrcli.train.watch import Watcher

FIRST = 100  # images on which an exported file's AP is compared
RANDOM = "random"  # in place of weights, for an export that tries what it costs
Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]  # told the total, then the steps


def load(
    model: str | None = None, *, weights: str | os.PathLike[str] | None = None, device: str | None = None
) -> Predictor:
    """A model ready to predict: `FAMILY[/VARIANT]` with the named weights, or with the best there are for it; or an exported
    file, which brings its own."""
    from detrcli.export.description import exported_file
    from detrcli.weights.resolve import choose

    if (file := exported_file(model, weights)) is not None:
        from detrcli.export.runtime import load as load_file

        return load_file(file, device)
    choice = choose(model, None if weights is None else os.fspath(weights))
    from detrcli.predict.load import load as load_choice

    return load_choice(choice, device)


def predict(
    sources: Source | Iterable[Source],
    model: str | None = None,
    *,
    weights: str | os.PathLike[str] | None = None,
    device: str | None = None,
    **options: Unpack[Options],
) -> Iterator[Result]:
    """The objects in each picture, one result at a time; options are those of `Predictor.predict`."""
    return load(model, weights=weights, device=device).predict(sources, **options)


def export(
    model: str | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    weights: str | os.PathLike[str] | None = None,
    format: Format | None = None,
    dynamic: Sequence[Axis] | None = None,
    size: tuple[int, int] | None = None,
    half: bool = False,
    postprocess: bool = False,
    preprocess: bool = False,
    msda: Literal["gridsample", "gather"] = "gridsample",
    settings: Mapping[str, Any] | None = None,
    verify: bool = True,
    data: str | os.PathLike[str] | Dataset | None = None,
    limit: int | None = None,
    tell: Callable[[str], None] | None = None,
) -> Exported:
    """Write a model as a file for other programs (`.file`), proven to answer the same (`.report`); see docs/export.md.

    `weights` may be "random". `format` is onnx, pt2 or openvino, by default what `out` ends in; `size` is (height, width)
    of all pictures, `dynamic` what may vary, by default all that `size` does not fix. `settings` are of the model's
    configuration. With `data` the AP on its first `limit` images (100) is compared too.
    """
    from pathlib import Path

    from detrcli.errors import UsageError
    from detrcli.export.description import SUFFIXES
    from detrcli.export.plan import (
        Request,
        check_model,
        check_place,
        check_software,
        dynamic_for,
        format_of,
        suffix_of,
    )
    from detrcli.plugins import resolve
    from detrcli.weights.resolve import choose

    if model and Path(model).suffix.lower() in SUFFIXES:
        raise UsageError(
            f"{model} is an exported file", hint="export from weights: --weights RUN, or the model's name"
        )
    if data is not None and not verify:
        raise UsageError("--verify-data and --no-verify contradict each other", hint="leave one of them out")
    if limit is not None and data is None:
        raise UsageError("--limit is of the images of --verify-data", hint="add --verify-data DATA")
    out = None if out is None else Path(out)
    request = Request(
        format=format or format_of(out),
        dynamic=dynamic_for(size) if dynamic is None else tuple(dynamic),
        size=size,
        half=half,
        postprocess=postprocess,
        preprocess=preprocess,
        msda=msda,
    )
    check_software(request.format)
    named = None if weights is None else os.fspath(weights)
    if named == RANDOM and not model:
        raise UsageError("random weights are of which model?", hint="add --model FAMILY/VARIANT")
    choice = None if named == RANDOM else choose(model, named)
    wanted = choice.model if choice else resolve(model or "")
    check_model(wanted)
    out = out or Path(wanted.name.replace("/", "-") + suffix_of(request.format))
    check_place(out, request.format)
    tell = tell or (lambda text: None)
    tell(f"{wanted.name}: {choice.why if choice else 'random weights'}")
    from detrcli.export.run import chosen, untrained
    from detrcli.export.run import export as run

    subject = chosen(choice, settings) if choice else untrained(wanted, settings)
    return run(subject, out, request, verify=verify, data=_first(data, limit or FIRST), tell=tell)


def _first(data: str | os.PathLike[str] | Dataset | None, limit: int) -> Dataset | None:
    """At most so many images of a data set, named or at hand."""
    if data is None:
        return None
    from detrcli.evaluate.truth import load_truth

    dataset = load_truth(os.fspath(data)) if isinstance(data, (str, os.PathLike)) else data
    return dataset.select(range(min(limit, len(dataset))))


def train(
    data: str | os.PathLike[str] | None = None,
    model: str | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    allow_change: Sequence[str] = (),
    devices: int = 1,
    auto_batch: bool = False,
    watch: Watcher | None = None,
    **options: Any,
) -> RunResult:
    """Train a model into a new run folder; options are the fields of `detrcli.train.plan.Request`.

    `resume` goes on with a run instead, exactly: what is said again must be as it was, unless `allow_change` names it.
    `watch` is told of each step and evaluation; `result.folder` holds weights, metrics and settings.
    """
    from pathlib import Path

    from detrcli.train.plan import Request
    from detrcli.train.run import train as run

    request = Request(data=None if data is None else os.fspath(data), model=model, **options)
    return run(
        request,
        out=None if out is None else Path(out),
        resume=None if resume is None else os.fspath(resume),
        allow_change=allow_change,
        devices=devices,
        auto_batch=auto_batch,
        watch=watch,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What to evaluate, and how. Survives pickling, so that other processes can do a share of it."""

    data: str | Dataset
    model: str | None
    weights: str | None
    split: str | None
    data_root: str | None
    batch_size: int | None
    workers: int | None
    device: str | None
    amp: bool
    limit: int | None
    scorer: Backend
    progress: Progress | None


def evaluate(
    data: str | os.PathLike[str] | Dataset,
    model: str | None = None,
    *,
    weights: str | os.PathLike[str] | None = None,
    split: str | None = None,
    data_root: str | os.PathLike[str] | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    device: str | None = None,
    devices: int = 1,
    amp: bool = False,
    limit: int | None = None,
    scorer: Literal["auto", "pycocotools", "ultrafast"] = "auto",
    progress: Progress | None = None,
) -> EvalResult:
    """The twelve COCO numbers of a model on a data set (`.metrics`), its classes and its detections.

    `split` is by default the one to validate on, `batch_size` 1, or what the model insists on, `workers`, which read pictures, 0,
    on a GPU up to 8. With `devices` the images
    are shared by so many processes; the numbers are the same. Where torchrun or SLURM has started several processes, each
    calls this and gets the result.
    """
    from detrcli import launch

    _check_numbers(batch_size=(batch_size, 1), workers=(workers, 0), devices=(devices, 1), limit=(limit, 1))
    _check_scorer(scorer)
    request = Evaluation(
        data=os.fspath(data) if isinstance(data, (str, os.PathLike)) else data,
        model=model,
        weights=None if weights is None else os.fspath(weights),
        split=split,
        data_root=None if data_root is None else os.fspath(data_root),
        batch_size=batch_size,
        workers=workers,
        device=device,
        amp=amp,
        limit=limit,
        scorer=scorer,
        progress=progress,
    )
    launch.processes(devices)
    if devices > 1:
        launch.check(devices, device)
        return launch.on_ranks(devices, _evaluate, request)
    with launch.joined():
        return _evaluate(request)


def _check_numbers(**options: tuple[int | None, int]) -> None:
    """Each option with the least that it may be; None leaves the choice to us."""
    from detrcli.errors import UsageError

    for name, (value, least) in options.items():
        if value is not None and value < least:
            raise UsageError(
                f"{name} must be {least} or more (value given: {value})", hint="leave it out for the default"
            )


def _check_scorer(scorer: str) -> None:
    """A name that is none is told before a picture is read."""
    from typing import get_args

    from detrcli.errors import unknown
    from detrcli.evaluate.coco import Backend

    if scorer not in get_args(Backend):
        raise unknown("scorer", scorer, get_args(Backend))


def _evaluate(request: Evaluation) -> EvalResult:
    from contextlib import nullcontext

    from detrcli import distributed
    from detrcli.data.loader import readers
    from detrcli.evaluate.run import evaluate as run
    from detrcli.evaluate.truth import load_truth

    dataset = request.data
    if isinstance(dataset, str):
        dataset = load_truth(dataset, request.split, request.data_root)
    predictor = load(
        request.model, weights=request.weights, device=_device_of_rank(request.device, request.model)
    )
    total = min(request.limit or len(dataset), len(dataset))
    shown = request.progress if distributed.is_main() else None
    with shown(total) if shown else nullcontext() as advance:
        result = run(
            predictor.model,
            dataset,
            preprocess=predictor.preprocess,
            postprocess=predictor.postprocess,
            categories=predictor.categories,
            device=predictor.device,
            batch_size=request.batch_size or predictor.only_batch or 1,
            workers=readers(str(predictor.device)) if request.workers is None else request.workers,
            amp=request.amp,
            limit=request.limit,
            backend=request.scorer,
            advance=advance,
        )
    return replace(result, model=predictor.name, weights=predictor.weights)


def _device_of_rank(device: str | None, model: str | None) -> str | None:
    """Without another wish each of several processes takes a GPU of its own, where there are GPUs and what runs is torch."""
    from detrcli import distributed
    from detrcli.export.description import exported_file

    device = device or os.environ.get("DETR_DEVICE") or None
    file = exported_file(model)
    elsewhere = file is not None and file.suffix.lower() != ".pt2"
    if distributed.world_size() == 1 or (device is None and elsewhere):
        return device
    import torch

    if device in (None, "auto") and torch.cuda.is_available():
        device = "cuda"
    return device and distributed.own_device(device)
