"""GGUF export: llama.cpp's architectures, tokenizer metadata, and the file writer."""
