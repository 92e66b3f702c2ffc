"""What the commands do, each module reading top to bottom: train, generate, list targets."""
