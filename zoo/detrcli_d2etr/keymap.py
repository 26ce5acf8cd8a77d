"""The names of D²ETR's tensors in the checkpoints of the authors' code."""

from __future__ import annotations

from collections.abc import Iterator

from detrcli.weights.keymap import Alias, KeyMap, Rename, Rule
from detrcli.weights.layouts import COUNTERS
from detrcli_d2etr.config import D2etrConfig

# the official decoders count their norms as they are built; here they count as they are used
_DECODER_LAYER = {
    "self_attn.**": "self_attn.**",
    "cross_attn.**": "cross_attn.**",
    "norm2.*": "norm1.*",
    "norm1.*": "norm2.*",
    "norm3.*": "norm3.*",
    "linear1.*": "ffn.linear1.*",
    "linear2.*": "ffn.linear2.*",
}
_HEADS = {
    "class_embed": "class_heads.{}",
    "bbox_embed": "box_heads.{}",
    "iou_embed": "location_heads.{}.iou",
    "center_embed": "location_heads.{}.centerness",
}
_PROPOSAL_HEADS = {
    "class_embed": "queries.class_head",
    "bbox_embed": "queries.box_head",
    "iou_embed": "proposal_heads.iou",
    "center_embed": "proposal_heads.centerness",
}


def official(config: D2etrConfig) -> KeyMap:
    return KeyMap(
        (*COUNTERS, *_heads(config), *_transformer(config), *_fusion(config), *_pvt(), _OTHER_BACKBONE)
    )


def _heads(config: D2etrConfig) -> Iterator[Rule]:
    """One head a layer and one for proposals where boxes are refined, else one for all; again below the decoder."""
    layers = config.decoder_layers
    for theirs in _HEADS:
        if config.refine:
            yield Alias(f"{theirs}.**", (f"transformer.decoder.{theirs}.**",))
            continue
        names = [f"{theirs}.{i}.**" for i in range(1, layers)]
        if theirs == "iou_embed":
            names += [f"transformer.decoder.{theirs}.{i}.**" for i in range(layers)]
        yield Alias(f"{theirs}.0.**", tuple(names))
    if config.two_stage:
        for theirs, ours in _PROPOSAL_HEADS.items():
            yield Rename(f"{theirs}.{layers}.**", f"{ours}.**")
    for theirs, ours in _HEADS.items():
        yield Rename(f"{theirs}.*.**", f"{ours.format('*')}.**")


def _transformer(config: D2etrConfig) -> Iterator[Rule]:
    embedding = "queries" if config.two_stage else "token_embedding"
    yield Rename("transformer.level_embed", "level_embed")
    yield Rename("query_embed.weight", "queries.query_embed.weight")
    yield Rename("transformer.token_embed.*", "token_head.token_embed.*")
    for name in ("enc_output", "enc_output_norm"):
        yield Rename(f"transformer.{name}.*", f"{embedding}.{name}.*")
    for name in ("reference_points", "pos_trans", "pos_trans_norm"):
        yield Rename(f"transformer.{name}.*", f"queries.{name}.*")
    for theirs, ours in _DECODER_LAYER.items():
        yield Rename(f"transformer.decoder.layers.*.{theirs}", f"decoder.layers.*.{ours}")


def _fusion(config: D2etrConfig) -> Iterator[Rule]:
    """Cross-scale attention is part of the backbone there; the coarser map's projection stands apart."""
    maps = len(config.backbone.levels)
    if config.coarser_map:
        yield Rename("backbone.0.fuse_addin_proj.0.**", f"fusion.projections.{maps}.**")
    yield Rename("backbone.0.fuse_proj.*.**", "fusion.projections.*.**")
    for stage in range(config.maps - 1):
        block = f"backbone.0.fuse_block{stage + 2}.*"
        yield Rename(f"{block}.mlp.dwconv.dwconv.*", f"fusion.stages.{stage}.blocks.*.mlp.dwconv.*")
        yield Rename(f"{block}.**", f"fusion.stages.{stage}.blocks.*.**")
        yield Rename(f"backbone.0.fuse_norm{stage + 2}.*", f"fusion.stages.{stage}.norm.*")


def _pvt() -> Iterator[Rule]:
    """PVT v2's stages, which timm nests."""
    yield Rename("backbone.0.patch_embed1.**", "backbone.body.patch_embed.**")
    for stage in range(4):
        theirs, ours = f"backbone.0.block{stage + 1}.*", f"backbone.body.stages_{stage}"
        yield Rename(f"backbone.0.patch_embed{stage + 1}.**", f"{ours}.downsample.**")
        yield Rename(f"{theirs}.mlp.dwconv.dwconv.*", f"{ours}.blocks.*.mlp.dwconv.*")
        yield Rename(f"{theirs}.**", f"{ours}.blocks.*.**")
        yield Rename(f"backbone.0.norm{stage + 1}.*", f"{ours}.norm.*")


_OTHER_BACKBONE = Rename("backbone.0.body.**", "backbone.body.**")
