"""Limits, the queues, reservations, and the current policy and model names."""
