"""Layers shared by every family."""
