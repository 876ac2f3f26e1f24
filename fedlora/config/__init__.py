"""A run's configuration and an institution's settings: each key once, and the rules between keys.

Imports errors and files of fedlora only, and loads neither torch nor transformers.
"""
