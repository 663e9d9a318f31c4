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
_SECTION = re.compile(r"^(\w+):(?: *\{(.*)\}| +([^ {*].*))? *$")


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
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(commented(name))
    except FileExistsError:
        raise UserError(f"{path}: exists already; move it or work in another folder") from None
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror}); use another folder") from None
    return path


def commented(name: str) -> str:
    """Return the text of a shipped config with the meaning of each setting above it."""
    path = CONFIGS / f"{name}.yaml"
    job = path.stem if path.stem in ("denoiser", "fewstep") else "teacher"
    settings = reference.describe(job if path.parent.name == "pretrain" else "distill")
    texts = {setting.name: setting.text for setting in settings}
    texts |= {f"student.{key}": texts.get(f"teacher.{key}", "") for key in ("arch", "stem")}
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# yaml-language-server:"):
            continue
        match = _SECTION.match(line)
        if match is None or (match[2] is not None and "*" in match[2]):
            lines.append(line.replace(f"configs/{name}.yaml", f"{path.stem}.yaml"))
            continue
        key, fields = match[1], match[2]
        lines += ["", *_comment(texts.get(key, ""), "")]
        if fields is None:
            lines.append(line)
            continue
        lines.append(f"{key}:")
        for field, value in yaml_text.parse(f"{{{fields}}}").items():
            dumped = yaml_text.yaml.dump(
                {field: value}, Dumper=yaml_text._Dumper, default_flow_style=None, width=90
            )
            lines += [*_comment(texts.get(f"{key}.{field}", ""), "  "), f"  {dumped.rstrip()}"]
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _about(path: Path) -> str:
    """Return the first sentence or clause that the comments of a config begin with."""
    text = path.read_text(encoding="utf-8").splitlines()
    comments = [line.removeprefix("#").strip() for line in text if line.startswith("#")][1:3]
    return re.split(r"[.:;] ", " ".join(comments).removeprefix("Hardware: "))[0].rstrip(".;")
