"""The ``kedit`` command.

Help and version are printed at once: the parser is imported only when there are options to parse.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NoReturn

from kedit_lightning import __version__
from kedit_lightning.cli.help_pages import caching, help_page, saved_help
from kedit_lightning.errors import KEditError, one_line
from kedit_lightning.notices import without_notices
from kedit_lightning.registry import lazy_exports, load_plugins

HELP = """\
usage: kedit <command> [options]

Knowledge editing of language models: change what a model says about a fact, see what else the
change did, and undo it. The weights of the model are never written to.

commands:
  fit       learn once what later edits share: a hypernetwork, or statistics of keys
  edit      compute edits for requests, show answers before and after, and save the edits
  test      run a benchmark under a protocol, and report scores with confidence intervals
  validate  the same on the validation split
  predict   answer prompts with and without saved edits

also:
  data [NAME] PATH [--model MODEL] [--limit N]
            say what a file of facts holds: records, probes, duplicates, conflicts, lengths
  compare RUN RUN ... [--output DIR] [--groups]
            put finished runs side by side, with intervals, and say which cannot be told apart
  convert FILE [--output FILE]
            write the config, or the file of facts, that one of EasyEdit becomes here, and say what
            became of each key
  reproduce RUN [--output DIR] [--tolerance 1e-5]
            repeat a finished run with its own config, and compare it number by number
  log | check LEDGER, show | revert LEDGER ID, replay LEDGER [--drop ID], blame LEDGER PROMPT,
  diff LEDGER A B, export LEDGER FOLDER
            the edits that `kedit edit --ledger LEDGER` has written: list them, ask their facts
            again, take one out, compute them again, find those that touch an answer, compare
            states, and write the edited model
  sweep FILE [-c CONFIG] [--trials N] [options of test]
            try settings of a method on validation data, by workers that share a storage, and keep
            the best; `kedit sweep --help` shows what stands in FILE
  app [--base_model MODEL] [--ledger DIR]
            open a page in the browser to edit a model in
  metrics   say what the names of scores mean, such as tf_all
  tasks     list the tasks: data, metrics and settings of methods that belong together
  completion bash|zsh|fish
            print a script by which a shell completes options; it takes some seconds

options:
  -h, --help      show this; `kedit <command> --help` shows what a command takes (--help-all
                  with all of Lightning), `kedit <command> --model.help ROME` what a method takes
  --version       show the version
  -c NAME         a config: a file, or a packaged one such as methods/rome or tasks/truthfulness;
                  several compose, and options behind it override it
  --ability TASKS of `edit`, and of `test` in sequential mode: tasks of lm-eval, or YAML files of
                  your own, before and after the edits, paired by document
  --canary warn|stop|rollback
                  of the same: watch the model as edits join it, and end a stream that ruins it

examples:
  kedit edit -c methods/rome --model.base_model nano --data Requests \\
      --data.prompt "The sport of LeBron James is" --data.subject "LeBron James" \\
      --data.target_new football --output run/
  kedit predict -c methods/rome --model.base_model nano --edits run/ \\
      --prompt "LeBron James plays"
  kedit test -c methods/memit -c data/counterfact --model.base_model gpt2-xl \\
      --trainer.protocol.mode sequential --trainer.protocol.chunk_size 100 --output scores/
  kedit test -c tasks/truthfulness -c methods/dola --data.path TruthfulQA.csv \\
      --model.base_model gpt2-xl
  kedit test --resume scores/
"""

#: Commands that print a text and run nothing: their modules, and the functions in them.
REPORTS = {
    "app": ("app_command", "run_app"),
    "blame": ("ledger_commands", "blame_edits"),
    "check": ("ledger_commands", "check_ledger"),
    "compare": ("run_comparison", "run_comparison"),
    "convert": ("run_conversion", "run_conversion"),
    "data": ("data_report", "data_report"),
    "diff": ("ledger_commands", "diff_states"),
    "export": ("ledger_commands", "export_ledger"),
    "log": ("ledger_commands", "log_lines"),
    "replay": ("ledger_commands", "replay_lines"),
    "reproduce": ("run_reproduction", "run_reproduction"),
    "revert": ("ledger_commands", "revert_line"),
    "show": ("ledger_commands", "show_line"),
    "sweep": ("sweep_command", "run_sweep"),
}

#: Commands that print what is known, in the same form.
LISTS = {
    "metrics": ("metric_glossary", "metric_glossary"),
    "tasks": ("task_arguments", "task_list"),
}

#: What gloo and NCCL say when a process waits for another one that has ended.
_LOST_PROCESS = ("Connection closed by peer", "Connection reset by peer", "remote process exited")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Inside, Ctrl-C ends the process in one line; runs say more themselves."""
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write("interrupted while no run was under way\n")
        raise SystemExit(130) from None


@_interruptible()
def main(args: Any = None, run: bool = True) -> Any:
    """Run the command line.

    A :class:`KEditError` becomes one sentence and exit code 2; a bug keeps its traceback.

    Args:
        args: Arguments instead of those of the process: a list, or a dictionary.
        run: Run the subcommand; without, there is none, and objects are only built.

    Returns:
        The command line object (``model``, ``datamodule``, ``trainer``) if arguments were given.
    """
    arguments = sys.argv[1:] if args is None else args
    if run and arguments in ([], ["-h"], ["--help"]):
        _leave(HELP, 0 if arguments else 2)
    if arguments == ["--version"]:
        _leave(f"kedit {__version__}\n", 0)
    if run and arguments and arguments[0] in LISTS:
        if set(arguments[1:]) - {"-h", "--help"}:
            sys.stderr.write(
                f"error: kedit {arguments[0]} takes no arguments, got {arguments[1:]}\n"
            )
            raise SystemExit(2)
        load_plugins()
        name, function = LISTS[arguments[0]]
        _leave(getattr(import_module(f"kedit_lightning.cli.{name}"), function)(), 0)
    if run and arguments and arguments[0] in REPORTS:
        name, function = REPORTS[arguments[0]]
        with _errors_in_one_line(), without_notices():
            load_plugins()
            module = import_module(f"kedit_lightning.cli.{name}")
            report = getattr(module, function)(arguments[1:])
        _leave(report, 0)
    page = help_page(arguments) if args is None and run else None
    if page is not None:
        if text := saved_help(page):
            _leave(text, 0)
        sys.stderr.write(f"The first help takes a few seconds; it is kept in {page.parent}.\n")
    if args is None and not sys.stderr.isatty():
        # A log would keep each line of the progress bars of loading weights.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Lightning 2.6 calls what jsonargparse has deprecated, which a user can do nothing about.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    with _errors_in_one_line():
        parser = import_module("kedit_lightning.cli.parser")
        if args is None:  # importing Lightning has set a format of its own
            warnings.formatwarning = _warning
        with caching(page), without_notices():
            settings = parser.cli_arguments(args, run, names_alone=page is not None)
            command_line = parser.KEditCLI(**settings)
    return None if args is None else command_line


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Inside, a :class:`KEditError` ends the process in a sentence; a bug keeps its traceback."""
    try:
        yield
    except Exception as error:
        cause: KEditError | None = import_module("kedit_lightning.cli.messages").kedit_error(error)
        if cause is None and any(words in str(error) for words in _LOST_PROCESS):
            # It has said why it ended; the traceback of one that waited for it says nothing.
            cause = KEditError("another process of this run has ended, so this one ends too")
        if cause is None:
            raise
        sys.stderr.write(f"error: {one_line(cause)}\n")
        raise SystemExit(cause.exit_code) from error


def _leave(text: str, code: int) -> NoReturn:
    sys.stdout.write(text)
    raise SystemExit(code)


def _warning(message: Warning | str, *_: Any, **__: Any) -> str:
    """Format a warning without the line of code that raised it."""
    return f"warning: {message}\n"


#: ``KEditCLI`` is imported on first use.
__getattr__ = lazy_exports(None, {"KEditCLI": "kedit_lightning.cli.parser"})

if __name__ == "__main__":
    main()
