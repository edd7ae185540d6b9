"""Stored targets against other ways to train the same student: the arms, what they cost and score, and the report."""
