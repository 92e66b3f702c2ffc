"""`report`: HTML page about one or several runs; a training run writes one at its end."""
