"""Where Dynamic DETR's time goes: operators against torchvision's, both orders of the encoder, and each part's share.

    python benchmarks/dynamic_detr.py [--size 480 640] [--repeats 3]

One picture, one thread, CPU seconds (so that a busy machine matters less), the best of the repeats; every ratio is within one run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from detrcli.plugins import resolve
from detrcli_dynamic_detr.encoder import DynamicEncoder
from detrcli_dynamic_detr.operators import deform_conv2d, roi_align

MODEL = resolve("dynamic_detr/r50")


def best(run: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.process_time()
        run()
        times.append(time.process_time() - started)
    return min(times)


def operators(repeats: int) -> dict[str, dict[str, float]]:
    """Forward and forward with backward, seconds, at stride 16 of an 800 x 1333 picture and with 300 boxes."""
    torch.manual_seed(0)
    x = torch.randn(1, 256, 50, 84, requires_grad=True)
    offset, mask = torch.randn(1, 18, 50, 84), torch.rand(1, 9, 50, 84)
    weight, bias = torch.randn(256, 256, 3, 3) / 48, torch.randn(256)
    low = torch.rand(1, 300, 2) * 40 + 1
    boxes = torch.cat((low, low + torch.rand(1, 300, 2) * 8), -1)
    calls: dict[str, Callable[[Any], Tensor]] = {
        "deform_conv2d": lambda form: deform_conv2d(x, offset, mask, weight, bias, form=form),
        "roi_align": lambda form: roi_align(x, boxes, size=7, samples=2, form=form),
    }
    results = {}
    for name, call in calls.items():
        torch.testing.assert_close(call("auto"), call("operator"), rtol=1e-3, atol=1e-3)
        for form in ("auto", "operator"):

            def both(call: Callable[[Any], Tensor] = call, form: str = form) -> None:
                torch.autograd.grad(call(form).sum(), x)

            with torch.no_grad():
                forward = best(lambda call=call, form=form: call(form), repeats)
            results[f"{name} {form}"] = {"forward": forward, "forward_backward": best(both, repeats)}
    return results


@torch.no_grad()
def orders(size: tuple[int, int], repeats: int) -> dict[str, dict[str, float]]:
    """The whole encoder in both neighbour orders: seconds and multiply-adds."""
    maps = [torch.randn(1, 256, *(-(-s // 2**level) for s in size)) for level in (3, 4, 5, 6, 7)]
    results = {}
    for order in ("upsample_first", "resize_offsets"):
        torch.manual_seed(0)
        encoder = DynamicEncoder(replace(MODEL.config, neighbour_order=order, offset_init="default"))
        counter = FlopCounterMode(display=False)
        with counter:
            encoder(maps)
        gmac = counter.get_total_flops() / 2e9
        results[order] = {"seconds": best(lambda encoder=encoder: encoder(maps), repeats), "gmac": gmac}
    return results


@torch.no_grad()
def parts(size: tuple[int, int], repeats: int) -> dict[str, dict[str, float]]:
    """Seconds and parameters of backbone, FPN, encoder and decoder, measured where they run in the model."""
    torch.manual_seed(0)
    model = MODEL.build().eval()
    images = torch.randn(1, 3, *size)
    spent: dict[str, float] = {}
    for name in ("backbone", "fpn", "encoder"):
        _time(getattr(model, name), name, spent)
    whole = []
    for _ in range(repeats):
        spent.clear()
        started = time.process_time()
        model(images)
        whole.append({**spent, "all": time.process_time() - started})
    fastest = min(whole, key=lambda run: run["all"])
    fastest["decoder"] = fastest["all"] - sum(fastest[name] for name in ("backbone", "fpn", "encoder"))
    total = fastest.pop("all")
    return {name: {"seconds": s, "share": s / total} for name, s in fastest.items()}


def _time(module: nn.Module, name: str, spent: dict[str, float]) -> None:
    def start(*_: Any) -> None:
        spent[name] = -time.process_time()

    def stop(*_: Any) -> None:
        spent[name] += time.process_time()

    module.register_forward_pre_hook(start)
    module.register_forward_hook(stop)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, nargs=2, default=[480, 640])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    size = (arguments.size[0], arguments.size[1])
    results = {
        "operators": operators(arguments.repeats),
        "encoder": orders(size, arguments.repeats),
        "parts": parts(size, arguments.repeats),
    }
    for title, rows in results.items():
        print(title)
        for name, row in rows.items():
            print(f"  {name:<24}" + "".join(f"{key} {value:9.3f}   " for key, value in row.items()))
    encoder = results["encoder"]
    ratio = encoder["upsample_first"]["seconds"] / encoder["resize_offsets"]["seconds"]
    print(f"resize_offsets is {ratio:.2f}x as fast as upsample_first")
    print(json.dumps({"torch": torch.__version__, "size": size, "threads": 1, "results": results}))


if __name__ == "__main__":
    main()
