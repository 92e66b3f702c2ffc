"""Importing this makes PEFT know ftlevel's own tuners, for `PeftModel.from_pretrained`."""

from ftlevel.methods.peft_types import ensure_registered

ensure_registered()
