"""Lite DETR: An Interleaved Multi-Scale Encoder for Efficient DETR (Li et al., CVPR 2023)."""
