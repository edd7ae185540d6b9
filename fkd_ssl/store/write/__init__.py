"""Writes stores: precompute, recording, and their shared parts."""
