"""`detr profile` as it is typed: columns, forms, pictures and refusals."""

from __future__ import annotations

import csv
import io
import json
import xml.etree.ElementTree as ET
from collections import Counter

import pytest
import torch
from PIL import Image

from detrcli.errors import UsageError
from detrcli.plugins import Model, resolve
from detrcli.profile.plot import Mark, as_text, draw
from detrcli.profile.roofline import Machine, bounds
from detrcli.profile.run import profile
from detrcli.profile.timing import latencies
from tests import commands


@pytest.fixture
def detr(capsys, monkeypatch):
    return lambda *args: commands.detr(*args, capsys=capsys, monkeypatch=monkeypatch)


TINY = ("profile", "-m", "detr/tiny", "--size", "64x96")


def test_json_has_everything_and_says_how_it_counts(detr):
    found = json.loads(detr(*TINY, "--json", "--flops-per-mac", "2", "--memory").out)
    assert "counts twice" in found["convention"]
    (model,) = found["models"]
    assert model["name"] == "detr/tiny"
    assert model["size"] == "64x96"
    whole = {part: value for part, value in model["flops_by_part"].items() if "." not in part}
    assert sum(whole.values()) == pytest.approx(model["flops"])
    once = json.loads(detr(*TINY, "--json").out)["models"][0]
    assert model["flops"] == 2 * once["flops"]
    assert model["memory"]["training"] > model["memory"]["weights"] > 0


def test_csv_and_markdown_hold_the_same_table(detr):
    rows = list(csv.reader(io.StringIO(detr(*TINY, "--by-part", "--csv").out)))
    marked = [
        line.strip("| ").split(" | ") for line in detr(*TINY, "--by-part", "--markdown").out.splitlines()
    ]
    assert len(rows) == len(marked) - 1
    assert rows[0][1:] == marked[0]
    assert rows[0][:4] == ["model", "part", "params (M)", "GFLOPs"]
    assert " ".join(rows[1][:2]) == marked[2][0] == "detr/tiny backbone"
    assert all(float(cost) > 0 for _, _, _, cost, *_ in rows[1:]), "a small model costs something, too"


@pytest.mark.parametrize("what", [("--by-part",), ("--what-if", "--set", "heads=2")], ids=str)
def test_csv_of_two_models_is_one_table(detr, what):
    out = detr(*TINY, "-m", "d2etr/tiny", *what, "--csv").out
    rows = list(csv.DictReader(io.StringIO(out)))
    assert {row["model"] for row in rows} == {"detr/tiny", "d2etr/tiny"}
    assert out.count("model,") == 1


def test_two_models_take_turns_and_are_compared(detr):
    said = detr("profile", "--compare", "detr/tiny", "deformable_detr/tiny", "--size", "64x64", "--json")
    found = json.loads(said.out)
    first, second = (model["latency"] for model in found["models"])
    assert first["runs"] == second["runs"] >= 5
    assert first["median"] <= first["p90"]
    assert {"backbone", "encoder", "decoder", "heads"} <= set(first["by_part"])
    assert found["environment"]["packages"]["torch"] in torch.__version__


def test_models_alternate_run_by_run(monkeypatch):
    order: list[str] = []
    from detrcli.profile import timing

    def timed(net, images):
        order.append(type(net).__name__)
        return 1.0

    monkeypatch.setattr(timing, "_timed", timed)
    latencies([resolve("detr/tiny"), resolve("deformable_detr/tiny")], size=(64, 64), runs=4)
    assert order == ["Detr", "DeformableDetr"] * 4


def test_what_if_shows_before_and_after(detr):
    out = detr(*TINY, "--what-if", "--set", "num_queries=200", "--csv").out
    rows = {row["what"]: row for row in csv.DictReader(io.StringIO(out))}
    assert float(rows["decoder GFLOPs"]["changed"]) > float(rows["decoder GFLOPs"]["as published"])
    assert rows["backbone GFLOPs"]["difference"] == "+0.0 %"


def test_json_has_what_was_tried_and_the_roof(detr):
    said = detr(*TINY, "--what-if", "--set", "num_queries=200", "--roofline", "--json")
    found = json.loads(said.out)
    (model,) = found["models"]
    assert found["settings"] == {"num_queries": 200}
    before, after = (one["flops_by_part"]["decoder"] for one in (model["before"], model))
    assert after > before > 0
    roof = {bound["part"]: bound for bound in model["roofline"]}
    assert roof["backbone"]["by"] in ("arithmetic", "memory")
    assert roof["decoder"]["intensity"] > 0


def test_published_numbers_stand_beside_ours_at_the_papers_sizes(detr):
    (model,) = json.loads(detr("profile", "-m", "lite_dino/h2l2-2x3", "--compare-published", "--json").out)[
        "models"
    ]
    assert model["size"] == "800x1066"
    gflops = next(row for row in model["published"] if row["what"] == "GFLOPs")
    assert gflops["published"] == 130
    assert abs(gflops["percent"]) < 2
    encoder = next(row for row in model["published"] if row["what"] == "encoder GFLOPs")
    assert encoder["published"] == 30
    assert encoder["counted"] == pytest.approx(model["flops_by_part"]["encoder"] / 1e9)
    assert encoder["why"]


def test_published_numbers_of_parts_stand_beside_them_and_a_difference_has_its_reason(detr):
    asked = ("profile", "-m", "lite_deformable/h2l2-2x3", "--by-part", "--csv")
    shown = detr(*asked, "--compare-published")
    rows = {row["part"].split()[-1]: row for row in csv.DictReader(io.StringIO(shown.out))}
    assert rows["encoder"]["published GFLOPs"] == "23 (+26.2 %)"
    assert rows["backbone"]["published GFLOPs"] == ""
    said = " ".join(shown.err.split())
    assert "encoder GFLOPs +26.2 %): the encoder counts 6 GFLOPs more" in said
    plain = detr(*asked, "--size", "800x1066")
    assert "published" not in plain.out
    assert "differs from" not in plain.err


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (("--size", "64x64"), "counted at coco100, this is 64x64"),
        (("--set", "num_queries=200"), "another configuration"),
        (("--also", "norms"), "counted nothing besides, not norms"),
    ],
    ids=str,
)
def test_published_numbers_are_not_beside_counts_of_something_else(detr, asked, why):
    args = ("profile", "-m", "detr/r50", "--compare-published", *asked)
    said = detr(*args).err
    assert why in " ".join(said.split())
    assert "differs from" not in said
    (model,) = json.loads(detr(*args, "--json").out)["models"]
    assert why in model["not_compared"]
    assert "GFLOPs" not in {row["what"] for row in model["published"]}


def test_published_gflops_count_as_often_as_ours(detr):
    args = ("profile", "-m", "detr/r50", "--compare-published", "--flops-per-mac")
    once, twice = (next(csv.DictReader(io.StringIO(detr(*args, n, "--csv").out))) for n in ("1", "2"))
    assert once["published GFLOPs"].startswith("86 (")
    assert twice["published GFLOPs"] == once["published GFLOPs"].replace("86", "172")


def test_the_roof_is_arithmetic_or_memory():
    model = resolve("detr/tiny")
    found = profile(model, size=(64, 64))
    (timed,) = latencies([model], size=(64, 64), runs=3)
    fast = bounds(found, timed, Machine(flops=1e9, bandwidth=1e15))
    slow = bounds(found, timed, Machine(flops=1e15, bandwidth=1e9))
    assert {b.by for b in fast} == {"arithmetic"}
    assert {b.by for b in slow} == {"memory"}
    backbone = next(b for b in fast if b.part == "backbone")
    assert backbone.share == pytest.approx(2 * found.by_part["backbone"] / timed.by_part["backbone"] / 1e9)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--size", "40000x40000", "--latency"), "GiB"),
        (("--size", "16x16"), "coarsest"),
        (("--size", "0x800"), "coarsest"),
        (("--also", "magic"), "'magic'"),
        (("--what-if",), "--set"),
        (("--plot", "a.gif"), ".svg"),
        (("--plot", "-", "--json"), "--json has stdout"),
        (("--plot", "-", "--csv"), "--csv has stdout"),
        (("--plot", "-", "--markdown"), "--markdown has stdout"),
        (("--plot", "a.svg", "--set", "num_queries=9"), "--set does not have"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_with_a_way_on(detr, args, says):
    ended = detr("profile", "-m", "deformable_detr/r50", "--gflops", *args)
    assert ended.code == 2
    assert says in ended.out + ended.err
    assert "Traceback" not in ended.err


MARKS = [
    Mark("r50", "detr, ECCV 2020", 86, 42),
    Mark("<b>&", "other, X 2021", 150, 50),
    Mark("r50", "other, X 2021", 86.1, 42),
]


def test_the_plot_is_valid_and_labels_do_not_overlap(tmp_path):
    draw(MARKS, tmp_path / "a.svg")
    root = ET.parse(tmp_path / "a.svg").getroot()
    texts = list(root.iter("{http://www.w3.org/2000/svg}text"))
    assert "<b>&" in {t.text for t in texts}
    places = Counter((t.get("x"), t.get("y")) for t in texts)
    assert max(places.values()) == 1
    draw(MARKS, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 3


def test_the_plot_in_letters_has_every_series():
    text = as_text(MARKS)
    assert "A detr, ECCV 2020, B other, X 2021" in text
    body = text.splitlines()[1:-3]
    assert sum(line.count("B") + line.count("*") for line in body) == 2


def test_nothing_to_draw_is_said(tmp_path):
    with pytest.raises(UsageError, match="nothing to draw"):
        draw([], tmp_path / "a.svg")


def test_an_operator_nobody_can_count_is_shown(detr, monkeypatch):
    @torch.library.custom_op("detrcli_test::odd", mutates_args=())
    def odd(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    odd.register_fake(torch.empty_like)
    build = Model.build

    def with_odd(self, num_classes=None):
        net = build(self, num_classes)
        inner = net.input_proj.forward
        net.input_proj.forward = lambda x: odd(odd(inner(x)))
        return net

    monkeypatch.setattr(Model, "build", with_odd)
    ended = detr(*TINY)
    assert "unknown: 2 calls of detrcli_test.odd, not in the sum" in ended.err
