"""Command lines: a command's own options, and `--section.key VALUE` overrides of the config."""

import argparse
import difflib
from collections.abc import Sequence
from typing import NoReturn

from cmim.config import unknown_key
from cmim.errors import UserError
from cmim.settings import Config


class CommandLine(argparse.ArgumentParser):
    """An ArgumentParser whose help is the module's docstring and whose errors are one line.

    `parse(arguments)` returns (namespace, overrides), the overrides as `cmim.config.load_config` takes them.
    """

    def __init__(self, module: str, doc: str):
        super().__init__(
            prog=f"python -m {module}",
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def parse(self, arguments: Sequence[str] = ()) -> tuple[argparse.Namespace, list[str]]:
        own, overrides, words = [], [], list(arguments)
        while words:
            word = words.pop(0)
            key = word.removeprefix("--").partition("=")[0]
            if word.startswith("--") and ("." in key or key in Config.model_fields):
                overrides.append(word)
                # The next word is the value, even a negative number. `cmim.config` reports a missing one.
                if "=" not in word and words and not words[0].startswith("--"):
                    overrides.append(words.pop(0))
            else:
                own.append(word)
        namespace, rest = self.parse_known_args(own)
        unknown = [word for word in rest if word.startswith("-")]
        if unknown:
            word = unknown[0].partition("=")[0]
            nearest = difflib.get_close_matches(word, self._option_string_actions, 1, 0.75)
            self.error(f"unknown option {word}; did you mean {nearest[0]}?" if nearest else unknown_key(word.lstrip("-")))
        if rest:
            self.error(f"unexpected argument {rest[0]!r}")
        return namespace, overrides
