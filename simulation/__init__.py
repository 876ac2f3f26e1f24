"""Simulations on one machine and on a Ray cluster."""
