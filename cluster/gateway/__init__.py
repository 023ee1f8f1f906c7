"""The OpenAI-compatible front: HTTP in, token ids to a backend, text out. Needs no Ray."""
