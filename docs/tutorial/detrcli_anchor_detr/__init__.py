"""Anchor DETR: Query Design for Transformer-Based Object Detection (Wang et al., AAAI 2022)."""
