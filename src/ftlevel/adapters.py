"""Register ftlevel's own tuners with PEFT on import, for `PeftModel.from_pretrained`."""

from ftlevel.methods import ensure_registered

ensure_registered()
