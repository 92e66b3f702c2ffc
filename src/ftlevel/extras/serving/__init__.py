"""Adapters for model servers: export formats, reference answers, and `check-served`."""
