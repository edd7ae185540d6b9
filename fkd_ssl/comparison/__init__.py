"""Compares stored targets with other ways to train the same student: arms, costs, scores, report."""
