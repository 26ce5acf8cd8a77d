"""The console script `detr`."""

from detrcli.cli.app import main

__all__ = ["main"]
