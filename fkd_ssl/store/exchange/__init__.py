"""FKD's published label files: stores made of them, and such files of a store."""
