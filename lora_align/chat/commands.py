"""The commands of a chat, such as /w: their help, and how text from a pipe is recognised as commands."""

import re

HELP = """\
/w helpful=0.3          change a weight for the next answers; other weights stay
/w                      show the weights
/want a=0.8,b=-0.6      change the direction of a conditioned policy; /want shows it
/compare a=1 | a=-1     answer the last question at several weights side by side
/retry                  answer the last question again; after `chat --seed`, with the next seed
/undo                   remove the last question and its answer
/system TEXT            set the system message; without text, remove it
/save FILE              write the conversation: FILE.md as Markdown, any other as JSON
/help    /quit"""
EXIT = ("/quit", "/exit")
NAMES = ("w", "want", "compare", "retry", "undo", "system", "save", "help", "quit", "exit")
SCRIPT = re.compile(rf"^/(?:{'|'.join(NAMES)})(?:\s|\Z)", re.MULTILINE)


def is_script(text: str) -> bool:
    """Return whether any line of text from a pipe begins with a command."""
    return bool(SCRIPT.search(text))
