"""Line breaks between words on a terminal, for text that arrives in pieces."""

import re

TAB = 8  # columns between two tab stops


class Wrapper:
    """Break lines before a word that does not fit into `columns`. Longer words stay whole; 0 disables breaks."""

    def __init__(self, columns: int) -> None:
        self.columns, self.used = columns, 0
        self.blanks = self.word = ""
        self.too_long = False  # whether the current word exceeds a line

    def feed(self, text: str) -> str:
        """Take the next piece of a text. Return what can be written now: all but an unfinished last word."""
        if not self.columns:
            return text
        written = []
        for character in text:
            width = cell_width(character)
            if character.isspace():
                written += [self.flush(), self.put(character)]
                self.too_long = False
            elif self.too_long:
                written.append(self._place(character))
            elif width and (width > 1 or cell_width(self.word[:1]) > 1):  # a line may break next to wide characters
                written.append(self.flush())
                self.word = character
            else:
                self.word += character
                if width and cell_width(self.word) > self.columns:  # the word fits no line, so write it at once
                    written.append(self.flush())
                    self.too_long = True
        return "".join(written)

    def flush(self) -> str:
        """Return the unfinished word that `feed` held back."""
        word, self.word = self.word, ""
        return self.put(word) if word else ""

    def put(self, word: str) -> str:
        """Return the text to write for a word or a white-space character. Blanks are held back until the next word."""
        if not self.columns:
            return word
        if word == "\n":
            blanks, self.blanks, self.used = self.blanks, "", 0
            return blanks + word
        if word.isspace():
            self.blanks += word
            return ""
        width = cell_width(word)
        if width > self.columns and " " in word:  # a command that is longer than a line
            return "".join(map(self.put, re.findall(r"\S+|\s", word)))
        blanks, self.blanks = self.blanks, ""
        if "\t" in blanks:
            blanks = ("x" * self.used + blanks).expandtabs(TAB)[self.used :]
        if self.used + cell_width(blanks) + width > self.columns:
            end, self.used = "\n" if self.used else "", 0
            return end + self._place(word)
        return self._place(blanks + word)

    def _place(self, text: str) -> str:
        """Count the columns that a text uses, and return the text."""
        self.used = (self.used + cell_width(text) - 1) % self.columns + 1
        return text


def cell_width(text: str) -> int:
    """Return the width of text on a terminal; most East Asian characters and emoji take two cells."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)
