"""The page of ``kedit app``, in Gradio; what its buttons do stands in ``app_actions``."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from kedit_lightning.analysis.workbench import method_names
from kedit_lightning.cli.app_actions import ANSWERS, COMPARED, LEDGER, AppActions

#: What a new page shows, of facts that the packaged model knows.
EXAMPLE = {
    "prompt": "The sport of LeBron James is",
    "subject": "LeBron James",
    "target": "football",
    "neighbours": "The sport of Carmelo Anthony is\nThe sport of Hakeem Olajuwon is\n"
    "The sport of Karl Malone is\nMichelangelo died in",
}
_METHODS = ("ROME", "FTM", "GRACE")


def page_of(actions: AppActions) -> Any:
    """The page, not yet served."""
    gr: Any = import_module("gradio")
    names = method_names()
    with gr.Blocks(title="kedit", analytics_enabled=False) as page:
        gr.Markdown("# kedit\nWrite a fact into a language model, see what else changes, undo it.")
        state = gr.Textbox(label="Model", interactive=False, elem_id="state")
        said = gr.Textbox(label="What happened", interactive=False, lines=2, elem_id="said")
        with gr.Row():
            with gr.Column():
                prompt = gr.Textbox(
                    EXAMPLE["prompt"], label="Prompt, up to where the answer begins",
                    elem_id="prompt",
                )  # fmt: skip
                subject = gr.Textbox(
                    EXAMPLE["subject"], label="Subject, as the prompt has it", elem_id="subject"
                )
                target = gr.Textbox(EXAMPLE["target"], label="New answer", elem_id="target")
                method = gr.Dropdown(names, value="ROME", label="Method", elem_id="method")
            neighbours = gr.Textbox(
                EXAMPLE["neighbours"], lines=10, elem_id="neighbours",
                label="Neighbours: prompts whose answers should stay, one a line",
            )  # fmt: skip
        with gr.Row():
            ask = gr.Button("Ask", elem_id="ask")
            write = gr.Button("Write the fact", variant="primary", elem_id="write")
            undo = gr.Button("Undo the last edit", elem_id="undo")
        answers = _table(gr, ANSWERS, "Answers before and after", "answers")
        with gr.Tab("Ledger"):
            ledger = _table(gr, LEDGER, "Edits, the last one first", "ledger")
            with gr.Row():
                check = gr.Button("Ask all facts again", elem_id="check")
                fetch = gr.Button("Prepare the edit file", elem_id="fetch")
                file = gr.File(label="Edit file", interactive=False, visible=False, elem_id="file")
        with gr.Tab("Compare methods"):
            several = gr.Dropdown(
                names, value=list(_METHODS), multiselect=True, label="Methods", elem_id="several"
            )
            compare = gr.Button("Try the fact with each", elem_id="compare")
            trials = _table(gr, COMPARED, "Each alone; nothing is kept", "trials")
        with gr.Tab("Model and ledger folder"):
            with gr.Row():
                name = gr.Textbox(
                    actions.bench.base.name, label="nano, a folder, or a name on the hub",
                    elem_id="name",
                )  # fmt: skip
                load = gr.Button("Load the model", elem_id="load")
            with gr.Row():
                folder = gr.Textbox(label="Folder of a ledger", elem_id="folder")
                open_ = gr.Button("Open the ledger", elem_id="open")

        fields = [prompt, subject, target]
        one = {"concurrency_id": "model", "concurrency_limit": 1}  # it serves one call at a time
        changes = [
            write.click(actions.write, [*fields, method, neighbours], [said, answers], **one),
            undo.click(actions.undo, None, said, **one),
            load.click(actions.load, name, said, **one),
            open_.click(actions.open, folder, said, **one),
        ]
        ask.click(actions.ask, [prompt, neighbours], [said, answers], **one)
        check.click(actions.check, None, said, **one)

        def download() -> tuple[str, Any]:
            text, path = actions.download()
            return text, gr.update(value=path, visible=path is not None)

        fetch.click(download, None, [said, file], **one)
        compare.click(actions.compare, [*fields, several, neighbours], [said, trials], **one)
        for event in [page.load, *(change.then for change in changes)]:
            event(lambda: (actions.state(), actions.ledger()), None, [state, ledger], **one)
        for change in changes[1:]:  # the answers shown are no longer those of now
            change.then(lambda *given: actions.ask(*given)[1], [prompt, neighbours], answers, **one)
    return page


def _table(gr: Any, headers: list[str], label: str, id: str) -> Any:
    return gr.Dataframe(
        headers=headers, label=label, elem_id=id, interactive=False, wrap=True, datatype="str"
    )


def served(page: Any, host: str, port: int | None) -> str:
    """Serve the page to this machine's browser, offline, and give its address.

    Raises:
        OSError: The port is taken.
    """
    gr: Any = import_module("gradio")
    # Names alone: fonts of Gradio's own themes come from elsewhere.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        show_error=True,
        theme=theme,
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
    )
    return str(address)
