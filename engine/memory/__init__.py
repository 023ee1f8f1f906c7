"""The logical KV pool: which block holds what, for all ranks at once. Standard library only."""
