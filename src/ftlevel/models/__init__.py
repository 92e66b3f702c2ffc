"""Model sources, loading, quantization and adaptable modules.

May import the task interface and artifacts, but no data, methods or commands.
"""

import logging

# On import, bitsandbytes warns about a missing optional kernel package.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
