"""Fine-tune transformers efficiently: one grammar for every family, task and PEFT method."""

__version__ = "0.1.0"
