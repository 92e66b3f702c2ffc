"""Optional parts of ftlevel, registered through entry points; the core never imports them.

Each subpackage defines `EXTENSION`; see `ftlevel.extensions`. An extra may import the core, and
other extras that it builds on.
"""

import ftlevel.config  # noqa: F401 - first, because it loads the sections of the extras
