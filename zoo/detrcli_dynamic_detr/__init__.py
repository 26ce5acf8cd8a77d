"""Dynamic DETR: End-to-End Object Detection with Dynamic Attention (Dai et al., ICCV 2021)."""
