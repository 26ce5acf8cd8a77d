"""Pictures per second of one process, from JPEG to normalised tensor with DETR's augmentation, beside torchvision v2.

    python benchmarks/data.py [--images 48] [--rounds 5] [--json out.json]

Same files, same random decisions, same output sizes, one thread, measured in turns in one run; seconds of process CPU
time, so that a busy machine does not change the ratios much. `v2 uint8` decodes with torchvision.io and stays on uint8
tensors until the end; `v2 PIL` is the default of torchvision's reference script. The outputs are compared first.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as F

from detrcli.data.annotations import Builder, Dataset
from detrcli.data.formats.files import Files
from detrcli.data.loader import Samples
from detrcli.data.transforms import resized, training
from detrcli.plugins.contract import Preprocess
from detrcli.types import Categories

PREPROCESS = Preprocess()
SCALES, BEFORE_CROP, CROP = list(range(480, 801, 32)), (400, 500, 600), (384, 600)
BATCH = 4


def photo(rng: np.random.Generator, width: int = 640, height: int = 480) -> Image.Image:
    """Something that compresses like a photograph: structure at all scales, a little noise."""
    total = np.zeros((height, width, 3), np.float32)
    for cells in (4, 16, 64, 160):
        coarse = Image.fromarray(rng.integers(0, 256, (cells * 3 // 4, cells, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32) / cells**0.5
    total = (total - total.min()) / (total.max() - total.min()) * 235 + rng.normal(0, 4, total.shape) + 10
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def make_dataset(folder: Path, count: int) -> Dataset:
    builder, rng = Builder(), np.random.default_rng(0)
    for index in range(count):
        photo(rng).save(folder / f"{index}.jpg", quality=90)
        image = builder.image(index, f"{index}.jpg", 480, 640)
        for _ in range(7):
            x, y = rng.uniform(0, 500), rng.uniform(0, 380)
            builder.add(image, len(builder.rows) + 1, 0, (x, y, rng.uniform(20, 140), rng.uniform(20, 100)))
    return Dataset("photos", "train", Categories((1,), ("thing",)), builder.build(), Files(folder))


def augment(image: Any, boxes: Any, rng: np.random.Generator) -> tuple[Any, Any]:
    """DETR's recipe written with torchvision v2, drawing the same numbers in the same order as ours."""
    if rng.random() < 0.5:
        image, boxes = F.horizontal_flip(image), F.horizontal_flip(boxes)
    if rng.random() >= 0.5:
        image, boxes = _resize(image, boxes, BEFORE_CROP[int(rng.integers(3))], None)
        sides = F.get_size(image)
        h, w = (int(rng.integers(min(CROP[0], s), min(CROP[1], s) + 1)) for s in sides)
        top, left = int(rng.integers(sides[0] - h + 1)), int(rng.integers(sides[1] - w + 1))
        image, boxes = F.crop(image, top, left, h, w), F.crop(boxes, top, left, h, w)
    return _resize(image, boxes, SCALES[int(rng.integers(len(SCALES)))], PREPROCESS.long_side)


def _resize(image: Any, boxes: Any, side: int, longest: int | None) -> tuple[Any, Any]:
    height, width = F.get_size(image)
    size = list(resized((height, width), side, longest))
    return F.resize(image, size, antialias=True), F.resize(boxes, size)


def _finish(image: Any, boxes: Any) -> tuple[Tensor, Tensor]:
    pixels = F.to_dtype(image, torch.float32, scale=True)
    pixels = F.normalize(pixels, list(PREPROCESS.mean), list(PREPROCESS.std))
    boxes = F.clamp_bounding_boxes(boxes)
    return pixels, F.convert_bounding_box_format(boxes, new_format=tv_tensors.BoundingBoxFormat.CXCYWH)


def _boxes(dataset: Dataset, index: int) -> tv_tensors.BoundingBoxes:
    found = torch.from_numpy(dataset.annotations.objects(index).boxes.astype(np.float32))
    return F.convert_bounding_box_format(
        tv_tensors.BoundingBoxes(found, format="XYWH", canvas_size=(480, 640)), new_format="XYXY"
    )


def v2_uint8(dataset: Dataset, index: int) -> tuple[Tensor, Tensor]:
    data = torch.frombuffer(bytearray(dataset.file(index).read_bytes()), dtype=torch.uint8)
    image = tv_tensors.Image(decode_jpeg(data, mode=ImageReadMode.RGB))
    return _finish(*augment(image, _boxes(dataset, index), np.random.default_rng([0, 1, 0, index])))


def v2_pil(dataset: Dataset, index: int) -> tuple[Tensor, Tensor]:
    image = Image.open(dataset.file(index)).convert("RGB")
    image, boxes = augment(image, _boxes(dataset, index), np.random.default_rng([0, 1, 0, index]))
    return _finish(F.to_image(image), boxes)


def padded(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The usual collate function: zeros, then copies."""
    height, width = (max(image.shape[axis] for image, _ in samples) for axis in (1, 2))
    images, mask = (
        torch.zeros(len(samples), 3, height, width),
        torch.ones(len(samples), height, width, dtype=torch.bool),
    )
    for place, (image, _) in enumerate(samples):
        images[place, :, : image.shape[1], : image.shape[2]].copy_(image)
        mask[place, : image.shape[1], : image.shape[2]] = False
    return images, mask


def compare(dataset: Dataset, samples: Samples) -> float:
    """The largest difference to torchvision's uint8 path, in grey levels; raises where sizes or boxes differ."""
    worst = 0.0
    for index in range(8):
        ours, (theirs, _) = samples[[(0, index)]].batch, v2_uint8(dataset, index)
        assert ours is not None
        assert ours.images.shape[1:] == theirs.shape, (ours.images.shape, theirs.shape)
        worst = max(worst, float((ours.images[0] - theirs).abs().max()) * 255 * max(PREPROCESS.std))
    return worst


def seconds(work: Callable[[list[int]], Any], batches: list[list[int]]) -> float:
    started = time.process_time()
    for batch in batches:
        work(batch)
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(Path(folder), options.images)
        samples = Samples(dataset, training("detr", PREPROCESS), seed=0)
        ways: dict[str, Callable[[list[int]], Any]] = {
            "detrcli": lambda batch: samples[[(0, index) for index in batch]],
            "v2 uint8": lambda batch: padded([v2_uint8(dataset, index) for index in batch]),
            "v2 PIL": lambda batch: padded([v2_pil(dataset, index) for index in batch]),
        }
        difference = compare(dataset, samples)
        results = measure(ways, options.images, options.rounds)
    report(results, difference, options.json)


def measure(ways: dict[str, Callable[[list[int]], Any]], images: int, rounds: int) -> dict[str, float]:
    """Median pictures per second of each way; the ways take turns."""
    batches = [list(range(start, min(start + BATCH, images))) for start in range(0, images, BATCH)]
    times: dict[str, list[float]] = {name: [] for name in ways}
    for work in ways.values():
        seconds(work, batches[:2])  # warm-up
    for _ in range(rounds):
        for name, work in ways.items():
            times[name].append(seconds(work, batches))
    return {name: images / statistics.median(taken) for name, taken in times.items()}


def report(results: dict[str, float], difference: float, path: Path | None) -> None:
    print(f"largest difference to v2 uint8: {difference:.2f} grey levels")
    for name, speed in results.items():
        print(f"{name:10} {speed:7.1f} images/s   detrcli is {results['detrcli'] / speed:.2f}x")
    if path is not None:
        versions = {
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "python": platform.python_version(),
        }
        document = {"images_per_second": results, "largest_difference": difference, "versions": versions}
        path.write_text(json.dumps({**document, "machine": platform.machine()}, indent=1))


if __name__ == "__main__":
    main()
