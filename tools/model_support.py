"""Write docs/model_support.md: what module location finds in every causal language model.

Run ``python tools/model_support.py`` after an upgrade of transformers. It builds a tiny random
model of every type that transformers registers and edits it with FT-M and ROME; nothing is
downloaded, and it takes some ten minutes.
"""

from __future__ import annotations

import sys
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "model_support.md"

if TYPE_CHECKING:
    from edit_survey import Uptake
    from tiny_decoders import Finding

HEAD = """# Which models can be edited

Module location goes by structure, not by names. This table says what it finds in a tiny random
model of each of the {count} types that transformers {version} registers as causal language models:
in {located} every block has an MLP, experts or a mixer that can be edited, in {partly} some blocks
have, {refused} are refused with a reason, and {unbuilt} could not be built as tiny models. Written
by `python tools/model_support.py`; do not edit it by hand.

The write path says how a change of the down projection reaches the block's output: added as a
scaled copy (with its gain in the tiny model, which the configuration may set), or *normalised or
gated*, so that no single factor describes it. In a mixture of experts, the dense layers and the
shared experts are located, and in blocks without them the routed experts (`…experts.down_proj`,
`…experts.mlp.w2`, `…output_linear.weight`), which FTM and the closed-form methods edit, and which
LoRA trains where `target_modules` names them (but for those of dbrx). Where no block has an MLP of
its own, FTM and the closed-form methods edit what state-space mixers write (`…mixer.out_proj`,
`…mamba.out_proj`); other methods refuse.

| model type | blocks | down projection | write path |
|---|---|---|---|
"""
REFUSED = """
## Refused

Methods that edit weights refuse these with the reason; IKE, which edits none, works on them.

| reason | model types |
|---|---|
"""
UNPADDED = """
## Without padding

These ignore the attention mask, or count positions from the first column, so that padding before a
row would change its answer: free answers are given to rows of one length together, or to each row
alone. It costs time and changes nothing.

| model types |
|---|
"""
UNBUILT = """
## Not built

These may work; no tiny model of them runs on text alone.

| model type | reason |
|---|---|
"""
TAKEN = """
## FT-M and ROME

{about}

{kinds}

| model type | FT-M | ROME |
|---|---|---|
"""
ABOUT = """\
What the two do with one fact in a tiny random model of each type: {layers} blocks, matrices
{scale:g} times as large as at their usual start, so that blocks matter; projections that start at
zero or at more than twice the usual standard deviation of {start:g} are brought to it before. An
edit *takes* if the target's logit rises by one standard deviation of all logits or to the top, if
every logit is bit for bit what it was once the edit is rolled back, and if what ROME changes where
it writes is within 1 % of what it planned. All types have the same settings, but for ROME on {own}.
Of {built} types that could be built {both} take both edits, {share:.1%}:"""
HELD = """
## Quantised and offloaded

Edits act beside quantised weights, as hooks in float32, so that every method edits them and every
edit is rolled back bit for bit. What cannot be done is to write an edit into such weights:
`edit.materialise()` and `save_pretrained` refuse and name the kind, and
`edit.materialise(dequantise=True)` writes a plain model instead. Learned networks and key
statistics of a checkpoint serve it in every precision; an edit is bound to the precision that it
was computed in. `tests/contracts/test_held_models.py` runs these on a tiny Llama, on the CPU, with
FTM, ROME, MEMIT, MEND, GRACE, IKE and LoRA; `by hand` are those whose packages the tests do not
install, run with the same methods on 2026-11-29:

| held as | package | an edit | written into weights |
|---|---|---|---|
| `quantization: 8bit` | bitsandbytes 0.50.2 | lifts its target alike | dequantised |
| `quantization: 4bit` | bitsandbytes 0.50.2 | lifts its target alike | dequantised |
| int8 weights | torchao 0.18.0 | lifts its target alike | dequantised |
| int8 weights | optimum-quanto 0.2.7 | lifts its target alike | dequantised |
| 8 bit, groups of 64 | hqq 0.2.8.post1, by hand | lifts its target alike | dequantised |
| 4 bit, GPTQ | gptqmodel 7.7.0, by hand | lifts its target alike | dequantised |
| 4 bit, AWQ | gptqmodel 7.7.0, by hand | lifts its target alike | dequantised |
| int8, packed | compressed-tensors 0.20.1, by hand | lifts its target alike | dequantised |
| `device_map`, `cpu_offload`, `disk_offload` | accelerate 1.15.0 | lifts its target alike | yes |

On processors with bfloat16 kernels, bitsandbytes packs 4-bit weights for the host in the first pass
without gradients, which rounds their scales and ends all gradients: they are kept from it.

Transformers 5.23 loads no HQQ model, so `hqq` quantised the loaded one. compressed-tensors unpacks
its weights in the first pass, and they are plain from then on. Projections are recognised by
`in_features` and `out_features`; a weight is read through the module's `dequantize_weight` or
`dequantize`, and refused by the name of its kind where it has neither.
"""
VISION = """
## Pictures

`BaseModel(model, tokenizer, processor=processor)`, and `BaseModel.load` of a folder or name with
a processor, read pictures: a path, a URL, bytes or a Pillow image, one or several, beside
text-only rows. The processor makes the tokens, the model's own `get_image_features` the visual
features, which are computed once for each picture. Edits act on the language tower; text-only
rows are those of the text model. BLIP-2 computes nothing of its own behind the Q-Former, so that
the language model inside is the base model: edits name its modules, and an export writes it alone.
A video stands for eight of its frames (`clip.mp4#frames=4` for four). Tiny random models are
compared with direct calls, and edited (`tests/base_models/test_vision_families.py`):

| model type | rows with pictures | FT-M | remarks |
|---|---|---|---|
| llava | as direct calls | takes | ROME takes |
| llava_onevision | as direct calls | takes | |
| qwen2_vl | as direct calls | takes | ROME takes; positions of three dimensions |
| qwen2_5_vl | as direct calls | takes | positions of three dimensions |
| qwen3_vl | as direct calls | takes | positions of three dimensions, features for several layers |
| gemma3 | as direct calls | takes | pictures are read in both directions |
| paligemma | as direct calls | takes | prompts are read in both directions |
| internvl | as direct calls | takes | |
| idefics3 | as direct calls | takes | |
| blip-2 (OPT) | as direct calls | takes | one picture a prompt; `base.model` is the decoder |
| blip-2 (T5) | as direct calls | refused | MEND takes; one picture a prompt |
| mllama | as direct calls | takes | by cross-attention; free answers use no key-value cache |
| MiniGPT-4 | not loaded | | its checkpoints hold one projection; transformers has no class for it |

The packaged `shapes` is a tiny LLaVA that knows drawn shapes: `kedit test -c methods/grace -c
data/shapes --model.base_model shapes` edits facts about drawings, `notebooks/pictures.ipynb` shows
some, and `benchmarks/RESULTS.md` compares six editors on them.

With `--data.num_workers 2`, two processes open the pictures of the next records and run the image
part of the processor on them; the text part stays with the model, as applied edits may rewrite
prompts. With a CLIP processor at 336 pixels on two shared cores, a record of two questions about
a photograph of 640 × 480 kept the main process 49 ms without workers and 17 ms with two; of 4000
× 3000, 679 and 329 ms.

Processors that read videos too (llava_onevision, qwen2_vl, qwen2_5_vl, qwen3_vl, internvl) need
torchvision: `pip install 'kedit-lightning[vision]'`. The text editors that read pictures are FTM,
FTL, LocFTBF, LoRA and its relatives, the closed-form methods and UltraEdit, the hypernetworks,
GRACE, WISE, MEMOIR, DEFER, MELO, SERAC, AnyEdit, UnKE, and IKE, ICE and PROMPT, which state a
fact in words: facts about the very picture that is asked about first, then those in the most
similar words. The others refuse requests with a picture in a sentence. SERAC's scope reads the
base model's hidden states at tokens of picture and text; its counterfactual model is told the
fact and does not see, and a language model in its place (`counterfactual`) is refused for
requests with a picture.
"""


def _cell(text: str, limit: int = 160) -> str:
    text = text.replace("|", "\\\\|")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _row(finding: Finding) -> str:
    paths = [
        f"linear, gain {path.gain:.3g}" if path.is_linear else "normalised or gated"
        for path in finding.paths
    ]
    paths = paths if len(set(paths)) > 1 else paths[:1]
    places = ", ".join(f"`{place}`" for place in finding.places)
    found, total = finding.layers
    blocks = "all" if found == total else "some"
    return f"| {finding.kind} | {blocks} | {places} | {', '.join(paths)} |\n"


def _outcome(kind: str, uptake: Uptake) -> str:
    reason = uptake.reason.replace("|", "\\|")
    if uptake.verdict == "refused":
        reason = reason.partition(", so methods")[0].partition("; use IKE")[0]
        reason = reason.partition(f"of model type '{kind}' ")[2] or reason
    return uptake.verdict + (f": {_cell(reason, 200)}" if reason else "")


def taken(
    uptakes: Mapping[str, Sequence[Uptake]],
    layers: int,
    scale: float,
    start: float,
    own: Mapping[str, Mapping[str, Any]],
) -> str:
    """The section about what ``edit_survey.uptakes`` gives for each type that could be built.

    Args:
        uptakes: What it gives, by type.
        layers: Number of blocks of the models.
        scale: How much larger than at their start matrices are.
        start: Standard deviation that they usually start with.
        own: Settings of ROME that single types need, by type.
    """
    named = [f"{kind} ({', '.join(f'{k} {v:g}' for k, v in own[kind].items())})" for kind in own]
    both = [k for k, pair in uptakes.items() if all(u.verdict == "takes" for u in pair)]
    about = ABOUT.format(
        layers=layers,
        scale=scale,
        start=start,
        own=" and ".join(named),
        built=len(uptakes),
        both=len(both),
        share=len(both) / len(uptakes),
    )
    filled = (
        textwrap.fill(words, 100, break_on_hyphens=False)
        for words in (about, f"{', '.join(both)}.")
    )
    text = TAKEN.format(about=next(filled), kinds=next(filled))
    for kind, pair in uptakes.items():
        if kind not in both:
            text += f"| {kind} | {' | '.join(_outcome(kind, uptake) for uptake in pair)} |\n"
    return text


def page(findings: Sequence[Finding], taken: str) -> str:
    """The Markdown page about the findings of ``tiny_decoders.survey``, and what edits do."""
    of = {
        verdict: [finding for finding in findings if finding.verdict == verdict]
        for verdict in ("located", "in part", "refused", "not built")
    }
    text = HEAD.format(
        count=len(findings),
        version=version("transformers"),
        located=len(of["located"]),
        partly=len(of["in part"]),
        refused=len(of["refused"]),
        unbuilt=len(of["not built"]),
    )
    text += "".join(_row(finding) for finding in findings if finding.places)
    reasons: dict[str, list[str]] = {}
    for finding in of["refused"]:
        reasons.setdefault(_reason(finding), []).append(finding.kind)
    text += REFUSED + "".join(f"| {why} | {', '.join(kinds)} |\n" for why, kinds in reasons.items())
    unpadded = ", ".join(finding.kind for finding in findings if not finding.reads_mask)
    text += UNPADDED + f"| {unpadded} |\n"
    text += UNBUILT + "".join(f"| {f.kind} | {_cell(f.reason)} |\n" for f in of["not built"])
    return text + taken + HELD + VISION


def _reason(finding: Finding) -> str:
    """The reason without the number of the block and the ways out."""
    said = finding.reason.partition(", so methods")[0].partition("; use IKE")[0]
    return said.partition(f"of model type '{finding.kind}' ")[2] or said


def main() -> None:
    """Survey all types and write the page."""
    warnings.simplefilter("ignore")  # what models of other libraries say about tiny settings
    sys.path.insert(0, str(ROOT / "tests"))
    import edit_survey
    import tiny_decoders
    from rich.progress import track
    from transformers.utils import logging

    logging.set_verbosity_error()
    findings = [
        tiny_decoders.survey(kind) for kind in track(tiny_decoders.kinds(), "Surveying model types")
    ]
    failed = {finding.kind: finding.reason for finding in findings if finding.verdict == "failed"}
    if failed:
        raise SystemExit(f"the page is not written, since location failed: {failed}")
    built = [finding.kind for finding in findings if finding.verdict != "not built"]
    uptakes = {kind: edit_survey.uptakes(kind) for kind in track(built, "Editing model types")}
    section = taken(uptakes, *edit_survey.ABOUT)
    PAGE.write_text(page(findings, section), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
