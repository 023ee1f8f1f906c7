"""Who computes how many tokens in the next step. Standard library only."""
