"""Models: one decoder, one file of differences per family, and the checkpoints that they are read from."""
