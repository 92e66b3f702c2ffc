"""Files that ftlevel writes: run directories, checkpoints, adapters, cards, reports, row files."""
