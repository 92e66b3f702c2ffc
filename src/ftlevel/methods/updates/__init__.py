"""Methods that change every linear by a matrix, other than LoRA and AdaLoRA: a file each."""
