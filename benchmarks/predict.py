"""Prediction: the first result, throughput beside transformers' pipeline with the same weights, and memory over many pictures.

    python benchmarks/predict.py first                          command to first result / (import torch + load + one forward)
    python benchmarks/predict.py throughput [--model M] [-n N]  needs: pip install 'detrcli[parity]'
    python benchmarks/predict.py memory [-n 2000]

One thread, random weights, pictures of 640 x 480 as the model's recipe scales them (800 x 1066). Ways take turns picture by picture in
one process, so that other load on the machine hits both; figures are CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BASELINE = """
import torch
torch.set_num_threads(1)
from detrcli.weights.resolve import choose
from detrcli.weights.opened import open_weights
model = open_weights(choose(None, {weights!r})).module.eval()
with torch.inference_mode():
    model(torch.zeros(1, 3, 800, 1066))
"""


def pictures(folder: Path, count: int) -> list[str]:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    names = []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8))
        names.append(str(folder / f"{number:04d}.jpg"))
        coarse.resize((640, 480)).save(names[-1], quality=90)
    return names


def save_weights(folder: Path, name: str) -> Path:
    import torch

    from detrcli.config import to_plain
    from detrcli.data.coco_classes import coco_channels
    from detrcli.plugins import resolve
    from detrcli.weights import file
    from detrcli.weights.metadata import Metadata

    model = resolve(name)
    torch.manual_seed(0)
    count = model.variant.num_classes
    about = Metadata(
        model=model.name,
        num_classes=count,
        config=to_plain(model.config),
        preprocess=model.variant.preprocess,
        categories=coco_channels() if count == 91 else None,
    )
    file.save(folder / "best.safetensors", model.build(count).state_dict(), about)
    return folder / "best.safetensors"


def first(model: str, repeats: int) -> dict[str, Any]:
    """Interleaved, the best of each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights, [picture] = save_weights(folder, model), pictures(folder, 1)
        command = [
            sys.executable,
            "-m",
            "detrcli",
            "-q",
            "predict",
            picture,
            "--weights",
            str(weights),
            "--device",
            "cpu",
        ]
        baseline = [sys.executable, "-c", BASELINE.format(weights=str(weights))]
        ours, theirs = [], []
        for turn in range(repeats):
            theirs.append(cpu_of(baseline))
            ours.append(cpu_of([*command, "--out", f"{folder}/out{turn}"]))
    return {
        "model": model,
        "ours_s": min(ours),
        "baseline_s": min(theirs),
        "ratio": round(min(ours) / min(theirs), 3),
    }


def cpu_of(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2)


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    started = time.process_time()
    yield
    seconds.append(time.process_time() - started)


def throughput(model: str, count: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = pictures(folder, count + 1)
        theirs, hub = transformers_pipeline(model, folder)
        ways: dict[str, Callable[[str], Any]] = {"transformers": theirs}
        ways |= {precision: ours(model, hub, precision == "bf16") for precision in ("fp32", "bf16")}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for picture in names:
            for way, run in ways.items():
                with timed(seconds[way]):
                    run(picture)
    best = {way: min(times[1:]) for way, times in seconds.items()}
    result: dict[str, Any] = {"model": model, **{f"{way}_s": round(value, 3) for way, value in best.items()}}
    for way in ("fp32", "bf16"):
        result[f"{way}_faster"] = round(best["transformers"] / best[way], 2)
    return result


def transformers_pipeline(model: str, folder: Path) -> tuple[Callable[[str], Any], Path]:
    import torch
    import transformers as hf

    hf.logging.set_verbosity_error()
    torch.manual_seed(0)
    backbone = {"use_timm_backbone": True, "backbone": "resnet50", "use_pretrained_backbone": False}
    network: Any
    if model.startswith("detr"):
        network = hf.DetrForObjectDetection(hf.DetrConfig(num_labels=91, **backbone))
        processor: Any = hf.DetrImageProcessor()
    else:
        options = {"two_stage": True, "with_box_refine": True}
        network = hf.DeformableDetrForObjectDetection(
            hf.DeformableDetrConfig(num_labels=91, **options, **backbone)
        )
        processor = hf.DeformableDetrImageProcessor()
    network.save_pretrained(folder / "hub")
    pipe: Any = hf.pipeline("object-detection", model=network.eval(), image_processor=processor, device="cpu")
    return lambda picture: pipe(picture, threshold=0.0), folder / "hub"


def ours(model: str, hub: Path, amp: bool) -> Callable[[str], Any]:
    import detrcli

    predictor = detrcli.load(model, weights=hub / "model.safetensors", device="cpu")
    return lambda picture: next(predictor.predict(picture, conf=0.0, amp=amp))


def memory(count: int) -> dict[str, Any]:
    """Resident memory after each tenth of the pictures."""
    import detrcli

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights, names = save_weights(folder, "detr/tiny"), pictures(folder, 8)
        predictor = detrcli.load(weights=weights, device="cpu")
        sizes = []
        for result in predictor.predict((names[i % 8] for i in range(count)), batch=2):
            if (result.index + 1) % max(1, count // 10) == 0:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                sizes.append(round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20))
    return {"pictures": count, "rss_mb": sizes, "growth": round(sizes[-1] / sizes[0], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("first", "throughput", "memory"))
    parser.add_argument("--model", default="detr/r50")
    parser.add_argument("-n", type=int)
    given = parser.parse_args()
    if given.what == "first":
        print(json.dumps(first(given.model, given.n or 3)))
    elif given.what == "throughput":
        print(json.dumps(throughput(given.model, given.n or 4)))
    else:
        print(json.dumps(memory(given.n or 2000)))


if __name__ == "__main__":
    main()
