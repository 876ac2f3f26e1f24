"""What servers and institutions share: configuration, models, adapters, tasks, data, privacy accounting, the wire."""

__version__ = "0.1.0"
