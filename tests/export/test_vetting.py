"""A pt2 is vetted before torch sees it: the ways by which torch executes what is in a file are tried, each with a payload."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile

import pytest
import torch

import detrcli
from detrcli.errors import CheckpointError
from detrcli.export import vetting
from tests.cli.run import detr

FIXED = {"dynamic": (), "size": (64, 96)}
PROGRAM = "archive/models/model.json"
WEIGHTS = "archive/data/weights/model_weights_config.json"
CONSTANTS = "archive/data/constants/model_constants_config.json"
SAMPLES = "archive/data/sample_inputs/model.pt"
PAYLOAD = "touch executed"


class Evil:
    def __reduce__(self):
        return os.system, (PAYLOAD,)


def pickled():
    file = io.BytesIO()
    torch.save((Evil(),), file)
    return file.getvalue()


@pytest.fixture(scope="module")
def parts(make):
    with zipfile.ZipFile(make("detr", ".pt2", **FIXED).file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture
def forged(parts, tmp_path, monkeypatch):
    """forged(change): a good file after `change` has worked on its parts; the payload would leave a file beside it."""
    monkeypatch.chdir(tmp_path)

    def write(change, **options):
        changed = dict(parts)
        change(changed)
        with zipfile.ZipFile(tmp_path / "model.pt2", "w", **options) as archive:
            for name, content in changed.items():
                archive.writestr(name, content)
        return tmp_path / "model.pt2"

    return write


def edited(part):
    """A change of one JSON document in the archive."""

    def decorate(edit):
        def change(parts):
            document = json.loads(parts[part])
            edit(document)
            parts[part] = json.dumps(document).encode()

        change.__name__ = edit.__name__
        return change

    return decorate


def inputs_that_are_a_pickle(parts):
    parts[SAMPLES] = pickled()


def weights_that_are_a_pickle(parts):
    config = json.loads(parts[WEIGHTS])
    next(iter(config["config"].values()))["use_pickle"] = True
    parts[WEIGHTS] = json.dumps(config).encode()
    parts["archive/data/weights/weight_0"] = pickled()


def weights_in_an_older_form(parts):
    parts["archive/data/weights/model.pt"] = pickled()


def constant_that_is_an_object(parts):
    config = json.loads(parts[CONSTANTS])
    meta = next(iter(json.loads(parts[WEIGHTS])["config"].values()))
    config["config"]["x"] = meta | {"path_name": "opaque_obj_0", "use_pickle": True}
    parts[CONSTANTS] = json.dumps(config).encode()
    parts["archive/data/constants/opaque_obj_0"] = pickle.dumps(Evil())


def library(parts):
    parts["archive/data/aotinductor/model/model.so"] = b"\x7fELF"


def second_program(parts):
    parts["archive/models/other.json"] = parts[PROGRAM]


def part_outside(parts):
    parts["version"] = b"8.20"


@edited(PROGRAM)
def size_that_is_code(program):
    meta = program["graph_module"]["graph"]["tensor_values"]["images"]
    meta["sizes"][2] = {"as_expr": {"expr_str": f"__import__('os').system({PAYLOAD!r})", "hint": None}}


@edited(PROGRAM)
def condition_that_is_code(program):
    program["guards_code"] = [f"__import__('os').system({PAYLOAD!r}) == 0"]


@edited(PROGRAM)
def operator_of_the_system(program):
    node = program["graph_module"]["graph"]["nodes"][0]
    node["target"] = "torch.os.system"
    node["inputs"] = [{"name": "", "arg": {"as_string": PAYLOAD}, "kind": 1}]


@edited(PROGRAM)
def operator_that_writes_a_file(program):
    node = program["graph_module"]["graph"]["nodes"][0]
    node["target"] = "torch.ops.aten.from_file.default"
    arguments = {"filename": {"as_string": "executed"}, "shared": {"as_bool": True}, "size": {"as_int": 1}}
    node["inputs"] = [{"name": name, "arg": arg, "kind": 1} for name, arg in arguments.items()]


@edited(PROGRAM)
def argument_that_is_a_function(program):
    node = program["graph_module"]["graph"]["nodes"][0]
    node["inputs"][0]["arg"] = {"as_operator": "torch.os.system"}


@edited(PROGRAM)
def name_that_is_code(program):
    text = json.dumps(program["graph_module"])
    name = f'mask=__import__("os").system("{PAYLOAD}")'
    program["graph_module"] = json.loads(
        text.replace('"name": "mask"', f'"name": {json.dumps(name)}').replace(
            '"mask": {', f"{json.dumps(name)}: {{"
        )
    )


@edited(PROGRAM)
def argument_name_that_is_code(program):
    [signature] = [
        entry["signature"] for entry in program["graph_module"]["module_call_graph"] if entry["signature"]
    ]
    signature["forward_arg_names"][1] = f'mask=__import__("os").system("{PAYLOAD}")'


@edited(PROGRAM)
def answers_of_a_type_to_import(program):
    [signature] = [
        entry["signature"] for entry in program["graph_module"]["module_call_graph"] if entry["signature"]
    ]
    spec = json.loads(signature["out_spec"])
    spec[1]["context"] = json.dumps([{"__enum__": True, "fqn": "antigravity:x", "name": "x"}])
    signature["out_spec"] = json.dumps(spec)


@edited(PROGRAM)
def source_of_a_node(program):
    program["graph_module"]["graph"]["nodes"][0]["metadata"] = {"source_fn_stack": "x,torch.os.system"}


@edited(PROGRAM)
def object_of_a_script(program):
    program["graph_module"]["graph"]["custom_obj_values"] = {"x": {"name": "x", "class_fqn": "a.b"}}


DOORS = [
    inputs_that_are_a_pickle,
    weights_that_are_a_pickle,
    weights_in_an_older_form,
    constant_that_is_an_object,
    library,
    second_program,
    part_outside,
    size_that_is_code,
    condition_that_is_code,
    operator_of_the_system,
    operator_that_writes_a_file,
    argument_that_is_a_function,
    name_that_is_code,
    argument_name_that_is_code,
    answers_of_a_type_to_import,
    source_of_a_node,
    object_of_a_script,
]


@pytest.mark.parametrize("change", DOORS, ids=lambda change: change.__name__)
def test_nothing_in_a_file_is_executed(change, forged):
    path = forged(change)
    with pytest.raises(CheckpointError, match="is not run: it holds") as caught:
        detrcli.load(str(path))
    assert caught.value.exit_code == 4
    assert caught.value.hint == "export the model again with `detr export`"
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_command_says_so_in_one_line(forged):
    path = forged(inputs_that_are_a_pickle)
    done = detr("predict", path.parent, "--model", path)
    assert f"{path} is not run: it holds inputs to try it with" in done.error(4)
    assert "detr export" in done.err
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_file_that_says_nothing_about_itself_is_anothers(forged):
    path = forged(lambda parts: (parts.pop("archive/extra/detrcli.json"), inputs_that_are_a_pickle(parts)))
    with pytest.raises(CheckpointError, match="was not made by detr export"):
        detrcli.load(str(path))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_is_taken_apart_again_runs(forged):
    model = detrcli.load(str(forged(lambda parts: None))).model
    assert model(torch.zeros(1, 3, 64, 96)).logits.shape == (1, 10, 4)


def test_an_archive_holds_no_more_than_its_file(forged, monkeypatch):
    with pytest.raises(CheckpointError, match="a compressed part"):
        detrcli.load(str(forged(lambda parts: None, compression=zipfile.ZIP_DEFLATED)))
    path = forged(lambda parts: None)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(PROGRAM, b"{}")
    with pytest.raises(CheckpointError, match="the same part twice"):
        detrcli.load(str(path))
    monkeypatch.setattr(vetting, "LARGEST_TEXT", 10_000)
    with pytest.raises(CheckpointError, match="a text of more than"):
        detrcli.load(str(forged(lambda parts: None)))


def test_parts_that_share_their_bytes_are_refused(forged, parts):
    path = forged(
        lambda parts: parts.update({f"archive/data/weights/weight_{10**5 + i}": b"" for i in range(9)})
    )
    with zipfile.ZipFile(path, "a") as archive:
        large = max(archive.infolist(), key=lambda info: info.file_size)
        for info in archive.infolist():
            if info.filename[-6:-1] == "10000":
                info.header_offset, info.file_size, info.compress_size = (
                    large.header_offset,
                    large.file_size,
                    large.file_size,
                )
        archive._didModify = True
    with pytest.raises(CheckpointError, match="parts that overlap"):
        detrcli.load(str(path))


@pytest.mark.parametrize("end", [0, 20_000])
def test_a_file_that_ends_too_soon_is_one_line(end, parts, forged):
    path = forged(lambda parts: None)
    path.write_bytes(path.read_bytes()[:end])
    done = detr("predict", path.parent, "--model", path)
    assert f"{path} cannot be loaded: File is not a zip file" in done.error(4)
    assert not [line for line in done.err.splitlines() if "torch" in line]


def test_what_torch_refuses_is_said_with_its_reason(forged):
    @edited(PROGRAM)
    def of_a_later_torch(program):
        program["schema_version"]["major"] = 99

    path = forged(of_a_later_torch)
    done = detr("predict", path.parent, "--model", path)
    assert "cannot be loaded: Serialized schema version" in done.error(4)


GOOD = [
    "s31",
    "Add(Mul(Integer(-2), Symbol('s14', positive=True, integer=True)), FloorDiv(Symbol('u0', integer=True), Integer(8)))",
    "Min(Integer(64), Symbol('s14', positive=True, integer=True))",
    "(1 + (((-1) + L['images'].size()[2]) // 16)) % 3 != 0",
    "L['images'].size()[0] == L['mask'].size()[0]",
    "torch.sym_min(900, (1 + (((-1) + L['images'].size()[2]) // 8))) != 1",
]
BAD = [
    "__import__('os')",
    "().__class__",
    "lambda: 0",
    "9**9**9",
    "1 << 99",
    "1e9",
    "x",
    "S",
    "Symbol('s1; import os')",
    "Symbol('s1', f=open('x'))",
    "L['images'].data",
    "torch.load",
    "torch.sym_min.__class__",
    "[0 for s1 in s2]",
    "(s1 := 2)",
    '"s1"',
    "s1\ns2",
    "Mul(" * 9999,
]


def test_formulas_are_known_by_their_words():
    assert [text for text in GOOD if not vetting.is_formula(text)] == []
    assert [text for text in BAD if vetting.is_formula(text)] == []


def test_operators_are_known_by_their_names():
    assert vetting.is_operator("torch.ops.aten.relu_.default")
    assert vetting.is_operator("torch.ops.aten.__and__.Tensor")
    for name in (
        "torch.ops.aten.relu.__class__",
        "torch.ops.aten.save.default",
        "torch.ops.aten.set_.source_Storage",
        "torch.ops.aten.add",
        "torch.ops.higher_order.cond",
        "torch.load",
        "_operator.attrgetter",
        "math.trunc",
        "#x:y",
    ):
        assert not vetting.is_operator(name), name


def test_every_known_operator_is_one_of_torch():
    import torchvision  # noqa: F401 - registers its own

    for name in vetting.ATEN:
        assert hasattr(torch.ops.aten, name) or hasattr(torch.ops.aten, name + "_"), name
    for target in vetting.OTHERS:
        module, *path = target.replace("_operator", "operator").split(".")
        found = {"torch": torch, "operator": __import__("operator")}[module]
        for part in path:
            found = getattr(found, part)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    ["dynamic_detr", "d2etr"]
    + [
        pytest.param(name, marks=pytest.mark.long)
        for name in ("detr", "deformable_detr", "lite_deformable", "lite_dino", "dino")
    ],
)
def test_every_family_is_let_through(family, make):
    exported = make(family, ".pt2", **FIXED)
    assert detrcli.load(str(exported.file)).model(torch.zeros(1, 3, 64, 96)).logits.isfinite().all()
