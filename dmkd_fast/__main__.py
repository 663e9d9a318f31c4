"""Run the command line: `python -m dmkd_fast` is `dmkd`."""

from __future__ import annotations

import sys

from dmkd_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
