"""Checking, repairing, copying and searching stores that are there."""
