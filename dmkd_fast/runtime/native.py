"""Loads the C++ extension, whose import registers the CPU kernels of all operators.

Without it every operator runs its eager definition.
"""

from __future__ import annotations

import importlib

import torch as torch  # loads the libraries that the extension is linked against

INSTRUCTION_SET = "none"
WHY_MISSING = ""
try:
    INSTRUCTION_SET = importlib.import_module("dmkd_fast._C").instruction_set()
except ImportError as error:
    WHY_MISSING = str(error)
