"""Plugins: found without importing, loaded one by one, duplicates refused, names forgiving."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from detrcli.errors import PluginError, UsageError
from detrcli.plugins import registry, resolve


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs throw-away plugins: `installed(name, code)` as a package with metadata on the path."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(dist, code, entry=None):
        module = f"plugin_of_{dist}"
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(code))
        info = tmp_path / f"{dist}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[detrcli.models]\n{entry or dist} = {module}:plugin\n")
        registry.plugins.cache_clear()

    yield install
    registry.plugins.cache_clear()
    for name in [m for m in sys.modules if m.startswith("plugin_of_")]:
        del sys.modules[name]


GOOD = """
    from dataclasses import dataclass
    from detrcli.plugins import Family, Paper, Plugin, Published, Recipe, Variant
    @dataclass(frozen=True, kw_only=True)
    class Config: width: int = 1
    recipe = Recipe(epochs=1, batch_size=1, lr_drop=1)
    paper = Paper(title="", venue="", year=2026, url="")
    def none(*args): raise NotImplementedError
    family = Family(name="{name}", summary="", variants=(Variant(name="v", config=Config(), recipes=(recipe,), params=0),),
                    build_model=none, build_criterion=none, postprocess=none, parts={{}})
    plugin = Plugin(api={api}, paper=paper, families=(family,))
"""


def test_a_broken_plugin_is_shown_and_leaves_the_others_alone(installed):
    installed("broken", "import no_such_module")
    assert [b.found.name for b in registry.broken()] == ["broken"]
    assert "no_such_module" in registry.broken()[0].reason
    assert resolve("detr").name == "detr/r50"
    with pytest.raises(PluginError, match=r"broken 1.0 does not load.*no_such_module"):
        resolve("broken")


def test_two_owners_of_a_name_are_both_refused(installed):
    installed("first", GOOD.format(name="twin", api=1))
    installed("second", GOOD.format(name="Twin", api=1))
    reasons = [b.reason for b in registry.broken()]
    assert len(reasons) == 2
    assert all("first" in r and "second" in r for r in reasons)
    with pytest.raises(PluginError, match="declared twice"):
        resolve("twin/v")


def test_a_newcomer_does_not_take_a_name_of_ours(installed):
    twice = 'families=(family, replace(family, name="sister"))'
    code = GOOD.format(name="lite-DINO", api=1).replace("families=(family,)", twice)
    installed("newcomer", code.replace("import dataclass", "import dataclass, replace"))
    assert [b.found.name for b in registry.broken()] == ["newcomer"]
    assert resolve("lite_dino").found.distribution == "detrcli"
    assert resolve("lite_deformable/tiny").found.distribution == "detrcli"
    with pytest.raises(PluginError, match=r"'lite-DINO' is declared twice.*uninstall newcomer"):
        resolve("sister")


@pytest.mark.parametrize(("api", "advice"), [(0, "upgrade the plugin"), (99, "upgrade detrcli")])
def test_another_api_says_what_to_upgrade(installed, api, advice):
    installed("other", GOOD.format(name="other", api=api))
    assert advice in registry.broken()[0].reason


def test_a_plugin_that_fails_while_building_is_named(installed):
    installed("frail", GOOD.format(name="mine", api=1))
    for build in (resolve("mine").build, lambda: resolve("mine").criterion(3)):
        with pytest.raises(PluginError, match=r"mine of frail 1\.0 failed: NotImplementedError"):
            build()


def test_an_entry_point_that_is_no_plugin_is_broken(installed):
    installed("odd", "plugin = 3")
    assert "is a int" in registry.broken()[0].reason


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise SystemExit('not today')", "SystemExit: not today"),
        ("def plugin(", "SyntaxError"),
        (GOOD.format(name="a b", api=1), "'a b' cannot be typed"),
        (GOOD.format(name="a/b", api=1), "'a/b' cannot be typed"),
        (GOOD.format(name="", api=1), "'' cannot be typed"),
        (GOOD.format(name="x", api=1).replace("params=0", "params='many'"), "not a whole number"),
        (GOOD.format(name="x", api=1).replace("recipes=(recipe,), params=0),)", "recipes=(recipe,), params=0),) * 2"), "['v', 'v']"),
        (GOOD.format(name="x", api=1).replace("families=(family,)", "families=None"), "cannot be read: TypeError"),
        (GOOD.format(name="x", api=1).replace('name="v"', "name=3"), "cannot be read: TypeError"),
        (GOOD.format(name="x", api=1).replace('Paper(title="", venue="", year=2026, url="")', "'mine'"), "paper is a str, not a Paper"),
        (GOOD.format(name="x", api=1).replace('title=""', "title=None"), "paper.title needs a text"),
        (GOOD.format(name="x", api=1).replace("config=Config()", "config=dict(width=1)"), "v.config is no instance"),
        (GOOD.format(name="x", api=1).replace("config=Config()", "config=Config"), "v.config is no instance"),
        (GOOD.format(name="x", api=1).replace("(recipe,)", "recipe"), "v.recipes is a Recipe, not a tuple"),
        (GOOD.format(name="x", api=1).replace("(recipe,)", "()"), "v needs a recipe"),
        (GOOD.format(name="x", api=1).replace("(recipe,)", "('fast',)"), "v.recipes[0] is a str, not a Recipe"),
        (GOOD.format(name="x", api=1).replace("params=0", "params=0, weights=paper"), "v.weights is a Paper, not a tuple"),
        (GOOD.format(name="x", api=1).replace("params=0", "params=0, published=(paper,)"), "v.published is a tuple, not a Published"),
        (GOOD.format(name="x", api=1).replace("params=0", "params=0, published=Published(source='', ap='42')"), "v.published.ap needs"),
        (GOOD.format(name="x", api=1).replace("params=0", "params=0, preprocess=dict()"), "v.preprocess is a dict"),
    ],
)  # fmt: skip
def test_an_odd_declaration_is_broken_and_says_why(installed, code, said):
    installed("odd", code)
    assert said in registry.broken()[0].reason
    assert resolve("detr").name == "detr/r50"


def test_an_entry_point_that_names_nothing_is_broken(installed, tmp_path):
    installed("odd", "plugin = 3")
    for value in ("no module at all", "plugin_of_odd:missing", "plugin_of_odd", ":"):
        (tmp_path / "odd-1.0.dist-info" / "entry_points.txt").write_text(f"[detrcli.models]\nodd = {value}\n")
        registry.plugins.cache_clear()
        assert [b.found.name for b in registry.broken()] == ["odd"], value


def test_detr_plugins_restricts(installed, monkeypatch):
    installed("extra", GOOD.format(name="extra", api=1))
    monkeypatch.setenv("DETR_PLUGINS", "extra")
    registry.plugins.cache_clear()
    assert [m.name for m in registry.models()] == ["extra/v"]
    monkeypatch.setenv("DETR_PLUGINS", "")
    registry.plugins.cache_clear()
    assert registry.models() == []


@pytest.mark.parametrize("name", ["detr", "DETR", "detr/r50", "Detr/R50"])
def test_names_forgive_case(name):
    assert resolve(name).name == "detr/r50"


def test_names_take_dash_for_underscore():
    assert resolve("detr/r50_dc5").name == "detr/r50-dc5"


@pytest.mark.parametrize(
    ("name", "near"), [("deter", "detr"), ("detr/r5", "r50"), ("detr/r50-dc", "r50-dc5")]
)
def test_unknown_names_get_the_nearest(name, near):
    with pytest.raises(UsageError) as caught:
        resolve(name)
    assert near in caught.value.hint


def test_a_folder_named_detrcli_ops_is_not_taken_for_the_wheel(tmp_path):
    """From the checkout's root `import detrcli_ops` finds a bare folder; presence is asked of the metadata instead."""
    code = """
import importlib.metadata, sys
from importlib.machinery import ModuleSpec

class BareFolder:
    def find_spec(self, name, path=None, target=None):
        if name == "detrcli_ops":
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = ["."]
            return spec

version = importlib.metadata.version
def not_installed(name):
    if name == "detrcli-ops":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

sys.meta_path.insert(0, BareFolder())
importlib.metadata.version = not_installed
import detrcli_ops
assert getattr(detrcli_ops, "__file__", None) is None, "the trap is not set"
from detrcli.ops import backend
assert backend("cpu").name == "reference", backend("cpu")
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
