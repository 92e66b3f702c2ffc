"""Where models come from, how they are loaded, and which of their modules can be adapted."""
