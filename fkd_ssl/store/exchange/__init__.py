"""Imports and exports FKD's published label files."""
