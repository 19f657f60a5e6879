"""The commands of a chat, such as /w: their help, and how text from a pipe is recognised as commands."""

import re

HELP = """\
/w helpful=0.3          change a weight for the next answers; other weights stay
/w                      show the weights
/want a=0.8,b=-0.6      change the direction of a conditioned policy
/compare a=1 | a=-1     answer the last question at several weights side by side
/retry                  answer the last question again; after `chat --seed`, with the next seed
/undo                   remove the last question and its answer
/system TEXT            set the system message; without text, remove it
/save FILE              write the conversation: FILE.md as Markdown, any other as JSON
/help    /quit"""
NAMES = re.findall(r"(?:^| {4})/(\w+)", HELP, re.MULTILINE)
SCRIPT = re.compile(rf"\A/[a-z]+(?:\s|\Z)|^/(?:{'|'.join(NAMES)})(?:\s|\Z)", re.MULTILINE)


def is_script(text: str) -> bool:
    """Return whether text from a pipe holds commands: its first line begins with a word such as /w, or any line with
    a known command.
    """
    return bool(SCRIPT.search(text))
