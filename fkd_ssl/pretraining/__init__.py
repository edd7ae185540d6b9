"""Pretraining of a teacher on your own images, with modules of lightly."""
