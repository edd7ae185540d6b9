"""Making stores: precompute, recording, and what they share."""
