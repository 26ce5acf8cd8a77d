"""docs/scale.md: its commands are understood, its script and its manifest are what their readers accept."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from detrcli.cli.app import app
from detrcli.train.plan import Request, make_plan

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGE = (DOCS / "scale.md").read_text()
SHELL = "\n".join(re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
(MANIFEST,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
CONTAINER = yaml.safe_load(MANIFEST)["spec"]["template"]["spec"]["containers"][0]
LINES = [line for line in SHELL.splitlines() if "train " in line]


TRAINING = re.findall(r"^detr train .*$", (DOCS / "train.md").read_text(), re.MULTILINE)


def words(line):
    """What follows `train`, however detr was started."""
    split = shlex.split(line)
    return split[split.index("train") + 1 :]


def test_nothing_is_missed():
    assert len(LINES) == 5
    assert len(TRAINING) == 3
    assert {shlex.split(line)[0] for line in LINES} == {"detr", "torchrun", "srun"}


@pytest.mark.parametrize(
    "arguments", [*map(words, LINES), CONTAINER["command"][2:]], ids=lambda a: " ".join(a[-2:])
)
def test_commands_are_understood(arguments):
    group = get_command(app)
    context = group.make_context("detr", ["train", *arguments])
    command = group.get_command(context, "train")
    given = command.make_context("train", list(arguments)).params
    plan = make_plan(Request(data=given["data"], model=given["model"], epochs=given["epochs"], device="cpu"))
    assert plan.recipe.epochs == 50
    plan.parts(given["devices"])


@pytest.mark.parametrize("line", TRAINING)
def test_commands_of_the_page_on_training_are_understood(line):
    group = get_command(app)
    context = group.make_context("detr", shlex.split(line)[1:])
    given = group.get_command(context, "train").make_context("train", words(line)).params
    assert given["resume"] or make_plan(Request(data=given["data"], model=given["model"], device="cpu"))


def test_the_script_is_a_shell_script():
    script = SHELL[SHELL.index("#!/bin/bash") :]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_the_manifest_mounts_what_the_command_names():
    mounted = {volume["mountPath"] for volume in CONTAINER["volumeMounts"]}
    volumes = yaml.safe_load(MANIFEST)["spec"]["template"]["spec"]["volumes"]
    assert {m["name"] for m in CONTAINER["volumeMounts"]} == {v["name"] for v in volumes}
    arguments = CONTAINER["command"]
    assert arguments[arguments.index("--data-root") + 1] in mounted
    assert any(arguments[arguments.index("--out") + 1].startswith(place) for place in mounted)
    assert arguments[arguments.index("--devices") + 1] == str(
        CONTAINER["resources"]["limits"]["nvidia.com/gpu"]
    )


def test_the_arithmetic_of_the_page():
    plan = make_plan(
        Request(data="coco", model="deformable_detr/r50", batch_size=32, device_batch=4, device="cpu")
    )
    assert (
        "A batch of 32 on 8 devices is 4 on each; on 2 devices with `--device-batch 4` it is 4 at once, 4 times"
        in PAGE
    )
    assert plan.parts(8) == 1
    assert plan.parts(2) == 4
