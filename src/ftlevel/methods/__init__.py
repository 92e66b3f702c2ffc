"""PEFT methods: each module turns one spec of the config into one `peft` config."""
