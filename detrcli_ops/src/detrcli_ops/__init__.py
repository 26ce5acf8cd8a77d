"""Native kernels for deformable and key-aware deformable attention, as `torch.ops.detrcli_ops.*`."""

from detrcli_ops import _C, autocast, autograd, fake
from detrcli_ops._C import isa, use_isa

__all__ = ["_C", "autocast", "autograd", "fake", "isa", "use_isa"]
