"""Additions to PEFT's test suite for `peft_suite.py`: our tuners, tiny models, a plugin."""
