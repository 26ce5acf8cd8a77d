"""D²ETR: Decoder-Only DETR with Computationally Efficient Cross-Scale Attention (Lin et al., 2022)."""
