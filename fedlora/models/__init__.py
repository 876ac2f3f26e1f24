"""The base model and what is trained on it: loading, adapters, encoders, tasks, merging.

Imports the rooms config, data and gradients.
"""
