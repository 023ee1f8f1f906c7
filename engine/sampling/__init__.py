"""From logits to tokens: random numbers, logits processors, log-probabilities, the draw."""
