"""What was written: YAML of a bounded size, old names of keys, words of the field."""
