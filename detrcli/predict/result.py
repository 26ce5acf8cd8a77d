"""What prediction gives back: one `Result` a picture, or one `Failure`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from detrcli.errors import UsageError

if TYPE_CHECKING:
    import supervision
    from PIL.Image import Image

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Detection:
    """One object: the data set's own class id and name, a score, corners in pixels of the picture as a viewer shows it."""

    category_id: int
    name: str
    score: float
    box: Box  # x1, y1, x2, y2
    label: int = field(repr=False, default=0)  # the model's class channel

    def to_dict(self) -> dict[str, Any]:
        return {
            "category_id": self.category_id,
            "name": self.name,
            "score": round(self.score, 6),
            "box": [round(value, 3) for value in self.box],
        }


@dataclass(frozen=True, slots=True)
class Result:
    """The objects of one picture, best first."""

    source: str
    index: int  # place among the inputs
    width: int
    height: int
    detections: tuple[Detection, ...]
    pixels: Tensor = field(repr=False)  # (3, H, W) uint8
    notes: tuple[str, ...] = ()  # what was peculiar about the input, in words

    def __len__(self) -> int:
        return len(self.detections)

    def to_dict(self) -> dict[str, Any]:
        """The record that JSON and JSONL outputs hold."""
        record: dict[str, Any] = {"source": self.source, "width": self.width, "height": self.height}
        if self.notes:
            record["notes"] = list(self.notes)
        return record | {"detections": [found.to_dict() for found in self.detections]}

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """Rows in COCO results form, boxes as x, y, width, height."""
        rows = []
        for found in self.detections:
            x1, y1, x2, y2 = found.box
            box = [x1, y1, x2 - x1, y2 - y1]
            rows.append(
                {"image_id": image_id, "category_id": found.category_id, "bbox": box, "score": found.score}
            )
        return rows

    def to_supervision(self) -> supervision.Detections:
        """The detections for the `supervision` package, which must be installed; class names stand in `data["class_name"]`."""
        import numpy as np

        try:
            import supervision
        except ImportError as error:
            raise UsageError("supervision is not installed", hint="pip install supervision") from error
        found = self.detections
        return supervision.Detections(
            xyxy=np.array([d.box for d in found], np.float32).reshape(-1, 4),
            confidence=np.array([d.score for d in found], np.float32),
            class_id=np.array([d.category_id for d in found], np.int64),
            data={"class_name": np.array([d.name for d in found], np.str_)},
        )

    def draw(self) -> Image:
        """The picture with boxes and labels."""
        from detrcli.predict.draw import annotate

        return annotate(self.pixels, self.detections)


@dataclass(frozen=True, slots=True)
class Failure:
    """An input that could not be read, and why."""

    source: str
    index: int
    reason: str

    def to_dict(self) -> dict[str, Any]:
        return {"source": self.source, "error": self.reason}
