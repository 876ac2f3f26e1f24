"""Orders and updates as messages: typed, and as records of Flower. Record keys stand here only.

Imports the rooms config, models, privacy and secure.
"""
