"""What it costs to ask `detr` something: CPU seconds of light commands, beside Python itself and `import torch`.

python benchmarks/startup.py [--runs 7]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "detr --version": [sys.executable, "-m", "detrcli", "--version"],
    "detr --help": [sys.executable, "-m", "detrcli", "--help"],
    "detr zoo list": [sys.executable, "-m", "detrcli", "zoo", "list"],
    "import torch": [sys.executable, "-c", "import torch"],
}


def cpu_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    for command in COMMANDS.values():
        cpu_seconds(command)  # warm the file cache
    taken = {name: [cpu_seconds(command) for _ in range(runs)] for name, command in COMMANDS.items()}
    median = {name: statistics.median(values) for name, values in taken.items()}
    for name, value in median.items():
        print(f"{name:<16} {value:6.3f} s CPU   {value / median['import torch']:5.2f} of import torch")
    print(json.dumps({"runs": runs, "median_cpu_seconds": median}))


if __name__ == "__main__":
    main()
