"""Stored weights: safetensors and GGUF behind one protocol, read slice by slice."""
