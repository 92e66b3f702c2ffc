"""Importing this makes PEFT know ftlevel's own tuners, for `PeftModel.from_pretrained`."""

from ftlevel.methods import ensure_registered

ensure_registered()
