"""What the commands do, each module reading top to bottom: train, generate, list targets."""

import logging

# bitsandbytes says on import that an optional kernel package is not installed: no news to a user.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
