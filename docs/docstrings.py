"""Docstrings as they are written here (plain sentences, `code`, lists, indented formulas) in the markup that autodoc reads."""

import re

_CODE = re.compile(r"(``?[^`]+``?|(?<![\w*])\*(?=[^\s*])[^*\n]*[^\s*]\*(?![\w*]))")  # `code` and *stress*
_SPECIAL = re.compile(r"([\\*|<>]|(?<=\w)_(?!\w))")
_LEAD = re.compile(r"^(Raises|Returns|Yields|Source|Sources|Gradients flow[^:]*|Note): ")
_ITEM = re.compile(r"^([-*]|\d+\.) ")


def to_rst(lines):
    """The lines of one docstring in reStructuredText that cannot be misread: everything but `code` is escaped."""
    written = []
    for block in re.split(r"\n[ \t]*\n", "\n".join(lines).strip("\n")):
        if block.strip():
            written += [*_block(block.split("\n")), ""]
    return written


def _block(lines):
    if all(line.startswith(("    ", "\t")) for line in lines if line.strip()):
        return ["::", "", *lines]
    lead, rest = lines[0], lines[1:]
    if rest and lead.rstrip().endswith(":") and all(line.startswith("  ") for line in rest):
        return [
            _text(lead),
            "",
            "::",
            "",
            *(f"    {line.strip()}" if not line.startswith("    ") else line for line in rest),
        ]
    written = []
    for line in lines:
        if _ITEM.match(line.strip()):
            written += ["", f"- {_text(_ITEM.sub('', line.strip()))}"]
        elif written and written[-1].startswith(("- ", "  ")) and line.startswith(" "):
            written.append(f"  {_text(line.strip())}")
        else:
            if written and (_LEAD.match(line.strip()) or written[-1].startswith(("- ", "  "))):
                written.append("")
            written.append(_text(line.strip()))
    return written


def _text(line):
    lead = _LEAD.match(line)
    if lead:
        return f"**{lead[1]}:** {_text(line[lead.end() :])}"
    parts = _CODE.split(line)
    parts[::2] = [_SPECIAL.sub(r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [part if part[0] == "*" else f"``{part.strip('`')}``" for part in parts[1::2]]
    return _apart(parts)


def _apart(parts):
    """Code must be followed by something that is no letter."""
    line = ""
    for number, part in enumerate(parts):
        if number % 2 and line and (line[-1].isalnum() or line[-1] in "_"):
            line += "\\ "
        if not number % 2 and number and part and (part[0].isalnum() or part[0] == "_"):
            line += "\\ "
        line += part
    return line
