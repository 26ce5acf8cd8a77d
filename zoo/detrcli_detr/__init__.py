"""DETR: End-to-End Object Detection with Transformers (Carion et al., ECCV 2020)."""
