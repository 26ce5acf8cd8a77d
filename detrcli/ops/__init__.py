"""Deformable attention operators."""
