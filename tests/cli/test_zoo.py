"""`detr zoo`, as users run it: real processes, a real Hub client, a Hub on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import termios
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import detrcli
from detrcli import runs
from detrcli.cli import console, main
from detrcli.config import to_plain
from detrcli.plugins import models, resolve
from detrcli.weights import keymap
from detrcli.weights.file import load, save
from detrcli.weights.metadata import Metadata
from tests.cli.run import Done, detr
from tests.tiny import write_run
from tests.weights.hub_server import Fault, Hub, serving

REPO = "owner/tiny"
PLUGIN = """
    from dataclasses import replace
    from detrcli.plugins.contract import Plugin, Weights
    from detrcli_detr.plugin import plugin as detr

    family = detr.families[0]
    tiny = next(v for v in family.variants if v.name == "tiny")
    weights = Weights(repo="owner/tiny", filename="model.safetensors", license="cc-by-4.0", layout="native", **{extra})
    plugin = replace(detr, families=(replace(family, name="pet", variants=(replace(tiny, weights=(weights,)),)),))
"""


def install(folder: Path, name: str, code: str) -> None:
    """A plugin package with its metadata on a path."""
    (folder / f"{name}_module.py").write_text(textwrap.dedent(code))
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[detrcli.models]\n{name} = {name}_module:plugin\n")


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole weights file of detr/tiny."""
    path = tmp_path_factory.mktemp("content") / "w.safetensors"
    torch.manual_seed(0)
    save(path, detrcli.create_model("detr/tiny").state_dict(), Metadata(model="pet/tiny", num_classes=3))
    return path.read_bytes()


@dataclass
class Desk:
    """A machine with a plugin `pet/tiny` whose weights lie on the Hub."""

    folder: Path
    hub: Hub
    env: dict[str, str] = field(default_factory=dict)

    def zoo(self, *args: str | Path, **options: str) -> Done:
        return detr("zoo", *args, env=self.env, **options)

    def declare(self, **extra: str) -> None:
        install(self.folder, "pet", PLUGIN.replace("{extra}", repr(extra)))


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    (tmp_path / "site").mkdir()
    with serving() as hub:
        desk = Desk(tmp_path / "site", hub)
        desk.env = {
            "PYTHONPATH": str(desk.folder),
            "HF_HOME": str(tmp_path / "hf"),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }
        yield desk


def test_pull_path_verify_and_rm_in_a_row(desk: Desk, content: bytes):
    desk.declare()
    desk.hub.add(REPO, {"model.safetensors": content})
    assert "is not on this machine" in desk.zoo("path", "pet").error(4)

    pulled = desk.zoo("pull", "pet")
    path = Path(pulled.out.strip())
    assert path.read_bytes() == content
    told = pulled.err.splitlines()
    assert told[0].startswith(
        f"downloading {REPO}/model.safetensors (licence cc-by-4.0, trained on coco-2017"
    )
    assert "recorded at this first use" in told[-1]

    before = len(desk.hub.requests)
    assert desk.zoo("path", "pet").out.strip() == str(path)
    assert (
        desk.zoo("pull", "pet", "--offline", "--json").json["sha256"] == hashlib.sha256(content).hexdigest()
    )
    rows = desk.zoo("list", "pet", "--ready", "--json").json["models"]
    assert [row["weights"]["state"] for row in rows] == ["cached"]

    first = desk.zoo("verify", "pet", "--json").json["verified"]
    assert first[0]["ok"]
    assert (first[0]["hash"], first[0]["fingerprint"]) == ("its first download", "nothing: recorded now")
    assert len(desk.hub.requests) == before  # all of that without one request

    path.resolve().write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "has changed" in desk.zoo("verify", "pet").error(5)

    assert "nothing was deleted" in desk.zoo("rm", "pet", stdin="y\n").error(2)  # nobody to ask
    assert path.exists()
    assert desk.zoo("rm", "pet", "--yes", "--json").json["bytes"] == len(content)
    assert not path.exists()


def test_rm_takes_a_link_away_and_leaves_what_it_leads_to(desk: Desk, tmp_path: Path):
    kept = tmp_path / "shared" / "kept"
    kept.mkdir(parents=True)
    link = Path(desk.env["HF_HOME"]) / "hub" / "models--owner--tiny"
    link.parent.mkdir(parents=True)
    link.symlink_to(kept.parent)
    assert desk.zoo("rm", REPO, "--yes", "--json").json["deleted"] == [str(link)]
    assert kept.is_dir()
    assert not link.is_symlink()


def test_a_download_shows_its_progress_on_a_terminal_and_only_there(desk: Desk, content: bytes):
    desk.declare()
    desk.hub.add(REPO, {"model.safetensors": content})
    assert "%|" not in desk.zoo("pull", "pet").err
    assert desk.zoo("rm", "pet", "--yes").code == 0
    screen, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    command = [sys.executable, "-m", "detrcli", "zoo", "pull", "pet"]
    with subprocess.Popen(command, env=os.environ | desk.env, stdout=subprocess.PIPE, stderr=terminal) as run:
        os.close(terminal)
        said = b"".join(_until_closed(screen))
    assert run.returncode == 0
    assert b"licence cc-by-4.0" in said
    assert b"100%|" in said


def _until_closed(screen: int) -> Iterator[bytes]:
    with contextlib.suppress(OSError), open(screen, "rb", buffering=0) as file:
        while part := file.read(4096):
            yield part


def test_a_declared_hash_that_is_not_met_ends_with_4_and_json_says_so(desk: Desk, content: bytes):
    desk.declare(sha256="0" * 64)
    desk.hub.add(REPO, {"model.safetensors": content})
    failed = desk.zoo("pull", "pet", "--json")
    assert failed.code == 4
    assert failed.json["error"]["kind"] == "hub"
    assert "expected 000000000000" in failed.json["error"]["message"]


def test_faults_of_the_hub_end_with_4_and_one_line(desk: Desk, content: bytes):
    desk.declare()
    desk.hub.add(REPO, {"model.safetensors": content}, Fault(status=403))
    assert "denies access (HTTP 403)" in desk.zoo("pull", "pet").error(4)
    desk.hub.repos.clear()
    assert "has no repository owner/tiny" in desk.zoo("pull", "pet").error(4)
    assert "offline" in detr("zoo", "pull", "pet", env=desk.env | {"HF_HUB_OFFLINE": "1"}).error(4)


def test_search_finds_papers_here_and_repositories_on_the_hub(desk: Desk, content: bytes):
    assert "detr/r101" in desk.zoo("search", "carion", "r101").out
    assert "no model of the zoo" in desk.zoo("search", "no-such-thing").err
    desk.hub.add("someone/detr-cats", {"model.safetensors": content})
    found = desk.zoo("search", "--hub", "cats", "--json").json["repositories"]
    assert [(row["repo"], row["license"]) for row in found] == [("someone/detr-cats", "mit")]


def test_a_broken_plugin_is_shown_and_the_others_work(desk: Desk):
    install(desk.folder, "hurt", "import module_that_is_not_there")
    listed = desk.zoo("list")
    assert listed.code == 0
    assert "detr/r50" in listed.out
    assert "broken plugin hurt" in listed.err
    assert "module_that_is_not_there" in listed.err
    assert "does not load" in desk.zoo("info", "hurt").error(4)
    assert "does not load" in desk.zoo("list", "hurt").error(4)


def test_info_shows_the_page_that_a_plugin_carries(desk: Desk):
    desk.declare()
    told = desk.zoo("info", "pet/tiny").out
    assert "owner/tiny:model.safetensors, cc-by-4.0" in told
    assert "not verified by us" in told
    assert "num_queries = 10" in told
    assert "## Departs" in desk.zoo("info", "detr").out
    whole = desk.zoo("info", "detr", "--json").json
    assert whole["paper"]["venue"] == "ECCV"
    assert all(m["config"] and m["recipes"] for m in whole["models"])


@pytest.mark.parametrize("name", [model.name for model in models()])
def test_info_knows_every_variant(here: Callable[..., Done], name: str):
    """What is published, counted, declared and configured, as text and as JSON."""
    model = resolve(name)
    shown = here("info", name)
    assert shown.code == 0, shown.err
    assert f"{model.variant.params:,} (counted" in shown.out
    published = model.variant.published
    assert (published.source if published else "published   nothing") in shown.out
    for weights in model.variant.weights:
        assert weights.repo in shown.out
        assert weights.license in shown.out
        assert "not verified by us" in shown.out
    [row] = here("info", name, "--json").json["models"]
    assert row["params"] == model.variant.params


@pytest.mark.parametrize("family", dict.fromkeys(model.family.name for model in models()))
def test_info_prints_the_page_of_every_family(here: Callable[..., Done], family: str):
    shown = here("info", family)
    page = resolve(family).page
    assert page is not None
    assert page.strip() in shown.out


def test_unknown_names_are_answered_with_the_nearest(desk: Desk):
    for command in (
        ("info", "detx"),
        ("list", "detx"),
        ("pull", "detx"),
        ("verify", "detx"),
        ("path", "detr/r5O"),
    ):
        done = desk.zoo(*command)
        assert "unknown" in done.error(2)
        assert "did you mean" in done.err


def test_a_paper_without_weights_says_what_to_do(desk: Desk):
    done = desk.zoo("pull", "detr/tiny")
    assert "declares no weights" in done.error(4)
    assert "detr zoo convert" in done.err


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """`detr zoo` within this process, where torch is loaded already."""

    def zoo(*args: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["detr", "zoo", *map(str, args)])
        monkeypatch.setattr(console, "settings", console.Settings())
        with pytest.raises(SystemExit) as left:
            main()
        told = capsys.readouterr()
        return Done(int(left.value.code or 0), told.out, told.err)

    return zoo


def official(path: Path) -> dict[str, torch.Tensor]:
    """An official checkpoint of detr/tiny, with the arguments that the paper's program stores."""
    import argparse

    torch.manual_seed(1)
    model = detrcli.create_model("detr/tiny")
    layout = model.detrcli_model.family.key_maps["official"](model.detrcli_model.config)
    names = keymap.revert(layout, model.state_dict())
    torch.save({"model": names, "args": argparse.Namespace(lr=1e-4), "epoch": 299}, path)
    return names


def test_convert_there_and_back_gives_the_same_tensors(tmp_path: Path, here: Callable[..., Done]):
    names = official(tmp_path / "tiny.pth")
    there = here("convert", tmp_path / "tiny.pth", "--model", "detr")
    ours = Path(there.out.strip())
    assert there.code == 0, there.err
    assert "detr/tiny, 3 classes" in there.err
    assert "layout official" in there.err
    assert "exists" in here("convert", tmp_path / "tiny.pth", "-m", "detr/tiny").error(2)
    assert "file of ours already" in here("convert", ours, "-o", tmp_path / "x").error(2)

    back = here("convert", ours, "--to", "official", "--out", tmp_path / "back.pth", "--json").json
    again, _ = load(Path(back["path"]))
    assert again.keys() == names.keys()
    assert all(torch.equal(again[name], names[name]) for name in names)
    assert here("convert", ours, "--to", "hub").code == 0

    verified = here("verify", ours, "--json").json["verified"][0]
    assert verified["fingerprint"] == "when it was converted"
    save(tmp_path / "plain.safetensors", load(ours)[0], Metadata(model="detr/tiny", num_classes=3))
    for source in ("nothing: recorded now", "recorded before"):
        told = here("verify", tmp_path / "plain.safetensors", "--json").json["verified"]
        assert told[0]["fingerprint"] == source


LAYOUTS = [(m.name, layout) for m in models() if m.variant.name == "tiny" for layout in m.family.key_maps]


@pytest.mark.parametrize(("name", "layout"), LAYOUTS, ids="-".join)
def test_every_layout_of_every_paper_is_converted_there_and_back(
    tmp_path: Path, here: Callable[..., Done], name: str, layout: str
):
    torch.manual_seed(0)
    module = detrcli.create_model(name)
    state, model = module.state_dict(), module.detrcli_model
    foreign = {
        n: t.clone() for n, t in keymap.revert(model.family.key_maps[layout](model.config), state).items()
    }
    source = tmp_path / ("theirs.pth" if layout == "official" else "theirs.safetensors")
    if layout == "official":
        torch.save({"model": foreign}, source)
    else:
        save_file({n: t.contiguous() for n, t in foreign.items()}, source, metadata={"format": "pt"})
    done = here("convert", source, "--model", name, "--out", tmp_path / "ours.safetensors", "--json").json
    assert (done["model"], done["layout"]) == (name, layout)
    ours, said = load(tmp_path / "ours.safetensors")
    assert said is not None
    assert said.config == to_plain(model.config)
    assert ours.keys() == state.keys()
    assert all(torch.equal(ours[n], state[n]) for n in state)
    back = here(
        "convert", tmp_path / "ours.safetensors", "--to", layout, "--out", tmp_path / f"back{source.suffix}"
    )
    assert back.code == 0, back.err
    again, _ = load(Path(back.out.strip()))
    assert again.keys() == foreign.keys()
    assert all(torch.equal(again[n], foreign[n]) for n in foreign)


def test_the_papers_with_files_of_others_all_have_a_layout():
    """Dynamic DETR has none: its authors released neither code nor weights."""
    families = {m.family.name for m in models()}
    assert families - {name.partition("/")[0] for name, _ in LAYOUTS} == {"dynamic_detr"}


def test_convert_asks_for_the_row_of_the_table_of_lite_dino(tmp_path: Path, here: Callable[..., Done]):
    """How many of an encoder's layers look at all scales is in no tensor."""
    model = resolve("lite_dino/h3l1-2x3")
    with torch.device("meta"):
        state = model.build().state_dict()
    names = keymap.revert(model.family.key_maps["official"](model.config), state)
    torch.save({"model": {n: torch.zeros(t.shape) for n, t in names.items()}}, tmp_path / "lite.pth")
    done = here("convert", tmp_path / "lite.pth", "--model", "lite_dino")
    assert "fits lite_dino/h3l1-2x3, lite_dino/h2l2-2x3" in done.error(2)
    assert "the row of the table" in done.err


def test_convert_names_and_refuses_what_would_run_code(tmp_path: Path, here: Callable[..., Done]):
    class Gadget:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"model": {"a": torch.zeros(1)}, "hook": Gadget()}, tmp_path / "evil.pth")
    assert "posix.system" in here("convert", tmp_path / "evil.pth", "--model", "detr/tiny").error(4)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "evil.safetensors").exists()


def test_convert_refuses_what_the_file_cannot_tell(tmp_path: Path, here: Callable[..., Done]):
    """r50 and r50-dc5 have the same tensors; the user must say which row of the table it is."""
    model = detrcli.create_model("detr/r50")
    layout = model.detrcli_model.family.key_maps["official"](model.detrcli_model.config)
    torch.save({"model": keymap.revert(layout, model.state_dict())}, tmp_path / "r50.pth")
    done = here("convert", tmp_path / "r50.pth", "--model", "detr")
    assert "fits detr/r50, detr/r50-dc5" in done.error(2)
    assert "--model detr/r50" in done.err


def test_convert_refuses_a_file_of_nothing_we_know(tmp_path: Path, here: Callable[..., Done]):
    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "x.pth")
    assert "fits none of" in here("convert", tmp_path / "x.pth", "-m", "detr").error(4)
    (tmp_path / "cut.pth").write_bytes((tmp_path / "x.pth").read_bytes()[:200])
    assert "cut short or damaged" in here("convert", tmp_path / "cut.pth", "-m", "detr").error(4)
    assert not (tmp_path / "cut.safetensors").exists()


def test_convert_passes_over_plugins_that_fail(tmp_path: Path, desk: Desk):
    broken = PLUGIN.replace("{extra}", "{}").replace(
        'name="pet"', 'name="pet", build_model=lambda *_: no_such_name'
    )
    install(desk.folder, "pet", broken)
    desk.env["DETR_PLUGINS"] = "detr,pet"
    official(tmp_path / "tiny.pth")
    assert desk.zoo("convert", tmp_path / "tiny.pth", "--json").json["model"] == "detr/tiny"
    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "x.pth")
    told = desk.zoo("convert", tmp_path / "x.pth").error(4)
    assert "fits none of" in told
    assert "pet/tiny could not be tried" in told
    assert "no_such_name" in told


def test_verify_notices_another_answer(tmp_path: Path, here: Callable[..., Done]):
    """The same file under a program that computes something else: here, a fingerprint that was tampered with."""
    official(tmp_path / "tiny.pth")
    here("convert", tmp_path / "tiny.pth", "-m", "detr/tiny", "-o", tmp_path / "t.safetensors")
    tensors, said = load(tmp_path / "t.safetensors")
    assert said is not None
    values = list(said.made["fingerprint"])
    values[3] += 0.01
    made = dict(said.made) | {"fingerprint": values}
    save(
        tmp_path / "t.safetensors",
        tensors,
        Metadata(model=said.model, num_classes=said.num_classes, config=said.config, made=made),
    )
    assert "gives other answers" in here("verify", tmp_path / "t.safetensors").error(5)


def test_verify_tells_a_run_that_cannot_be_read_and_goes_on(here: Callable[..., Done]):
    good, bad = runs.root("train") / "good", runs.root("train") / "bad"
    write_run(good)
    write_run(bad, "deformable_detr/tiny")
    (bad / "best.safetensors").unlink()
    (bad / "best.safetensors").symlink_to("/proc/self/mem")  # a file that nobody can read, not even root
    done = here("verify")
    assert "1 of 2 weights failed: cannot read it: Input/output error" in done.error(5)
    assert "ok" in done.out


def test_convert_never_writes_over_its_source(tmp_path: Path, here: Callable[..., Done]):
    source = tmp_path / "model.safetensors"
    save_file(detrcli.create_model("detr/tiny").state_dict(), source)
    before = source.read_bytes()
    said = here("convert", source, "-m", "detr/tiny", "-o", source, "--overwrite").error(2)
    assert "is the file to convert" in said
    made = here("convert", source, "-m", "detr/tiny", "--json").json["path"]
    assert made == str(tmp_path / "model.detrcli.safetensors")
    assert source.read_bytes() == before


def test_trained_weights_are_shown_before_others(desk: Desk, content: bytes):
    desk.declare()
    folder = runs.root("train") / "pet-shapes-1"
    folder.mkdir(parents=True)
    (folder / "best.safetensors").write_bytes(content)
    table = {"status": "finished", "model": "pet/tiny", "finished_at": "2026-01-01"}
    (folder / "run.json").write_text(json.dumps(table))
    assert desk.zoo("path", "pet").out.strip() == str(folder / "best.safetensors")
    assert desk.zoo("list", "pet", "--json").json["models"][0]["weights"]["state"] == "trained"
