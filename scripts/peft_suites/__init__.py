"""What `peft_suite.py` puts into PEFT's own test suite: rows of ours, models, and a plugin."""
