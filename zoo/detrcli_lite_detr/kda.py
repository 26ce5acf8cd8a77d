"""Key-aware deformable attention (sec. 3.4): the sampled features vote on how much they count.

    sum over heads of W_head [ sum over samples of softmax(q · k / √D) * v ],   k and v sampled at reference + offset

Deformable attention predicts the weight of a sample from the query alone; here it is the product with the key found there.
As in the released code, keys are the values unless `own_keys`, and a sample outside the picture is a zero key that keeps
its share of the softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detrcli import ops
from detrcli.ops import Shapes
from detrcli_deformable_detr.attention import DeformableAttention, ring_offsets
from detrcli_deformable_detr.config import DeformableDetrConfig
from detrcli_deformable_detr.encoder import xavier_linears
from detrcli_lite_detr.config import DinoConfig, Interleaving


class KeyAwareAttention(nn.Module):
    """A stand-in for `DeformableAttention`: the same arguments, the same shapes."""

    def __init__(
        self,
        width: int,
        heads: int,
        levels: int,
        points: int,
        *,
        own_keys: bool = False,
        shared_offsets: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.offset_levels = 1 if shared_offsets else levels
        self.sampling_offsets = nn.Linear(width, heads * self.offset_levels * points * 2)
        self.query_proj = nn.Linear(width, width)
        self.key_proj = nn.Linear(width, width) if own_keys else None
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Before training every query looks around itself as in deformable attention."""
        for layer in (self.query_proj, self.key_proj, self.value_proj, self.output_proj):
            if layer is not None:
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            ring = ring_offsets(self.heads, self.points)[:, None].expand(-1, self.offset_levels, -1, -1)
            self.sampling_offsets.bias.copy_(ring.flatten())

    def forward(
        self, query: Tensor, reference: Tensor, memory: Tensor, shapes: Shapes, mask: Tensor | None
    ) -> Tensor:
        """query (B, Q, C), reference (B, Q, L, 2 or 4) in [0, 1] of the padded picture, memory (B, S, C), mask (B, S) -> (B, Q, C)."""
        offsets = self.sampling_offsets(query).unflatten(-1, (self.heads, self.offset_levels, self.points, 2))
        offsets = offsets.expand(-1, -1, -1, self.levels, -1, -1)
        asked = self.query_proj(query).unflatten(-1, (self.heads, -1))
        value = self.value_proj(memory).unflatten(-1, (self.heads, -1))
        key = value if self.key_proj is None else self.key_proj(memory).unflatten(-1, (self.heads, -1))
        answer: Tensor = self.output_proj(ops.kda(asked, key, value, shapes, reference, offsets, mask))
        return answer


def encoder_attention(choice: Interleaving, host: DeformableDetrConfig | DinoConfig) -> nn.Module:
    """The attention that the interleaved encoder is told to use."""
    shape = (host.width, host.heads, host.levels, host.points)
    if not choice.key_aware:
        return DeformableAttention(*shape)
    return KeyAwareAttention(*shape, own_keys=choice.own_keys, shared_offsets=choice.shared_offsets)


def decoder_attention(key_aware: bool, host: DinoConfig) -> nn.Module:
    """The attention of DINO's decoder into the memory; keys and offsets there are as released, whatever the encoder's."""
    kind = KeyAwareAttention if key_aware else DeformableAttention
    return kind(host.width, host.heads, host.levels, host.points)


def start(module: nn.Module) -> None:
    """Xavier-uniform matrices everywhere but in both kinds of attention, which start as they say themselves."""
    xavier_linears(module)
    for child in module.modules():
        if isinstance(child, KeyAwareAttention):
            child.reset_parameters()
