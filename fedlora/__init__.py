"""The package that servers and institutions share.

Configuration, models, adapters, tasks, data, privacy accounting, the wire.
"""

__version__ = "0.2.0"
