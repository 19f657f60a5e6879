"""The command line: parse, call, print. A command imports heavy libraries itself, when it runs."""

from lora_align.cli.app import main

__all__ = ["main"]
