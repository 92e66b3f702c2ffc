"""Where models come from, how they are loaded, and which of their modules can be adapted.

May import the task protocol, artifacts and what is below; no data, method or command.
"""

import logging

# bitsandbytes says on import that an optional kernel package is not installed: no news to a user.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
