"""How many replicas a model should have: a pure function of what they report, and its adapter for Ray Serve."""

from shoal.cluster.autoscaling.serve_policy import LatencyPolicy

__all__ = ["LatencyPolicy"]
