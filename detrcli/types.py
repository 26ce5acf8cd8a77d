"""The data flow on one page: what travels between the stages, and in which units.

    file ─data.images→ uint8 picture ─data.transforms→ Sample ─data.loader.collate→ Batch
      ─Detector→ Output ─postprocess→ Detections (original pixels) ─writers→ JSON, pictures
                   └─criterion(Output, Targets)→ Losses

Legend of axes, used in comments and suffixes throughout:
    B batch · Q queries · T objects of one image · K classes · C width of the model · M heads · D width of a head
    L feature levels (in criteria: prediction layers) · P points per head and level · H W height, width · S tokens of all levels

Boxes change units at three places only: normalised cxcywh from the transforms to the criterion, pixel xyxy after
`postprocess`, pixel xywh in COCO JSON. `mask` is True on padding, everywhere. Labels are contiguous (0..K-1) inside; the
data set's own ids and names live in `Categories`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Categories:
    """The classes of a data set in the order of the model's class channels: label i is `ids[i]`, `names[i]`."""

    ids: tuple[int, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.names) or len(set(self.ids)) != len(self.ids):
            raise ValueError("categories need one name per id and no id twice")

    def __len__(self) -> int:
        return len(self.ids)

    def label_of(self, category_id: int) -> int:
        return self.ids.index(category_id)

    def label_named(self, name: str) -> int:
        return self.names.index(name)


@dataclass(frozen=True, slots=True)
class Target:
    """The objects of one image. `boxes` are cxcywh, normalised to the unpadded image."""

    labels: Tensor  # (T,) int64
    boxes: Tensor  # (T, 4)
    extras: dict[str, Tensor] = field(
        default_factory=dict
    )  # what a paper asks for through `needs`, e.g. masks

    def to(self, device: torch.device | str) -> Target:
        return Target(
            self.labels.to(device, non_blocking=True),
            self.boxes.to(device, non_blocking=True),
            {name: value.to(device, non_blocking=True) for name, value in self.extras.items()},
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture, ready for a model."""

    image: Tensor  # (3, H, W) float, normalised
    target: Target
    image_id: int
    original_size: tuple[int, int]  # (height, width) of the picture as a viewer shows it


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures padded at the bottom and on the right to one size."""

    images: Tensor  # (B, 3, H, W)
    mask: Tensor  # (B, H, W) bool, True on padding
    targets: tuple[Target, ...]
    image_ids: tuple[int, ...]
    original_sizes: Tensor  # (B, 2) int64, height and width

    def to(self, device: torch.device | str) -> Batch:
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            mask=self.mask.to(device, non_blocking=True),
            targets=tuple(target.to(device) for target in self.targets),
            original_sizes=self.original_sizes.to(device, non_blocking=True),
        )

    def pin_memory(self) -> Batch:
        """Called by the loader of torch, so that the pictures travel to a GPU beside the computation."""
        return replace(self, images=self.images.pin_memory(), mask=self.mask.pin_memory())


@dataclass(frozen=True, slots=True)
class Output:
    """What a detector answers. `boxes` are cxcywh in [0, 1], relative to the unpadded image."""

    logits: Tensor  # (B, Q, K), for softmax models K + 1 with "no object" last
    boxes: Tensor  # (B, Q, 4)
    aux: tuple[Output, ...] = ()  # earlier decoder layers, first layer first
    proposals: Output | None = None  # what a two-stage encoder proposed, over all tokens
    extras: dict[str, Tensor] = field(default_factory=dict)  # read only by the paper that wrote it


@dataclass(frozen=True, slots=True)
class Losses:
    """`total` is the weighted sum to minimise; `terms` are unweighted and detached, by name."""

    total: Tensor
    terms: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Detections:
    """The objects found in one image, best first; boxes are xyxy in pixels of the original picture."""

    scores: Tensor  # (N,)
    labels: Tensor  # (N,) int64, contiguous
    boxes: Tensor  # (N, 4)

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, threshold: float) -> Detections:
        keep = self.scores >= threshold
        return Detections(self.scores[keep], self.labels[keep], self.boxes[keep])

    def cpu(self) -> Detections:
        return Detections(self.scores.cpu(), self.labels.cpu(), self.boxes.cpu())


class Detector(Protocol):
    """A model, whatever its paper: `model(images, mask)`; no mask means no padding."""

    def __call__(self, images: Tensor, mask: Tensor | None = None) -> Output: ...


class Criterion(Protocol):
    """The training loss of a paper. `num_boxes` is the mean number of objects of one backward pass (over ranks and accumulated
    parts; of a batch without any as if it had one), by which losses are normalised as it is: it may be less than 1. Without it,
    the mean over ranks for this batch, or 1 where that has none."""

    def __call__(
        self, output: Output, targets: Sequence[Target], num_boxes: float | None = None
    ) -> Losses: ...
