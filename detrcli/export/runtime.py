"""An exported file as a model that predicts and is evaluated like any other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrcli.config import from_plain
from detrcli.errors import CheckpointError, DetrError, UsageError
from detrcli.export import metadata, program, vetting
from detrcli.export.description import KEY, SUFFIXES, Description, Format, parse
from detrcli.export.plan import RUNS, check_software
from detrcli.export.shortcuts import samples_have_shapes
from detrcli.nn.inference import choose_device
from detrcli.nn.speed import threads
from detrcli.plugins import resolve
from detrcli.predict.run import Predictor
from detrcli.types import Detections, Output

Session = Callable[[Tensor, Tensor], dict[str, Tensor]]  # images, mask -> answers by name


def load(path: Path, device: str | None = None) -> Predictor:
    """A predictor that runs the file. Its plugin must be installed: it knows what the answers mean."""
    session, description, place = open_file(path, device)
    model = resolve(description.model)
    config = from_plain(type(model.config), description.config)
    after = in_pixels if description.postprocessed else partial(model.family.postprocess, config)
    return Predictor(
        name=description.model,
        weights=f"the exported file {path}",
        model=ExportedModel(session, description, path),
        categories=description.categories,
        preprocess=description.preprocess,
        postprocess=after,
        device=place,
        only_batch=description.only_batch,
    )


def open_file(path: Path, device: str | None = None) -> tuple[Session, Description, torch.device]:
    """The file's program, what it says about itself, and where it runs."""
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}", hint="check the path")
    format = SUFFIXES[path.suffix.lower()]
    check_software(format, RUNS)
    place = _place(format, device)
    with readable(path):
        session, description = OPENERS[format](path, place)
    return session, description, place


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What goes wrong while a file is opened is one line about the file."""
    try:
        yield
    except DetrError:
        raise
    except Exception as error:  # each runtime has its own
        raise CheckpointError(
            f"{path} cannot be loaded: {_line(error)}", hint="export it again, or copy it again"
        ) from error


LABELS = "labels"  # of detections, among the extras
WAYS_OUT = {  # by what a runtime says where it cannot go on
    r"memory|alloc": "give fewer pictures at a time, or smaller ones",
    r"guard failed|expected input|index k out of range|topk": "give larger pictures: a map needs more than one place, "
    "and all maps together as many as the model has queries",
}


class ExportedModel(nn.Module):
    """images (B, 3, H, W), normalised, and mask (B, H, W) -> Output; whatever the file itself wants.

    Of a file with post-processing, `logits` are scores (B, N, 1), `boxes` corners, and the labels lie among the extras.
    """

    def __init__(self, session: Session, description: Description, path: Path) -> None:
        super().__init__()
        self.session, self.description, self.path = session, description, path

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # there is nothing in it to change, and a runtime cannot be copied

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Output:
        if torch.is_autocast_enabled(images.device.type):
            raise UsageError(
                f"{self.path} computes in {self.description.precision}, as it was exported",
                hint="leave --amp out, or export with --half",
            )
        if mask is None:
            mask = unpadded(images)
        answers = self.answers(*self.as_wanted(images, mask))
        if self.description.postprocessed:
            return Output(answers["scores"][..., None], answers["boxes"], extras={LABELS: answers["labels"]})
        return Output(answers.pop("logits"), answers.pop("boxes"), extras=answers)

    def as_wanted(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Padded to the only size there is; as bytes, if the file normalises itself."""
        if self.description.size is not None:
            images, mask = fitted(images, mask, self.description.size)
        if self.description.values == "uint8":
            mean, std = (
                images.new_tensor(v)[:, None, None]
                for v in (self.description.preprocess.mean, self.description.preprocess.std)
            )
            images = ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        return images, mask

    def answers(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """By name; one picture after the other where the file takes no batches."""
        pairs = [(images, mask)]
        if "batch" not in self.description.dynamic:
            pairs = [(images[i : i + 1], mask[i : i + 1]) for i in range(len(images))]
        try:
            parts = [self.session(*pair) for pair in pairs]
        except Exception as error:  # each runtime has its own
            raise DetrError(
                f"{self.path} cannot run on pictures of {images.shape[2]}x{images.shape[3]}: {_line(error)}",
                hint=self.way_out(error),
            ) from error
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def way_out(self, error: Exception) -> str:
        for kind, hint in WAYS_OUT.items():
            if re.search(kind, f"{type(error).__name__}: {error}", re.IGNORECASE):
                return hint
        return f"see whether {self.description.model} itself can, and export it again"


class Fitted(nn.Module):
    """A model on pictures as a file of one size gets them."""

    def __init__(self, model: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.model, self.size = model, size

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Output:
        output: Output = self.model(*fitted(images, unpadded(images) if mask is None else mask, self.size))
        return output


def unpadded(images: Tensor) -> Tensor:
    return images.new_zeros((images.shape[0], *images.shape[2:]), dtype=torch.bool)


def fitted(images: Tensor, mask: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Pictures as large as the file takes them: padded, and smaller where they must be. Boxes are parts of a picture anyway."""
    share = min(1.0, *(want / have for want, have in zip(size, mask.shape[1:], strict=True)))
    if share < 1:
        new = [
            max(1, min(want, round(have * share))) for want, have in zip(size, mask.shape[1:], strict=True)
        ]
        images = F.interpolate(images, new, mode="bilinear", antialias=True)
        mask = F.interpolate(mask[:, None].float(), new)[:, 0].bool()
    down, right = (want - have for want, have in zip(size, mask.shape[1:], strict=True))
    return F.pad(images, (0, right, 0, down)), F.pad(mask, (0, right, 0, down), value=True)


def in_pixels(output: Output, sizes: Tensor) -> list[Detections]:
    """Detections of a file that has post-processing inside; sizes (B, 2) height, width."""
    scale = sizes.flip(1).repeat(1, 2).to(output.boxes)
    rows = zip(output.logits[..., 0], output.extras[LABELS], output.boxes * scale[:, None], strict=True)
    return [Detections(*row) for row in rows]


def _place(format: Format, device: str | None) -> torch.device:
    asked = device not in (None, "auto")
    place = choose_device(device) if format == "pt2" or asked else torch.device("cpu")
    if place.type == "cpu" or format == "pt2":
        return place
    if format == "onnx":
        import onnxruntime

        if place.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            return place
    raise UsageError(
        f"the installed {format} runtime does not run on {place}",
        hint="--device cpu" + (", or pip install onnxruntime-gpu" if format == "onnx" else ""),
    )


def providers(place: torch.device) -> list[str | tuple[str, dict[str, int]]]:
    """Where ONNX Runtime computes."""
    if place.type == "cpu":
        return ["CPUExecutionProvider"]
    return [("CUDAExecutionProvider", {"device_id": place.index or 0})]


def _open_onnx(path: Path, place: torch.device) -> tuple[Session, Description]:
    import onnxruntime

    with path.open("rb") as file:  # first, as the runtime may lack another's operators
        description = parse(metadata.description_in(file), path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; they are raised as well
    options.intra_op_num_threads = threads()
    session = onnxruntime.InferenceSession(path, options, providers=providers(place))
    names = [value.name for value in session.get_outputs()]

    def run(images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        values = session.run(names, {"images": images.cpu().numpy(), "mask": mask.cpu().numpy()})
        return {name: torch.from_numpy(value).to(place) for name, value in zip(names, values, strict=True)}

    return run, description


def _open_program(path: Path, place: torch.device) -> tuple[Session, Description]:
    from torch.export.passes import move_to_device_pass

    with path.open("rb") as file:
        description = parse(vetting.description_in(file), path)
        with samples_have_shapes():
            loaded = program.read(file, path)
    if place.type != "cpu":
        loaded = move_to_device_pass(loaded, place)
    module = loaded.module()

    def run(images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        answers: dict[str, Tensor] = module(
            images, mask
        )  # behind a function: it refuses .eval(), being in it
        return answers

    return run, description


def _open_openvino(path: Path, place: torch.device) -> tuple[Session, Description]:
    import openvino

    model = openvino.Core().read_model(path)
    description = parse(model.get_rt_info(KEY).astype(str) if model.has_rt_info(KEY) else None, path)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads()}
    names = [value.get_any_name() for value in model.outputs]  # compiling may lose them
    compiled = openvino.compile_model(model, "CPU", settings)

    def run(images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        answers = compiled({"images": images.numpy(), "mask": mask.numpy()}).values()
        return {name: torch.from_numpy(array.copy()) for name, array in zip(names, answers, strict=True)}

    return run, description


OPENERS = {"onnx": _open_onnx, "pt2": _open_program, "openvino": _open_openvino}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
