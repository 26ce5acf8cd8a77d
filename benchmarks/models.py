"""Deformable DETR two-stage on the CPU, one thread, against the transformers package: same weights, same pictures, same run.

    python benchmarks/models.py [--repeats 3] [--onnx]     800x1066, batch 1
    python benchmarks/models.py --short 320                smaller, to see that it works
                                                           needs: pip install 'detrcli[parity]' ([onnx])

Every subject runs in a process of its own: CPU seconds (best of the repeats, after one warm-up), peak resident memory, and
how far its boxes are from those of transformers. `kept` memory is what the allocator lever does (MALLOC_MMAP_MAX_=0,
MALLOC_TRIM_THRESHOLD_ and MALLOC_TOP_PAD_ high), given to either side. Training is in training.py, which shares what is here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**26)}
PLAIN = {"DETR_FAST": "off"}
CLASSES = 91

# name: (who, environment, 16 bits)
INFERENCE: dict[str, tuple[str, dict[str, str], bool]] = {
    "transformers": ("theirs", {}, False),
    "transformers, kept memory": ("theirs", KEPT, False),
    "onnxruntime": ("onnx", {}, False),
    "detrcli, no wheel, no levers": ("ours", PLAIN | {"DETR_OPS": "reference"}, False),
    "detrcli, no wheel": ("ours", {"DETR_OPS": "reference"}, False),
    "detrcli, no levers": ("ours", PLAIN, False),
    "detrcli, fold+layout": ("ours", {"DETR_FAST": "fold,layout"}, False),
    "detrcli": ("ours", {}, False),
    "detrcli --amp": ("ours", {}, True),
}


def reference(folder: Path | None = None) -> Any:
    """transformers' model; random weights, or those in the folder."""
    import torch
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

    if folder is not None:
        return DeformableDetrForObjectDetection.from_pretrained(folder)
    torch.manual_seed(0)
    config = DeformableDetrConfig(
        backbone="resnet50", use_timm_backbone=True, use_pretrained_backbone=False, num_labels=CLASSES,
        with_box_refine=True, two_stage=True, auxiliary_loss=True, class_cost=2, attention_dropout=0.1,
    )  # fmt: skip
    model = DeformableDetrForObjectDetection(config)
    with torch.no_grad():  # off the grid: fresh offsets point exactly at pixels
        for name, parameter in model.named_parameters():
            if "sampling_offsets" in name or "embed" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1 / max(1, parameter.dim() - 1))
    return model


def ours(folder: Path) -> Any:
    from safetensors.torch import load_file

    from detrcli.plugins import resolve
    from detrcli.weights.load import load_state

    declared = resolve("deformable_detr/r50-two-stage")
    declared = declared.configured(replace(declared.config, mask_proposals=False))  # as transformers has it
    model = declared.build(CLASSES)
    load_state(model, load_file(folder / "model.safetensors"), declared.family, declared.config)
    return model


def pictures(batch: int, height: int, width: int) -> Any:
    import torch

    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def predicting(who: str, folder: Path, short: int, amp: bool) -> Callable[[], Any]:
    """A function that predicts once and returns the boxes."""
    import torch

    images = pictures(1, short, short * 4 // 3 - 1 + short % 2)
    if who == "ours":
        from detrcli.nn.inference import infer
        from detrcli.nn.speed import fastest

        fast = fastest(ours(folder))
        return lambda: infer(fast, images, None, amp=amp).boxes
    theirs = reference(folder).eval()
    if who == "onnx":
        return _onnx(theirs, images, folder)

    def run() -> Any:
        with torch.inference_mode():
            return theirs(images).pred_boxes

    return run


def _onnx(model: Any, images: Any, folder: Path) -> Callable[[], Any]:
    import onnxruntime
    import torch

    path = str(folder / "model.onnx")
    torch.onnx.export(model, (images,), path, dynamo=True, opset_version=20, optimize=False, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    feed = {session.get_inputs()[0].name: images.numpy()}
    boxes = names.index("pred_boxes") if "pred_boxes" in names else 1
    return lambda: torch.from_numpy(session.run(None, feed)[boxes])


def one(run: Callable[[], Any], repeats: int) -> None:
    """Measure a function in this process, after one call to warm up; one line of JSON on stdout."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    answer, taken = run(), []
    for _ in range(repeats):
        started = time.process_time()
        run()
        taken.append(time.process_time() - started)
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024
    rows = answer.double().view(-1, 4 if answer.dim() else 1).tolist()
    print(json.dumps({"cpu_s": min(taken), "peak_mb": peak, "answer": rows}))


def measure(
    script: str, name: str, environment: dict[str, str], folder: Path, size: int, repeats: int
) -> dict[str, Any]:
    command = [sys.executable, script, "--one", name, "--folder", str(folder)]
    command += ["--short", str(size), "--repeats", str(repeats)]
    done = subprocess.run(
        command, env=os.environ | environment, stdout=subprocess.PIPE, check=True, text=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(script: str, subjects: dict[str, dict[str, str]], size: int, repeats: int) -> None:
    """Each subject (name: environment) in a process of its own, against `transformers`, which comes first."""
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        reference().save_pretrained(folder)
        for name, environment in subjects.items():
            row = measure(script, name, environment, Path(folder), size, repeats)
            base = rows.setdefault("transformers", row)
            answer = row.pop("answer") if name != "transformers" else row["answer"]
            row["difference"] = difference(answer, base["answer"])
            row["speedup"] = base["cpu_s"] / row["cpu_s"]
            row["memory"] = row["peak_mb"] / base["peak_mb"]
            rows[name] = row
            print(
                f"{name:<32} {row['cpu_s']:7.2f} s CPU {row['speedup']:5.2f}x   {row['peak_mb']:5.0f} MB "
                f"{row['memory']:4.2f}   difference {row['difference']:.1e}",
                flush=True,
            )
    rows["transformers"].pop("answer")
    task = Path(script).stem
    print(json.dumps({"task": task, "size": size, "repeats": repeats, "machine": machine(), "rows": rows}))


def difference(answer: list[list[float]], wanted: list[list[float]]) -> float:
    """The largest distance of a box to the nearest of those wanted: 16 bits bring proposals into another order.

    A loss is one row of one number; it is compared relative to its size.
    """
    import torch

    a, b = torch.tensor(answer), torch.tensor(wanted)
    gap = (a[:, None] - b[None]).abs().amax(-1).amin(1).max()
    return float(gap / b.abs().max().clamp(min=1))


def machine() -> dict[str, Any]:
    import torch

    cpu = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "processor": next(line.split(": ")[1] for line in cpu if "model name" in line),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bf16 arithmetic": torch.cpu._is_avx512_bf16_supported(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": 1,
        "load": os.getloadavg(),
        "page": resource.getpagesize(),
    }


def arguments(description: str | None, size: int, repeats: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", type=int, default=size, help="short side of the pictures")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--only", nargs="*", default=[], help="subjects beside transformers, by name")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    import torch

    parser = arguments(__doc__, 800, 3)
    parser.add_argument("--onnx", action="store_true", help="also through ONNX Runtime")
    given = parser.parse_args()
    if given.one:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        who, _, amp = INFERENCE[given.one]
        one(predicting(who, given.folder, given.short, amp), given.repeats)
        return
    names = [n for n in INFERENCE if given.onnx or n != "onnxruntime"]
    if given.only:
        names = [n for n in names if n in ("transformers", *given.only)]
    compare(__file__, {name: INFERENCE[name][1] for name in names}, given.short, given.repeats)


if __name__ == "__main__":
    main()
