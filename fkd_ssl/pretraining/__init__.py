"""Pretraining of a teacher on one's own images, with lightly's parts."""
