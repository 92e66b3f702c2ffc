"""Prepare adapters for inference servers and check their outputs; must not import the formats."""
