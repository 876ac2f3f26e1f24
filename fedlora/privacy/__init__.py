"""Budgets: accounting, composition, the plan of a run, keyed noise, and a promise in odds.

Imports the room config.
"""
