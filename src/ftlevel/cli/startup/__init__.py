"""What happens before a command: imports without collection, heaps, further processes."""
