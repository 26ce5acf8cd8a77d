"""The names of Deformable DETR's tensors in the files that exist: the official checkpoints and the Hub's.

Both hold the heads of refined models under several names: as `class_embed.i`, `bbox_embed.i`, and again below the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping

from detrcli.weights.keymap import Alias, Fill, Fuse, KeyMap, Rename, Rule
from detrcli.weights.layouts import COUNTERS, HUB_SPELLINGS
from detrcli_deformable_detr.config import DeformableDetrConfig

# the official decoder counts its norms as they are built; here they count as they are used
OFFICIAL_DECODER = {
    "self_attn.**": "self_attn.**",
    "cross_attn.**": "cross_attn.**",
    "norm2.*": "norm1.*",
    "norm1.*": "norm2.*",
    "norm3.*": "norm3.*",
    "linear1.*": "ffn.linear1.*",
    "linear2.*": "ffn.linear2.*",
}
OFFICIAL_ENCODER = {
    "self_attn.**": "self_attn.**",
    "norm1.*": "norm1.*",
    "norm2.*": "norm2.*",
    "linear1.*": "ffn.linear1.*",
    "linear2.*": "ffn.linear2.*",
}
_HUB_DECODER = {
    "self_attn.out_proj.*": "self_attn.out_proj.*",
    "encoder_attn.**": "cross_attn.**",
    "self_attn_layer_norm.*": "norm1.*",
    "encoder_attn_layer_norm.*": "norm2.*",
    "final_layer_norm.*": "norm3.*",
    "fc1.*": "ffn.linear1.*",
    "fc2.*": "ffn.linear2.*",
}
_HUB_ENCODER = {
    "self_attn.**": "self_attn.**",
    "self_attn_layer_norm.*": "norm1.*",
    "final_layer_norm.*": "norm2.*",
    "fc1.*": "ffn.linear1.*",
    "fc2.*": "ffn.linear2.*",
}
_STARTS = ("reference_points", "enc_output", "enc_output_norm", "pos_trans", "pos_trans_norm")


def official(config: DeformableDetrConfig) -> KeyMap:
    """The `.pth` files of the authors' repository."""
    return KeyMap(
        (
            *COUNTERS,
            Rename("backbone.0.body.**", "backbone.body.**"),
            Rename("input_proj.**", "levels.input_proj.**"),
            Rename("query_embed.weight", "queries.query_embed.weight"),
            *_transformer("transformer", OFFICIAL_ENCODER, OFFICIAL_DECODER),
            *_heads(config, "transformer.decoder"),
        )
    )


def hub(config: DeformableDetrConfig) -> KeyMap:
    """The `model.safetensors` files that transformers reads and writes."""
    self_attn = "model.decoder.layers.*.self_attn"
    qkv = tuple(f"{self_attn}.{part}_proj.*" for part in "qkv")
    return HUB_SPELLINGS | KeyMap(
        (
            Rename("model.backbone.conv_encoder.model.**", "backbone.body.**"),
            Rename("model.input_proj.**", "levels.input_proj.**"),
            Rename("model.query_position_embeddings.weight", "queries.query_embed.weight"),
            Fuse(qkv, "decoder.layers.*.self_attn.in_proj_*"),
            *_transformer("model", _HUB_ENCODER, _HUB_DECODER),
            *_heads(config, "model.decoder"),
        )
    )


def _transformer(root: str, encoder: Mapping[str, str], decoder: Mapping[str, str]) -> list[Rule]:
    return [
        Rename(f"{root}.level_embed", "levels.level_embed"),
        *(Rename(f"{root}.{name}.*", f"queries.{name}.*") for name in _STARTS),
        *(Rename(f"{root}.encoder.layers.*.{a}", f"encoder.layers.*.{b}") for a, b in encoder.items()),
        *(Rename(f"{root}.decoder.layers.*.{a}", f"decoder.layers.*.{b}") for a, b in decoder.items()),
    ]


def _heads(config: DeformableDetrConfig, decoder: str) -> list[Rule]:
    """Without refinement one head under the name of every layer; with it one a layer, with two stages one more."""
    layers = config.decoder_layers
    if not config.refine:
        again = range(1, layers)
        return [
            Alias("class_embed.0.*", tuple(f"class_embed.{i}.*" for i in again)),
            Alias("bbox_embed.0.**", tuple(f"bbox_embed.{i}.**" for i in again)),
            Rename("class_embed.0.*", "class_heads.0.*"),
            Rename("bbox_embed.0.**", "box_heads.0.**"),
        ]
    rules: list[Rule] = [Alias("bbox_embed.**", (f"{decoder}.bbox_embed.**",))]
    if config.two_stage:
        rules += [
            Alias("class_embed.**", (f"{decoder}.class_embed.**",)),
            Rename(f"class_embed.{layers}.*", "queries.class_head.*"),
            Rename(f"bbox_embed.{layers}.**", "queries.box_head.**"),
        ]
    else:  # files that transformers 5 made from nothing hold one class head for all layers
        rules += [Fill("class_embed.0.*", tuple(f"class_embed.{i}.*" for i in range(1, layers)))]
    return [
        *rules,
        Rename("class_embed.*.*", "class_heads.*.*"),
        Rename("bbox_embed.*.**", "box_heads.*.**"),
    ]
