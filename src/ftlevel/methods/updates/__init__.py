"""Methods other than LoRA and AdaLoRA that update every linear layer."""
