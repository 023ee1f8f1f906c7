"""Traces played against the real router, scheduler and autoscaler, with a step-time model in place of a device."""
