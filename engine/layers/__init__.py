"""Layers of a decoder. A layer owns its weights and the rule by which they are split over tensor ranks."""
