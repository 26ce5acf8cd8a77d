"""The plugin contract: what a paper declares so that every verb of `detr` can work with it.

A plugin is one frozen value, found through the entry-point group `detrcli.models`. This module and every module that declares a
plugin import nothing heavy: listing a zoo must not load torch. Builders import it inside.

    plugin = Plugin(
        api=1,
        paper=Paper(title=…, venue=…, year=…, url=…),
        families=(Family(name="detr", default="r50", variants=(Variant(name="r50", config=DetrConfig(), …), …), …),),
    )

Three kinds of numbers are never mixed: `published` is what the paper says, with its source; `params` is counted, and the
conformance kit recounts it; what somebody evaluated lives with the results, not here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from detrcli.config import in_range

if TYPE_CHECKING:
    from torch import Tensor, nn

    from detrcli.types import Criterion, Detections, Output
    from detrcli.weights.keymap import KeyMap

API = 1  # changes when a field is removed or changes its meaning; new optional fields do not change it
COCO_CLASSES = 91  # the class channels of every model trained on COCO's raw category ids (0..90)

C = TypeVar("C")
Need = Literal["masks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Paper:
    title: str
    venue: str
    year: int
    url: str
    authors: str = ""
    code: str | None = None  # the official code, at a commit


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What a paper or its official repository reports. Never edited to fit; `source` says where it stands."""

    source: str
    epochs: int | None = None
    ap: float | None = None
    ap50: float | None = None
    ap75: float | None = None
    ap_small: float | None = None
    ap_medium: float | None = None
    ap_large: float | None = None
    params_m: float | None = None
    gflops: float | None = None
    gflops_by_part: Mapping[str, float] = field(default_factory=dict)  # by the family's `parts`
    gflops_at: str = "coco100"  # the picture sizes it was counted at, as `detr profile --size` takes them
    gflops_also: tuple[str, ...] = ()  # the operators it counted besides, as `--also` takes them
    gflops_set: Mapping[str, Any] = field(
        default_factory=dict
    )  # the settings it was counted with, if not ours
    difference: str = ""  # why our count is more than 2 % away, be it of parameters, of GFLOPs or of a part's


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A weights file on the Hugging Face Hub. A revision or hash that nobody could look up stays None: then the first
    download is recorded and shown, and later ones are compared with it."""

    repo: str
    filename: str
    license: str
    layout: str  # a name in the family's `key_maps`, or "native"
    revision: str | None = None
    sha256: str | None = None
    trained_on: str = "coco-2017"
    note: str = ""

    def __post_init__(self) -> None:
        if self.revision is not None and not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError(f"{self.repo}: a revision is 40 hexadecimal digits, not {self.revision!r}")
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError(f"{self.repo}: a sha256 is 64 hexadecimal digits, not {self.sha256!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a variant is trained. `lr_factors` multiplies the rate of parameters whose name matches a pattern (first match
    wins); the backbone is one of them."""

    epochs: int
    batch_size: int  # over all ranks; kept by accumulating gradients where memory is short
    lr: float = 1e-4
    weight_decay: float = 1e-4
    lr_factors: Mapping[str, float] = field(default_factory=dict)
    schedule: Literal["step", "cosine"] = "step"
    lr_drop: int | tuple[int, ...] | None = None  # epoch or epochs of the tenfold drops (step schedule)
    warmup_steps: int = 0
    clip_norm: float = 0.1
    augment: Literal["detr", "flip", "none"] = "detr"
    source: str = "ours"

    def __post_init__(self) -> None:
        if self.schedule == "step" and self.lr_drop is None:
            raise ValueError("a step schedule needs lr_drop, the epoch of the drop")
        for name in ("epochs", "batch_size"):
            in_range(name, getattr(self, name), 1)
        for name in ("lr", "weight_decay", "warmup_steps"):
            in_range(name, getattr(self, name), 0)
        for pattern, factor in self.lr_factors.items():
            in_range(f"lr_factors.{pattern}", factor, 0)
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"lr_factors: {pattern!r} is no regular expression: {error}") from error
        for epoch in self.drops:
            in_range("lr_drop", epoch, 1)
        if not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be above 0 (value given: {self.clip_norm}; inf does not clip)")

    @property
    def drops(self) -> tuple[int, ...]:
        """The epochs after which a step schedule divides the rate by ten."""
        if self.lr_drop is None:
            return ()
        return (self.lr_drop,) if isinstance(self.lr_drop, int) else self.lr_drop


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocess:
    """How pictures become tensors; travels in the weights' metadata."""

    short_side: int = 800
    long_side: int = 1333
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant(Generic[C]):
    """One row of a paper's table: a configuration with its recipes and its numbers."""

    name: str
    config: C
    recipes: tuple[Recipe, ...]  # the default first
    params: int  # counted at `num_classes`; the conformance kit recounts it
    num_classes: int = COCO_CLASSES
    preprocess: Preprocess = Preprocess()
    published: Published | None = None
    weights: tuple[Weights, ...] = ()
    summary: str = ""


Part = Literal["backbone", "projection", "encoder", "decoder", "heads"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family(Generic[C]):
    """Models that share one configuration type and one set of builders, under the name the user types."""

    name: str
    summary: str
    variants: tuple[Variant[C], ...]  # the default first
    build_model: Callable[[C, int], nn.Module]  # (config, num_classes) -> untrained Detector
    build_criterion: Callable[[C, int], Criterion]
    postprocess: Callable[[C, Output, Tensor], list[Detections]]  # sizes (B, 2) height, width
    parts: Mapping[Part, Sequence[str]]  # module paths of the model by their role
    key_maps: Mapping[str, Callable[[C], KeyMap]] = field(
        default_factory=dict
    )  # foreign layout -> map to our names
    donors: Mapping[str, str] = field(
        default_factory=dict
    )  # family whose weights may start a training -> pattern of the tensors that only one of the two has
    question: str = ""  # what no tensor tells: asked when a file that does not say meets the bare family
    needs: Callable[[C], frozenset[Need]] = lambda config: frozenset()  # targets beyond boxes and labels
    takes_targets: bool = (
        False  # while training, forward(images, mask, targets): denoising queries are made of them
    )
    eval_batch_size: Callable[[C], int | None] = lambda config: None  # a size the model insists on (DC5: 1)
    masked_after: str = (
        ""  # the module behind whose answer, maps or tokens with their padding, nothing reads what is padded
    )
    reads_padding: str = ""  # or the reason why something does
    cannot_export: str = (
        ""  # the reason why no graph can hold the model; the conformance kit exports it otherwise
    )

    @property
    def default(self) -> Variant[C]:
        return self.variants[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugin:
    api: int
    paper: Paper
    families: tuple[Family[Any], ...]
