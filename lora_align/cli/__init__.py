"""The command line: parse, call, print. Anything heavy is imported by the command that needs it."""

from lora_align.cli.app import main

__all__ = ["main"]
