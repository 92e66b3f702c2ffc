"""Flags, values and configuration files of other training tools."""
