"""The names of tensors in official files: Lite DETR's of its DINO and, as that code would name them, of Deformable DETR."""

from __future__ import annotations

from detrcli.plugins.backbones import BackboneConfig
from detrcli.weights.keymap import Alias, Drop, KeyMap, Rename, Rule
from detrcli.weights.layouts import COUNTERS
from detrcli_deformable_detr import keymap as deformable
from detrcli_lite_detr.config import DinoConfig, LiteDeformableConfig, LiteDinoConfig

_LAYER = "transformer.encoder.layers.*"
_LOW = (
    Rename(f"{_LAYER}.linear12.*", "encoder.layers.*.low.ffn.linear1.*"),
    Rename(f"{_LAYER}.linear22.*", "encoder.layers.*.low.ffn.linear2.*"),
    Rename(f"{_LAYER}.norm22.*", "encoder.layers.*.low.norm.*"),
)
_UNUSED = Drop("**_attn.query_proj.*")  # files of models without key-aware attention hold it all the same


def lite_deformable(config: LiteDeformableConfig) -> KeyMap:
    unused = () if config.encoder.key_aware else (_UNUSED,)
    return KeyMap((*unused, *_LOW)) | deformable.official(config.host)


def lite_dino(config: LiteDinoConfig) -> KeyMap:
    unused = () if config.encoder.key_aware else (_UNUSED,)
    return KeyMap((*unused, *_LOW)) | dino(config.host)


def dino(config: DinoConfig) -> KeyMap:
    """One head under the names of every layer, and again below the decoder."""
    others = [f"{{}}.{i}" for i in range(1, config.decoder_layers)]
    others += [f"transformer.decoder.{{}}.{i}" for i in range(config.decoder_layers)]
    return KeyMap(
        (
            *COUNTERS,
            *_backbone(config.backbone),
            Rename("input_proj.**", "levels.input_proj.**"),
            Rename("label_enc.weight", "denoising.label_enc.weight"),
            Rename("transformer.level_embed", "levels.level_embed"),
            Rename("transformer.tgt_embed.weight", "queries.content.weight"),
            Rename("transformer.enc_output.*", "queries.enc_output.*"),
            Rename("transformer.enc_output_norm.*", "queries.enc_output_norm.*"),
            Rename("transformer.enc_out_class_embed.*", "queries.class_head.*"),
            Rename("transformer.enc_out_bbox_embed.**", "queries.box_head.**"),
            *_layers("encoder", deformable.OFFICIAL_ENCODER),
            *_layers("decoder", deformable.OFFICIAL_DECODER),
            Rename("transformer.decoder.norm.*", "decoder.norm.*"),
            Rename("transformer.decoder.ref_point_head.**", "decoder.ref_point_head.**"),
            Alias("class_embed.0.*", tuple(f"{name.format('class_embed')}.*" for name in others)),
            Alias("bbox_embed.0.**", tuple(f"{name.format('bbox_embed')}.**" for name in others)),
            Rename("class_embed.0.*", "class_head.*"),
            Rename("bbox_embed.0.**", "box_head.**"),
        )
    )


def _layers(part: str, names: dict[str, str]) -> list[Rule]:
    return [Rename(f"transformer.{part}.layers.*.{a}", f"{part}.layers.*.{b}") for a, b in names.items()]


def _backbone(config: BackboneConfig) -> list[Rule]:
    if not config.name.startswith("swin"):
        return [Rename("backbone.0.body.**", "backbone.body.**")]
    stages = range(4)
    return [
        Drop("backbone.0.**.relative_position_index"),
        # a stage ends with the merging of patches there, and begins with it here
        *(
            Rename(f"backbone.0.layers.{i}.downsample.**", f"backbone.body.maps.layers_{i + 1}.downsample.**")
            for i in stages[:-1]
        ),
        *(
            Rename(f"backbone.0.layers.{i}.blocks.**", f"backbone.body.maps.layers_{i}.blocks.**")
            for i in stages
        ),
        *(
            Rename(f"backbone.0.norm{level - 2}.*", f"backbone.body.norms.{i}.*")
            for i, level in enumerate(config.levels)
        ),
        Rename("backbone.0.patch_embed.**", "backbone.body.maps.patch_embed.**"),
    ]


def lite_deformable_hub(config: LiteDeformableConfig) -> KeyMap:
    """No file of this family has these names; those of Deformable DETR, which a training may start from, do."""
    return deformable.hub(config.host)
