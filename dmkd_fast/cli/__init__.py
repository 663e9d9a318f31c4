"""The command line, `dmkd demo | init | distill | generate | evaluate | plan | ...`.

User errors end in one line on stderr and exit code 2. Ctrl-C ends with exit code 130 and a line
that says how to continue. Jobs end with a line of JSON. Under torchrun, only rank 0 prints all
this. Each verb imports what it needs, so that help does not wait for PyTorch.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any, TextIO, cast

from dmkd_fast.cli import verbs
from dmkd_fast.cli.parser import new_parser
from dmkd_fast.runtime.errors import UserError
from dmkd_fast.runtime.output.streams import GuardedStream, open_closed_streams

if TYPE_CHECKING:
    from dmkd_fast.runtime.distributed import Ranks

# Import names of the packages in the extra `distill`. A package that is missing but not listed is
# a bug.
_EXTRA = "diffusers timm torchvision huggingface_hub pydantic yaml rich PIL pyarrow"


def main(arguments: list[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    parser = new_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse rejects overrides that follow an option, so we collect them from `rest`.
    if not hasattr(options, "overrides") or any("=" not in a or a[0] == "-" for a in rest):
        rest and parser.error(f"unrecognized arguments: {' '.join(rest)}")
    else:
        options.overrides += rest
    if not hasattr(options, "verb"):
        parser.print_help()
        return 0
    open_closed_streams()
    out, err = GuardedStream(sys.stdout, "stdout"), GuardedStream(sys.stderr)
    with redirect_stdout(cast(TextIO, out)), redirect_stderr(cast(TextIO, err)), _logging():
        code = _run(options)
        if options.verb not in verbs.NO_PYTORCH and _ranks().world_size > 1:
            from dmkd_fast.runtime import distributed

            distributed.end_process(code)
    return code


def _run(options: argparse.Namespace) -> int:
    verb: Callable[[argparse.Namespace], dict[str, Any] | None] = options.verb
    result = None
    try:
        if verb not in verbs.NO_PYTORCH:
            _prepare_process(is_alone=verb not in (verbs.distill, verbs.generate))
        result = verb(options)
        if result:
            print(json.dumps(result))
        sys.stdout.flush()
    except KeyboardInterrupt:
        if verb is verbs.generate or _ranks().is_first:
            print("dmkd: stopped", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA.split():
            return _report(error, options, result)
        fix = "install what the command needs: pip install 'dmkd_fast[distill]'"
        print(f"dmkd: {package} is not installed; {fix}", file=sys.stderr)
        return 2
    except Exception as error:
        return _report(error, options, result)
    return int(getattr(options, "failed", False))


def _report(error: Exception, options: argparse.Namespace, result: dict[str, Any] | None) -> int:
    """Print an error and return the exit code; raise a bug again, with its traceback."""
    from dmkd_fast.runtime import distributed

    ranks = distributed.read()
    if isinstance(error, UserError | OSError):
        if options.traceback:
            traceback.print_exception(error)
        # Errors raised on every rank are printed by rank 0 only.
        if options.verb is verbs.generate or ranks.is_first or not distributed.is_agreed(error):
            print(f"dmkd: {' '.join(str(error).split())}", file=sys.stderr)
        if result:  # Standard output could not be written.
            print(json.dumps(result), file=sys.stderr)
        return 2
    if isinstance(error, distributed.LostRankError):
        print(f"dmkd: {error}", file=sys.stderr)
        return 1
    if ranks.world_size == 1:
        raise error
    # `main` ends the process of a rank at once, so Python would not print the traceback.
    traceback.print_exception(error)
    return 1


def _prepare_process(*, is_alone: bool) -> None:
    """Set the options of PyTorch for this process, which the command line owns.

    Raises:
        UserError: There are several ranks, and the verb runs as one process.
    """
    from dmkd_fast.runtime.device import keep_freed_memory, set_repeatable

    keep_freed_memory()
    set_repeatable()
    if is_alone and (count := _ranks().world_size) > 1:
        raise UserError(f"torchrun: got {count} ranks, expected one process; run it alone")


def _ranks() -> Ranks:
    from dmkd_fast.runtime import distributed

    return distributed.read()


@contextmanager
def _logging() -> Iterator[None]:
    """Print the warnings that the package logs, one line each."""
    handler = _Handler()
    logger = logging.getLogger("dmkd_fast")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Handler(logging.Handler):
    """Print records on the stderr of the moment, which a live view replaces by its own."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record in one line."""
        print(f"{record.levelname}: {record.getMessage()}", file=sys.stderr)
