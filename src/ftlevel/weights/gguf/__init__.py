"""GGUF files: what llama.cpp computes for each family, its vocabularies, how they are written."""
