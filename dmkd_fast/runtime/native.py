"""Load the C++ extension, whose import registers the CPU kernels of all operators.

Without the extension, every operator runs its eager definition.
"""

from __future__ import annotations

import importlib

import torch as torch  # loads the shared libraries that the extension needs

INSTRUCTION_SET = "none"
WHY_MISSING = ""
try:
    INSTRUCTION_SET = importlib.import_module("dmkd_fast._C").instruction_set()
except ImportError as error:
    WHY_MISSING = str(error)
