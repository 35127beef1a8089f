"""``kedit app``: a page in the browser to edit a model in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

from kedit_lightning.cli.messages import UsageError, UsageParser
from kedit_lightning.errors import MissingExtraError
from kedit_lightning.runs.results import tell

USAGE = "kedit app [--base_model MODEL] [--ledger DIR] [--port PORT] [--host HOST]"
HELP = f"""\
usage: {USAGE}

Open a page to edit a model in: type a fact, choose a method, see the answer before and after beside
neighbours that should stay, undo it, compare methods on it, list the ledger, and download the edit
as a file. Everything stays on this machine; the page works without a network.

  --base_model MODEL   nano (the packaged model, taken if none is named), a folder, or a name on the
                       Hugging Face hub
  --ledger DIR         go on with this ledger, or begin one there; without, edits are kept in a
                       temporary folder until the command ends
  --port PORT          a free one from 7860 on if not given
  --host HOST          127.0.0.1: this machine alone. With 0.0.0.0 whoever reaches this machine can
                       use the page, which opens folders of ledgers and models

examples:
  kedit app
  kedit app --base_model gpt2 --ledger edits/
"""


def run_app(arguments: Sequence[str]) -> str:
    """Serve the page until Ctrl-C.

    Raises:
        UsageError: The arguments do not fit, or the port is taken.
        MissingExtraError: Gradio is not installed.
        KEditError: The model or the ledger cannot be loaded.
    """
    if {"-h", "--help"} & set(arguments):
        return HELP
    parser = UsageParser(USAGE)
    parser.add_argument("--base_model")
    parser.add_argument("--ledger")
    parser.add_argument("--port", type=int)
    parser.add_argument("--host", default="127.0.0.1")
    given = parser.parse_args(list(arguments))
    if find_spec("gradio") is None:
        raise MissingExtraError("the page needs Gradio: pip install 'kedit-lightning[app]'")
    # Read when Gradio is imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    bench = import_module("kedit_lightning.analysis.workbench").Workbench(
        given.base_model or "nano", given.ledger
    )
    pages = import_module("kedit_lightning.cli.app_page")
    actions = import_module("kedit_lightning.cli.app_actions").AppActions(bench)
    page = pages.page_of(actions)
    try:
        address = pages.served(page, given.host, given.port)
    except OSError as error:
        port = "ports 7860 to 7959" if given.port is None else f"port {given.port}"
        raise UsageError(
            f"the page cannot be served at {given.host}, {port}: taken, or no address of this "
            "machine; name another --port or --host"
        ) from error
    tell(f"the page is at {address} ({actions.state()}); Ctrl-C ends it")
    try:
        page.block_thread()
    finally:
        page.close()
    return ""
