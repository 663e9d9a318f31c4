"""List the configs that the package ships, and copy one with a comment on every setting."""

from __future__ import annotations

import difflib
import re
import textwrap
from pathlib import Path

from dmkd_fast import assets
from dmkd_fast.config import reference, yaml_text
from dmkd_fast.runtime.errors import UserError, invalid

CONFIGS = assets.ROOT / "configs"
_SECTION = re.compile(r"(\w+):(?: *\{(.*)\} *$)?")
_FIELD = re.compile(r"  (\w+):")


def shipped() -> dict[str, str]:
    """Return the name of each shipped config with one line about it."""
    paths = sorted(CONFIGS.rglob("*.yaml"), key=lambda path: (len(path.parts), path))
    found = {str(path.relative_to(CONFIGS).with_suffix("")): path for path in paths}
    return {name: _about(path) for name, path in found.items()}


def init(name: str, folder: Path) -> Path:
    """Write a shipped config with comments into a folder, and return the new file.

    Raises:
        UserError: There is no such config, or the file exists or cannot be written.
    """
    known = shipped()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        raise invalid(
            "NAME", repr(name), f"one of {', '.join(known)}", f"try {close[0]}" if close else ""
        )
    path = folder / f"{Path(name).name}.yaml"
    write_new(path, commented(name))
    return path


def write_new(path: Path, text: str) -> None:
    """Write a file that does not exist yet.

    Raises:
        UserError: It exists or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            try:
                file.write(text)
                file.flush()
            except BaseException:
                path.unlink(missing_ok=True)  # half a file would be in the way of the next attempt
                raise
    except FileExistsError:
        raise UserError(f"{path}: exists already; move it or work in another folder") from None
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror}); use another folder") from None


def commented(name: str) -> str:
    """Return the text of a shipped config with the meaning of each setting above it."""
    path = CONFIGS / f"{name}.yaml"
    job = path.stem if path.stem in ("denoiser", "fewstep") else "teacher"
    text = path.read_text(encoding="utf-8").replace(f"configs/{name}.yaml", f"{path.stem}.yaml")
    return with_comments(text, job if path.parent.name == "pretrain" else "distill")


def with_comments(text: str, job: str) -> str:
    """Return the text of a config of a job with the meaning of each setting above it."""
    texts = {setting.name: setting.text for setting in reference.describe(job)}
    lines, section = [], ""
    for line in text.splitlines():
        if found := _SECTION.match(line):
            section = found[1]
            lines += ["", *_comment(texts.get(section, ""), "")]
        if found and found[2] is not None and "*" not in found[2]:
            lines.append(f"{section}:")
            for field, value in yaml_text.parse(f"{{{found[2]}}}").items():
                lines += _comment(texts.get(f"{section}.{field}", ""), "  ")
                lines.append(f"  {field}: {yaml_text.dump_flow(value)}")
            continue
        if found := _FIELD.match(line):
            lines += _comment(texts.get(f"{section}.{found[1]}", ""), "  ")
        if not line.startswith("# yaml-language-server:"):
            lines.append(line)
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: str) -> list[str]:
    start = f"{indent}# "
    return textwrap.wrap(
        text, 100, initial_indent=start, subsequent_indent=start, break_on_hyphens=False
    )


def _about(path: Path) -> str:
    """Return what the second line of a config says, up to the end of its first sentence."""
    line = path.read_text(encoding="utf-8").splitlines()[1]
    return re.split(r"[.;:] ", line.removeprefix("# ").removeprefix("Hardware: "))[0].rstrip(".:")
