"""What a pt2 may hold before torch sees it, so that nothing in a file is executed. Free of torch.

To torch a pt2 is a program: it unpickles parts of the archive, evaluates sizes and conditions as Python, looks operators up by any
name, and writes names into source that it compiles. Here only what `detr export` writes is let through: parts by name, operators by
name, formulas by their words, and every other string as a plain name in a place that is known to hold one. What torch then
loads is an archive written anew from these parts, so that no second reading of the same file finds others.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

from detrcli.errors import CheckpointError

ROOT = "archive/"
DESCRIPTION = "detrcli.json"
PROGRAM = "models/model.json"
SAMPLE_INPUTS = "data/sample_inputs/model.pt"  # for torch there must be one; it may be empty
DOCUMENTS = (PROGRAM, "data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
TENSORS = re.compile(r"data/(weights/weight|constants/tensor)_\d{1,6}")
VERSIONS = ("archive_format", "archive_version")
LEFT_BEHIND = (f"extra/{DESCRIPTION}", ".data/version", ".data/serialization_id", "byteorder")
LARGEST_TEXT = 2**26  # bytes

# Of aten, in any overload and in place: each computes tensors from tensors, and reaches neither files nor other memory.
_ATEN = """
abs acos add addcdiv addcmul asin atan atan2 bitwise_and bitwise_not bitwise_or bitwise_xor ceil celu clamp clamp_max clamp_min cos
cosh div elu eq erf exp expm1 floor floor_divide fmod frac ge gelu glu gt hardsigmoid hardswish hardtanh isfinite isinf isnan le
leaky_relu lerp log log10 log1p log2 log_sigmoid logical_and logical_not logical_or logical_xor lt maximum minimum mish mul
nan_to_num ne neg pow prelu reciprocal relu relu6 remainder round rsqrt rsub sigmoid sign silu sin sinh softplus sqrt square sub
tan tanh threshold trunc where __and__ __or__ __xor__

alias broadcast_to cat chunk clone contiguous copy detach diagonal expand expand_as flatten flip mT movedim narrow permute
pixel_shuffle pixel_unshuffle repeat repeat_interleave reshape roll select slice split split_with_sizes squeeze stack t tile
transpose tril triu unbind unflatten unfold unsqueeze view view_as

arange empty empty_like eye fill full full_like lift_fresh_copy linspace meshgrid new_empty new_full new_ones new_zeros ones
ones_like scalar_tensor zero zeros zeros_like

all amax amin any argmax argmin argsort cumprod cumsum logsumexp linalg_vector_norm max mean min norm prod sort std sum topk var
var_mean

bucketize embedding gather index index_add index_copy index_fill index_put index_select masked_fill masked_select nonzero one_hot
scatter scatter_add searchsorted take_along_dim

adaptive_avg_pool2d adaptive_max_pool2d addmm avg_pool2d baddbmm batch_norm bmm cdist constant_pad_nd conv1d conv2d conv_transpose2d
convolution dropout einsum grid_sampler group_norm instance_norm layer_norm linear log_softmax matmul max_pool2d mm outer pad
reflection_pad2d replication_pad2d rms_norm scaled_dot_product_attention softmax upsample_bicubic2d upsample_bilinear2d
upsample_nearest2d

_assert_async _assert_scalar _assert_tensor_metadata _to_copy item promote_types sym_constrain_range sym_constrain_range_for_size
sym_numel sym_size sym_stride to type_as
"""
ATEN = frozenset(_ATEN.split())
OTHERS = frozenset(
    [f"torch.ops.torchvision.{name}.default" for name in ("deform_conv2d", "nms", "roi_align")]
    + [f"torch.sym_{name}" for name in ("float", "int", "ite", "max", "min", "not", "sqrt")]
    + [f"_operator.{name}" for name in ("add", "and_", "eq", "floordiv", "ge", "gt", "le", "lt", "mod", "mul", "ne", "neg")]
    + [f"_operator.{name}" for name in ("or_", "pos", "sub", "truediv")]
)  # fmt: skip

SYMBOL = re.compile(r"Symbol\('[a-z]{1,3}\d{1,6}'(?:, [a-z]+=(?:True|False))*\)")
SIDE = re.compile(r"L\['(?:images|mask)'\]\.size\(\)\[\d\]")
_WORDS = """
Add Mul Integer FloorDiv CeilDiv CleanDiv IntTrueDiv Mod PythonMod ModularIndexing Min Max min max Abs abs Where Identity ToFloat CeilToInt
FloorToInt RoundToInt TruncToInt and or not And Or Not True False true false Eq Ne Lt Le Gt Ge Equality Unequality StrictLessThan
LessThan StrictGreaterThan GreaterThan
"""
TOKEN = re.compile(  # no power and no shift, whose numbers have no bound
    rf"\b(?:[su]?\d{{1,20}}|torch\.sym_(?:min|max)|{'|'.join(_WORDS.split())})\b"
    r"|//|(?<![*])[*](?![*])|[<>=!]=|(?<!<)<(?!<)|(?<!>)>(?!>)|[-+%(), ]"
)
LONGEST_FORMULA = 20_000

LEAF = r'\{"type": null, "context": null, "children_spec": \[\]\}'
INPUTS = (
    rf'\[1, \{{"type": "builtins\.tuple", "context": "null", "children_spec": \[\{{"type": "builtins\.tuple", "context": "null", '
    rf'"children_spec": \[{LEAF}, {LEAF}\]\}}, \{{"type": "builtins\.dict", "context": "\[\]", "children_spec": \[\]\}}\]\}}\]'
)
OUTPUTS = (
    rf'\[1, \{{"type": "builtins\.dict", "context": "\[(?:\\"[a-z_]+\\"(?:, )?)+\]", '
    rf'"children_spec": \[(?:{LEAF}(?:, )?)+\]\}}\]'
)


def is_operator(text: str) -> bool:
    found = re.fullmatch(r"torch\.ops\.aten\.(\w+)\.[A-Za-z]\w*", text, re.ASCII)
    if found is None:
        return text in OTHERS
    return found[1] in ATEN or found[1].removesuffix("_") in ATEN


def is_formula(text: str) -> bool:
    """A size or a condition on sizes: sums, products, quotients and comparisons of numbers, symbols and sides of the inputs."""
    left = SIDE.sub("0", SYMBOL.sub("0", text[: LONGEST_FORMULA + 1]))
    return len(text) <= LONGEST_FORMULA and not TOKEN.sub("", left)


def _all_of(pattern: str) -> Callable[[str], object]:
    return re.compile(pattern, re.ASCII).fullmatch


is_path = _all_of(r"(?!(?:.*\.)?__)[\w.-]{0,500}")  # of a module, a weight or a field
_name = _all_of(r"(?:[A-Za-z_]\w{0,500})?")

STRINGS: Mapping[str, Callable[[str], object]] = {  # by the field that they stand in; there are no others
    **dict.fromkeys(("name", "as_name", "forward_arg_names"), _name),
    **dict.fromkeys(("fqn", "parameter_name", "buffer_name", "tensor_constant_name"), is_path),
    "target": is_operator,
    "expr_str": is_formula,
    "guards_code": is_formula,
    "in_spec": _all_of(INPUTS),
    "out_spec": _all_of(OUTPUTS),
    "type": _all_of("cpu"),
    "path_name": _all_of(r"(?:weight|tensor)_\d{1,6}"),
    "as_string": _all_of(r"[ -~]{0,500}"),
    "as_float": _all_of("-?Infinity|NaN"),
    "verifiers": _all_of("TRAINING"),
    "torch_version": _all_of(r"[\w.+<=-]{0,100}"),
}
_EMPTY = "metadata custom_obj_values treespec_namedtuple_fields use_pickle custom_obj token constant_input"
EMPTY = frozenset(_EMPTY.split())
_KINDS = """
as_bool as_bools as_device as_expr as_float as_floats as_int as_ints as_layout as_memory_format as_name as_none as_optional_tensor
as_optional_tensors as_scalar_type as_string as_sym_bool as_sym_bools as_sym_float as_sym_floats as_sym_int as_sym_ints as_tensor
as_tensors
"""
KINDS = frozenset(_KINDS.split())  # of arguments and sizes


def description_in(file: IO[bytes]) -> str | None:
    """The text that a pt2 of ours says about itself; None in an archive without one."""
    with zipfile.ZipFile(file) as archive:
        name = f"{ROOT}extra/{DESCRIPTION}"
        if name not in archive.namelist():
            return None
        return _text(archive, archive.getinfo(name)).decode("utf-8")


def vetted(file: IO[bytes], name: object) -> Iterator[tuple[str, bytes]]:
    """The parts that torch may load, by name; an error for what `name`, as it is called, must not hold."""
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
            _check_archive(infos, file.seek(0, 2))
            for info in infos:
                part = _part(info)
                if part in DOCUMENTS:
                    content = _text(archive, info)
                    check(json.loads(content.decode("utf-8")))
                    yield part, content
                elif part not in LEFT_BEHIND:
                    yield part, archive.read(info)
    except Strange as what:
        raise CheckpointError(
            f"{name} is not run: it holds {what}, which a pt2 of this version does not",
            hint="export the model again with `detr export`",
        ) from None


class Strange(Exception):
    """Something in a file that is none of ours, in words."""

    def __init__(self, what: str, value: object = "") -> None:
        super().__init__(f"{what} {str(value)[:60]!r}" if value else what)


def _check_archive(infos: list[zipfile.ZipInfo], size: int) -> None:
    """Known parts, each once, as they are: what they hold is no more than the file."""
    if len({info.filename for info in infos}) < len(infos):
        raise Strange("the same part twice")
    for info in infos:
        part = _part(info)
        if not (part in (*DOCUMENTS, *VERSIONS, *LEFT_BEHIND) or TENSORS.fullmatch(part)):
            if part != SAMPLE_INPUTS:
                raise Strange("the part", part)
            if info.file_size:
                raise Strange("inputs to try it with")
        if info.compress_type != zipfile.ZIP_STORED:
            raise Strange("a compressed part")
    if sum(info.file_size for info in infos) > size:
        raise Strange("parts that overlap")


def _part(info: zipfile.ZipInfo) -> str:
    if not info.filename.startswith(ROOT):
        raise Strange("the part", info.filename)
    return info.filename.removeprefix(ROOT)


def _text(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.file_size > LARGEST_TEXT:
        raise Strange("a text of more than 64 MiB")
    return archive.read(info)


def check(value: Any, field: str = "") -> None:
    """Of a JSON document every name of a field, and every string by the field that it is in."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if not is_path(name) or (name.startswith("as_") and name not in KINDS):
                raise Strange("the field", name)
            if name in EMPTY and (inner or isinstance(inner, str)):
                raise Strange(name, inner)
            check(inner, name)
    elif isinstance(value, list):
        for inner in value:
            check(inner, field)
    elif isinstance(value, str) and not (field in STRINGS and STRINGS[field](value)):
        raise Strange(field, value)
