"""Small layers that every paper of the family takes as given."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


class LinearReLU(nn.Linear):
    """A linear layer and its ReLU."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu_()


class MLP(nn.Module):
    """Linear layers with ReLU between: the box head of DETR."""

    def __init__(self, in_features: int, hidden: int, out_features: int, num_layers: int) -> None:
        super().__init__()
        *inner, last = pairwise([in_features, *[hidden] * (num_layers - 1), out_features])
        self.layers = nn.ModuleList([*(LinearReLU(a, b) for a, b in inner), nn.Linear(*last)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation with constant statistics and affine, as every ResNet detector since Faster R-CNN fine-tunes it."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value, device=device, dtype=dtype))

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The layer as y = scale * x + shift, one pair a channel."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = (v.to(x.dtype)[:, None, None] for v in self.scale_and_shift())
        return torch.addcmul(shift, x, scale)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """The logit of x, with x and 1 - x kept at least `eps` each on its own (so 0 and 1 stay finite)."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))
