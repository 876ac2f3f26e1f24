"""Secure aggregation: terms, messages, masks, shares of secrets and of noise.

Imports the rooms config and privacy.
"""
