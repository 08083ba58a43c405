"""The words of a command: their parser, whose mistakes are one message that says what was meant."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from .._yaml import cut
from ..errors import ConfigError, closest

__all__ = ["Parser", "command_line"]

PACKAGE = Path(__file__).parents[1]
SCRIPTS = {
    "models": "list_models",
    "recipes": "list_recipes",
    "receptive-field": "receptive_field",
    "compare-runs": "compare_runs",
}
COMMANDS = {script: command for command, script in SCRIPTS.items()}
LAUNCHER = "; torch.distributed.launch passes it: take torchrun --nproc-per-node=N in its place"


def _is_script() -> bool:
    """Returns whether this process runs a file of scripts/, not the installed command or the package."""
    return sys.argv[0].endswith(".py") and Path(sys.argv[0]).resolve().parent != PACKAGE


def command_line(name: str) -> str:
    """Returns what to type to start another command, in the way in which this process was started.

    Args:
        name: of the command, `validate`.

    Returns:
        `python scripts/validate.py`, `python -m conv2former validate` or `conv2former validate`, with paths as needed.
    """
    started = Path(sys.argv[0])
    if _is_script():
        words = [_python(), str(started.with_name(f"{SCRIPTS.get(name, name)}.py"))]
    elif started.suffix == ".py":
        words = [_python(), "-m", "conv2former", name]
    else:
        found = shutil.which("conv2former") or ""
        is_elsewhere = started.stem == "conv2former" and os.path.realpath(found) != os.path.realpath(started)
        words = [_from_here(started) if is_elsewhere else "conv2former", name]
    return shlex.join(words)


def _python() -> str:
    """Returns the interpreter: below the working directory it is that of `make`, and no environment need be active."""
    path = _from_here(Path(sys.executable))
    return "python" if os.path.isabs(path) else path


def _from_here(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


class Parser(argparse.ArgumentParser):
    """argparse's, with errors as ConfigError, so that they are printed once, and with hints at what was meant.

    Args:
        name: of the command.
        text: what `--help` says, with commands as of a clone; they are shown as this process was started.
        sections: of the configuration, whose keys can be given as well; empty for all, None for no keys.
        meant: the keys that are meant by options of other programs, where the command differs from training.
    """

    def __init__(
        self,
        name: str | None = None,
        text: str | None = None,
        sections: Collection[str] | None = None,
        meant: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        if name and not _is_script():
            kwargs["prog"] = command_line(name)
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(
            **{"description": _as_started(text or ""), "formatter_class": formatter, "allow_abbrev": False, **kwargs}
        )
        self._sections, self._meant, self._words = sections, meant or {}, [""]

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's.

        Raises:
            ConfigError: the words are wrong; also if an unknown one is neither an option nor a key with a dot.
        """
        self._words = [*sys.argv[1:]] if args is None else [*args]
        known, rest = super().parse_known_args(self._words, namespace)
        if self._sections is not None and (unknown := self._unknown(rest)):
            self._raise_unknown(unknown)
        return known, rest

    def error(self, message: str) -> NoReturn:
        """Raises what argparse prints as a ConfigError, with a hint."""
        unknown = self._unknown(self._words)
        if message.startswith("unrecognized arguments") and unknown:
            raise ConfigError(f"{message}{self._hint(unknown)}")
        if unknown:
            self._raise_unknown(unknown)
        raise ConfigError(f"{message}{self._explanation(message)}")

    def _unknown(self, words: Iterable[str]) -> str:
        """Returns the first word that looks like an option and is neither one nor a key of the configuration."""
        for word in words:
            option, _, _ = word.partition("=")
            is_key = (self._sections is not None or self._subparsers) and "." in option
            if re.match(r"--?[a-zA-Z]", option) and option not in self._options() and not is_key:
                return word
        return ""

    def _options(self) -> set[str]:
        """Returns the options, those of the parsers inside too."""
        inside = [action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        parsers = [parser for choices in inside for parser in choices.values()]
        return {*self._option_string_actions, *(option for parser in parsers for option in parser._options())}

    def _raise_unknown(self, word: str) -> NoReturn:
        option = word.partition("=")[0]
        raise ConfigError(f"{cut(option)}: no such option{self._hint(option) or '; --help lists them'}")

    def _hint(self, word: str) -> str:
        option = word.partition("=")[0]
        plain = option.lstrip("-").replace("-", "_")
        if plain == "local_rank":
            return LAUNCHER
        key = self._meant.get(plain, "")
        if not key and self._sections is not None:
            with contextlib.suppress(ModuleNotFoundError):  # without pydantic the keys are not known
                from ..config.suggest import suggest_key

                key = suggest_key(option, self._sections)
        if key and not difflib.get_close_matches(option, self._options(), 1, 0.8):
            return f" (did you mean '{key}'?); a key is set by {key}=VALUE"
        return closest(option, sorted(self._options()))

    def _explanation(self, message: str) -> str:
        """Returns what argparse leaves out: how a missing option is given, which choice is near."""
        choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if choice:
            return closest(choice[1], re.findall(r"[\w-]+", choice[2])) if "maybe you meant" not in message else ""
        missing = re.match(r"the following arguments are required: (.*)", message)
        names = missing[1].split(", ") if missing else re.findall(r"^argument (\S+): expected [^,]*argument", message)
        actions = [self._option_string_actions[name] for name in names if name in self._option_string_actions]
        usual = [f"{action.option_strings[-1]} {action.metavar}" for action in actions if action.metavar]
        file = next((word for word in self._words if word.endswith((".yaml", ".yml"))), "FILE")
        return f"; write {' '.join(usual)}".replace("--config FILE", f"--config {file}") if usual else ""


def _as_started(text: str) -> str:
    """Returns the text of `--help` with its commands as this process was started."""
    if _is_script():
        return text
    text = re.sub(r"python scripts/(\w+)\.py", lambda m: command_line(COMMANDS.get(m[1], m[1])), text)
    text = re.sub(r"(torchrun (?:--\S+ )*)scripts/(\w+)\.py", r"\1-m conv2former \2", text)
    return re.sub(r"--config configs/(\S+)\.yaml", r"--config \1", text)
