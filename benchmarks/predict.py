"""Prediction: the first result, throughput beside transformers' pipeline with the same weights, and memory over many pictures.

    python benchmarks/predict.py first                          command to first result / (import torch + load + one forward)
    python benchmarks/predict.py throughput [--model M] [-n N]  needs: pip install 'detrcli[parity]'
    python benchmarks/predict.py memory [-n 2000]

One thread, random weights, pictures of 640 x 480 as the model's recipe scales them (800 x 1066); figures are CPU seconds. Every way of
predicting has a process of its own: one that keeps its freed memory would lend it to the others.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

ALONE = {"OMP_NUM_THREADS": "1"}
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**26)}
# a way of predicting: its environment; freed memory is kept as our allocator lever does it
WAYS: dict[str, dict[str, str]] = {
    "transformers": {},
    "transformers, kept memory": KEPT,
    "detrcli": {},
    "detrcli --amp": {},
}

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
    subprocess.run(command, check=True, env=os.environ | ALONE)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2)


def throughput(model: str, count: int) -> dict[str, Any]:
    """Seconds a picture of each way, in a process of its own, and how many times as fast as the pipeline as it comes we are."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_pipeline(model, folder / "hub")
        seconds = {way: one_way(way, model, folder, count) for way in WAYS}
    fastest = {f"{way} faster": round(seconds["transformers"] / s, 2) for way, s in seconds.items()}
    return {"model": model, "seconds": seconds} | {
        name: ratio for name, ratio in fastest.items() if name.startswith("detrcli")
    }


def one_way(way: str, model: str, folder: Path, count: int) -> float:
    command = [sys.executable, __file__, "throughput", "--model", model, "-n", str(count)]
    command += ["--way", way, "--folder", str(folder)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | ALONE | WAYS[way]
    )
    return float(done.stdout.splitlines()[-1])


def measure(way: str, model: str, folder: Path, count: int) -> float:
    """The best CPU seconds of a picture in this process, after one to warm up."""
    names = pictures(folder, count + 1)
    if way.startswith("transformers"):
        run = transformers_pipeline(model, folder / "hub")
    else:
        run = ours(model, folder / "hub", amp=way.endswith("--amp"))
    taken = []
    for picture in names:
        started = time.process_time()
        run(picture)
        taken.append(time.process_time() - started)
    return round(min(taken[1:]), 3)


def save_pipeline(model: str, folder: Path) -> None:
    """A network of transformers with random weights, as it saves itself."""
    import torch
    import transformers as hf

    hf.logging.set_verbosity_error()
    torch.manual_seed(0)
    backbone = {"use_timm_backbone": True, "backbone": "resnet50", "use_pretrained_backbone": False}
    network: Any
    if model.startswith("detr"):
        network = hf.DetrForObjectDetection(hf.DetrConfig(num_labels=91, **backbone))
    else:
        options = {"two_stage": True, "with_box_refine": True}
        network = hf.DeformableDetrForObjectDetection(
            hf.DeformableDetrConfig(num_labels=91, **options, **backbone)
        )
    network.save_pretrained(folder)


def transformers_pipeline(model: str, folder: Path) -> Callable[[str], Any]:
    import transformers as hf

    hf.logging.set_verbosity_error()
    name = "Detr" if model.startswith("detr") else "DeformableDetr"
    network = getattr(hf, f"{name}ForObjectDetection").from_pretrained(folder).eval()
    processor = getattr(hf, f"{name}ImageProcessor")()
    pipe: Any = hf.pipeline("object-detection", model=network, image_processor=processor, device="cpu")
    return lambda picture: pipe(picture, threshold=0.0)


def ours(model: str, hub: Path, *, amp: bool) -> Callable[[str], Any]:
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
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        print(measure(given.way, given.model, given.folder, given.n))
        return
    if given.what == "first":
        print(json.dumps(first(given.model, given.n or 3)))
    elif given.what == "throughput":
        print(json.dumps(throughput(given.model, given.n or 4)))
    else:
        print(json.dumps(memory(given.n or 2000)))


if __name__ == "__main__":
    main()
