"""Speculative decoding, the host half: who guesses, and how many guesses are worth their time."""
