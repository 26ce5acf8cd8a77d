"""COCO numbers at the size of COCO val: our scorer against pycocotools, in processes of their own, on the same data.

    python benchmarks/eval.py [--images 5000]        needs: pip install 'detrcli[eval]'

Prints CPU seconds, peak memory and the twelve numbers of each way, and the ratios:

    pycocotools   its own classes, from two JSON files
    file          `detr eval --detections`: the same detections file, the fast scorer
    arrays        what evaluating a model does: the same, detections never leave the arrays
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CLASSES = tuple(int(i) for i in np.setdiff1d(np.arange(1, 91), [12, 26, 29, 30, 45, 66, 68, 69, 71, 83]))
DETECTIONS = 100  # an image
WAYS = ("pycocotools", "file", "arrays")


def make(folder: Path, images: int) -> None:
    """About seven objects an image, and a hundred detections: some right, some shifted, some elsewhere, some of another class."""
    rng = np.random.default_rng(0)
    annotations, detections = [], []
    for image in range(1, images + 1):
        count = int(rng.poisson(7.36))
        size = np.exp(rng.normal(4, 1, (max(count, 1), 2))).clip(4, 400)
        boxes = np.concatenate(
            [rng.uniform(0, 640 - size[:, :1]), rng.uniform(0, 640 - size[:, 1:]), size], 1
        ).clip(0)
        labels = rng.choice(CLASSES, max(count, 1))
        for box, label in zip(boxes[:count].round(2).tolist(), labels[:count].tolist(), strict=True):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": label, "bbox": box,
                 "area": box[2] * box[3] * 0.6, "iscrowd": int(rng.random() < 0.012)}
            )  # fmt: skip
        pick = rng.integers(0, len(boxes), DETECTIONS)
        found = boxes[pick] + rng.normal(0, 0.08, (DETECTIONS, 4)) * boxes[pick][:, [2, 3, 2, 3]]
        found[:, 2:] = np.abs(found[:, 2:])
        names = np.where(rng.random(DETECTIONS) < 0.7, labels[pick], rng.choice(CLASSES, DETECTIONS))
        rows = zip(names.tolist(), found.tolist(), rng.random(DETECTIONS).tolist(), strict=True)
        detections += [{"image_id": image, "category_id": n, "bbox": b, "score": s} for n, b, s in rows]
    document = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 640} for i in range(1, images + 1)
        ],
        "categories": [{"id": i, "name": f"class {i}"} for i in CLASSES],
        "annotations": annotations,
    }
    (folder / "truth.json").write_text(json.dumps(document))
    (folder / "detections.json").write_text(json.dumps(detections))


def by_pycocotools(folder: Path) -> tuple[float, list[float]]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    started = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "truth.json"))
        evaluator = COCOeval(truth, truth.loadRes(str(folder / "detections.json")), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return time.process_time() - started, evaluator.stats.tolist()


def by_us(folder: Path, way: str) -> tuple[float, list[float]]:
    from detrcli.evaluate.coco import score
    from detrcli.evaluate.tables import DetectionTable, TruthTable

    truth = TruthTable(**np.load(folder / "truth.npz"), names=tuple(f"class {i}" for i in CLASSES))
    table = DetectionTable(**np.load(folder / "detections.npz")) if way == "arrays" else None
    started = time.process_time()
    if table is None:
        table = DetectionTable.read(folder / "detections.json")
    metrics = score(truth, table, backend="ultrafast").metrics
    return time.process_time() - started, list(metrics.values())


def to_arrays(folder: Path) -> None:
    from detrcli.evaluate.tables import DetectionTable, TruthTable
    from detrcli.evaluate.truth import load_truth

    truth = TruthTable.of(load_truth(str(folder / "truth.json"), pictures=False))
    fields = [name for name in TruthTable.__dataclass_fields__ if name != "names"]
    np.savez(folder / "truth.npz", **{name: getattr(truth, name) for name in fields})
    table = DetectionTable.read(folder / "detections.json")
    np.savez(folder / "detections.npz", **{n: getattr(table, n) for n in DetectionTable.__dataclass_fields__})


def measure(folder: Path, way: str) -> dict[str, object]:
    """In a process of its own, so that memory is its own too."""
    command = [sys.executable, __file__, "--way", way, "--folder", str(folder)]
    one_thread = os.environ | {"RAYON_NUM_THREADS": "1"}  # idle workers of a pool would count as work
    answer: dict[str, object] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True, env=one_thread).stdout
    )
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.way:
        seconds, numbers = (
            by_pycocotools(given.folder) if given.way == "pycocotools" else by_us(given.folder, given.way)
        )
        status = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
        print(json.dumps({"cpu_seconds": round(seconds, 3), "peak_mb": round(peak), "numbers": numbers}))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, given.images)
        to_arrays(folder)
        results = {way: measure(folder, way) for way in WAYS}
    report(given.images, results)


def report(images: int, results: dict[str, dict[str, object]]) -> None:
    reference = results["pycocotools"]
    for way, result in results.items():
        faster = float(str(reference["cpu_seconds"])) / float(str(result["cpu_seconds"]))
        memory = float(str(result["peak_mb"])) / float(str(reference["peak_mb"]))
        same = bool(
            np.allclose(np.array(result["numbers"]), np.array(reference["numbers"]), rtol=0, atol=1e-12)
        )
        line = {"way": way, "images": images, "detections": images * DETECTIONS, **result}
        del line["numbers"]
        print(
            json.dumps(line | {"faster": round(faster, 1), "memory": round(memory, 2), "same_numbers": same})
        )


if __name__ == "__main__":
    main()
