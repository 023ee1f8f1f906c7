"""Which replica gets which request: an exact index of cached blocks, known loads, and one cost in seconds."""
