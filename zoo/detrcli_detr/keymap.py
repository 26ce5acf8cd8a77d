"""The names of DETR's tensors in the files that exist: the official checkpoints and the Hub's."""

from __future__ import annotations

from detrcli.weights.keymap import Fuse, KeyMap, Rename
from detrcli.weights.layouts import COUNTERS, HUB_SPELLINGS

OFFICIAL = KeyMap(
    (
        *COUNTERS,
        Rename("backbone.0.body.**", "backbone.body.**"),
        Rename("transformer.encoder.**", "encoder.**"),
        Rename("transformer.decoder.**", "decoder.**"),
        Rename("encoder.layers.*.linear1.*", "encoder.layers.*.ffn.linear1.*"),
        Rename("encoder.layers.*.linear2.*", "encoder.layers.*.ffn.linear2.*"),
        Rename("decoder.layers.*.linear1.*", "decoder.layers.*.ffn.linear1.*"),
        Rename("decoder.layers.*.linear2.*", "decoder.layers.*.ffn.linear2.*"),
        Rename("decoder.layers.*.multihead_attn.**", "decoder.layers.*.cross_attn.**"),
        Rename("class_embed.*", "class_head.*"),
        Rename("bbox_embed.**", "box_head.**"),
    )
)

_QKV = ("q_proj", "k_proj", "v_proj")

HUB = HUB_SPELLINGS | KeyMap(
    (
        Rename("model.backbone.conv_encoder.model.**", "backbone.body.**"),
        Rename("model.query_position_embeddings.weight", "query_embed.weight"),
        Rename("model.input_projection.*", "input_proj.*"),
        Rename("class_labels_classifier.*", "class_head.*"),
        Rename("bbox_predictor.**", "box_head.**"),
        Rename("model.encoder.**", "encoder.**"),
        Rename("model.decoder.**", "decoder.**"),
        Rename("decoder.layernorm.*", "decoder.norm.*"),
        Rename("encoder.layers.*.self_attn_layer_norm.*", "encoder.layers.*.norm1.*"),
        Rename("encoder.layers.*.final_layer_norm.*", "encoder.layers.*.norm2.*"),
        Rename("decoder.layers.*.self_attn_layer_norm.*", "decoder.layers.*.norm1.*"),
        Rename("decoder.layers.*.encoder_attn_layer_norm.*", "decoder.layers.*.norm2.*"),
        Rename("decoder.layers.*.final_layer_norm.*", "decoder.layers.*.norm3.*"),
        Rename("decoder.layers.*.encoder_attn.**", "decoder.layers.*.cross_attn.**"),
        Rename("**.fc1.*", "**.ffn.linear1.*"),
        Rename("**.fc2.*", "**.ffn.linear2.*"),
        Fuse(tuple(f"**.{p}.*" for p in _QKV), "**.in_proj_*"),
    )
)
