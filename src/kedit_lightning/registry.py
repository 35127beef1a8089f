"""The registry: one entry for each method, dataset, metric and callback.

Lists, lazy exports, names of configs and tables of the documentation are derived from these entries
or checked against them.  A plug-in adds its own with :func:`register`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Literal, TypeAlias, get_args

Kind: TypeAlias = Literal["method", "dataset", "metric", "callback"]

#: The entry-point group in which other packages name their plug-ins.
PLUGINS = "kedit_lightning.plugins"


@dataclass(frozen=True)
class Entry:
    """A class that can be named on the command line.

    Args:
        kind: What it is.
        name: Class name, as papers and configs have it.
        module: Module that defines the class.
        summary: What it is, in a few words; the cell of the table in the documentation.
        config: Name of its packaged config, such as ``methods/rome``; empty without one.
    """

    kind: Kind
    name: str
    module: str
    summary: str
    config: str = ""

    def load(self) -> Any:
        """Import the class."""
        return getattr(import_module(self.module), self.name)


_ENTRIES: dict[Kind, dict[str, Entry]] = {kind: {} for kind in get_args(Kind)}


def register(entry: Entry) -> Entry:
    """Add an entry; one of the same kind and name is replaced."""
    _ENTRIES[entry.kind][entry.name] = entry
    return entry


def unregister(entry: Entry) -> None:
    """Remove an entry, such as one of a plug-in."""
    del _ENTRIES[entry.kind][entry.name]


def entries(kind: Kind) -> dict[str, Entry]:
    """All entries of a kind by name, sorted."""
    return dict(sorted(_ENTRIES[kind].items()))


def load_plugins() -> list[str]:
    """Import the modules that other packages name in the entry-point group.

    Such a module registers entries, or defines subclasses; one that fails is left out with a
    warning.  Returns the packages of plug-ins and of their entries, which configs may name.
    """
    modules = []
    for point in entry_points(group=PLUGINS):
        try:
            point.load()
        except Exception as error:
            warnings.warn(f"plug-in '{point.name}' cannot be loaded: {error}", stacklevel=2)
        else:
            modules.append(point.module)
    modules += [entry.module for kind in _ENTRIES.values() for entry in kind.values()]
    return sorted({module.partition(".")[0] for module in modules} - {"kedit_lightning"})


def lazy_exports(kind: Kind | None, others: dict[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package that imports its entries and other names on first use.

    Importing torch, Lightning, peft or matplotlib takes a second or more each.  This is the one way
    to import a module late: no function has an import statement.
    """

    def get(name: str) -> Any:
        if kind is not None and name in _ENTRIES[kind]:
            return _ENTRIES[kind][name].load()
        if name in others:
            return getattr(import_module(others[name]), name)
        raise AttributeError(f"there is no {kind or 'attribute'} {name!r}")

    return get


#: The classes of each package: module, file of the packaged config or "", and summary.
_OWN: dict[tuple[Kind, str], dict[str, tuple[str, str, str]]] = {
    ("method", "methods"): {
        "AdaLoRA": ("finetune.adalora", "adalora", "low-rank adapter that shares out its rank"),
        "AlphaEdit": ("locate.alphaedit", "alphaedit", "MEMIT in the null space of typical keys"),
        "AnyEdit": ("locate.anyedit", "anyedit", "MEMIT for long answers, window by window"),
        "CaliNet": ("memory.calinet", "calinet", "calibration slots beside the last MLP"),
        "CrispEdit": ("finetune.crispedit", "crispedit", "fine-tuning off what text depends on"),
        "DPOEdit": (
            "finetune.lora",
            "dpoedit",
            "adapter that prefers the new answer to the old",
        ),
        "DINM": ("safety.dinm", "dinm", "detoxifies the layer that tells replies apart"),
        "DeCo": ("decoding.deco", "deco", "corrects the last layer by a surer earlier one"),
        "DoLa": ("decoding.dola", "dola", "contrasts the last layer with an earlier one"),
        "DEFER": ("memory.defer", "defer", "a gate that defers to a trained copy of a layer"),
        "EMMET": ("locate.memit", "emmet", "MEMIT with equality, at one layer"),
        "FTL": ("finetune.ftl", "ftl", "fine-tuning one layer inside a box around its weights"),
        "FTM": ("finetune.ftm", "ftm", "fine-tuning one layer on the answers"),
        "GRACE": ("memory.grace", "grace", "codebook memory of keys and values"),
        "ICE": ("in_context.ice", "ice", "in-context editing by an instruction and the fact"),
        "IKE": ("in_context.ike", "ike", "in-context editing with demonstrations"),
        "InstructEdit": ("hypernetwork.instructedit", "instructedit", "MEND with instructions"),
        "KE": ("hypernetwork.ke", "ke", "hypernetwork that gates the gradient of a request"),
        "KN": ("locate.kn", "kn", "knowledge neurons, a historical baseline"),
        "LoRA": ("finetune.lora", "lora", "low-rank adapter, trained with peft"),
        "LocFTBF": ("finetune.locftbf", "locftbf", "breadth-first fine-tuning, with a buffer"),
        "LyapLock": ("locate.lyaplock", "lyaplock", "MEMIT with a bound on what text loses"),
        "MALMEN": ("hypernetwork.malmen", "malmen", "MEND for many facts, by ridge regression"),
        "MELO": ("memory.melo", "melo", "low-rank blocks, routed by clusters of facts"),
        "MEMIT": ("locate.memit", "memit", "many facts over a few layers, closed form"),
        "MEMOIR": (
            "memory.memoir",
            "memoir",
            "residual memory with masks that depend on the prompt",
        ),
        "MEND": ("hypernetwork.mend", "mend", "hypernetwork that transforms a gradient; T5 too"),
        "MeLLo": ("in_context.mello", "mello", "a store of facts for multi-hop questions"),
        "NSE": ("locate.nse", "nse", "MEMIT of neurons in rounds, by the original weights"),
        "PMET": ("locate.memit", "pmet", "MEMIT with values of attention and MLP"),
        "PROMPT": ("in_context.prompt", "prompt", "the fact in the prompt"),
        "QLoRA": ("finetune.lora", "qlora", "LoRA on weights in 4 bit; needs bitsandbytes"),
        "RLEdit": ("hypernetwork.rledit", "rledit", "MALMEN fitted on sequences of edits"),
        "ROME": ("locate.rome", "rome", "rank-one update, closed form"),
        "RROME": ("locate.rome", "rrome", "ROME with the mean key"),
        "SERAC": ("memory.serac", "serac", "memory with scope and counterfactual model; T5 too"),
        "TPatcher": ("memory.tpatcher", "tpatcher", "one neuron a mistake in the last MLP"),
        "UnKE": ("locate.block_output", "unke", "a whole block's output, for long answers"),
        "WISE": ("memory.wise", "wise", "side memories with a routing by activations"),
        "UltraEdit": ("locate.ultraedit", "ultraedit", "regression of normalised gradients"),
    },
    ("dataset", "data"): {
        "ADSEdit": ("multimodal.adsedit", "adsedit", "driving scenes in one picture or several"),
        "AKEW": (
            "knowledge.akew",
            "akew",
            "a fact as a triple, a passage, or the triples of a passage (`form`)",
        ),
        "CKnowEdit": (
            "knowledge.cknowedit",
            "cknowedit",
            "Chinese poetry, idioms, pinyin, history, logic",
        ),
        "ComprehendEdit": (
            "multimodal.comprehendedit",
            "comprehendedit",
            "errors about pictures across five benchmarks",
        ),
        "ConceptEdit": (
            "knowledge.conceptedit",
            "conceptedit",
            "definitions of concepts, with their instances: of the same superclass or another",
        ),
        "CounterFact": (
            "knowledge.counterfact",
            "counterfact",
            "ROME's nested records and EasyEdit's flat ones, told apart by content",
        ),
        "EIC": ("multimodal.mmedit", "eic", "captions of pictures, corrected (MMEdit)"),
        "EVQA": ("multimodal.mmedit", "evqa", "answers about pictures, corrected (MMEdit)"),
        "EditEverything": (
            "knowledge.unke",
            "editeverything",
            "long targets: mathematics, code, news, poetry",
        ),
        "Facts30M": ("knowledge.facts_30m", "facts_30m", "facts that `facts-30m` knows"),
        "HalluEditBench": (
            "knowledge.hallueditbench",
            "hallueditbench",
            "facts that named models get wrong, five facets",
        ),
        "KnowEdit": (
            "knowledge.knowedit",
            "knowedit",
            "its six sets: wiki_recent, zsre, wikibio, wiki_counterfact, convsent, sanitation",
        ),
        "KnownFacts": (
            "knowledge.known_facts",
            "known_facts",
            "known-1000, true facts for causal tracing",
        ),
        "LEME": ("knowledge.leme", "leme", "zsRE and CounterFact with prompts for long answers"),
        "MQuAKE": (
            "knowledge.mquake",
            "mquake",
            "multi-hop questions over edited facts (CF, T, hard)",
        ),
        "NanoFacts": ("knowledge.nano", "nano_facts", "packaged"),
        "PersonalityEdit": (
            "traits.personalityedit",
            "personalityedit",
            "opinions that show extraversion, agreeableness or neuroticism",
        ),
        "QAEdit": ("knowledge.qaedit", "qaedit", "questions of NQ, TriviaQA and SimpleQA"),
        "Requests": (
            "knowledge.requests_file",
            "requests",
            "your own JSON, JSONL or CSV: `prompt` (or chat `messages`), `target_new`, "
            "`subject?`, `target_old?`, `id?`, `task?`, `image?`, `rephrases?`, "
            "`image_rephrases?`, `locality?`, `portability?`, `constraint?`",
        ),
        "RippleEdits": (
            "knowledge.rippleedits",
            "rippleedits",
            "six criteria of what follows from an edit",
        ),
        "SafeEdit": (
            "safety.safeedit",
            "safeedit",
            "attacked questions with a safe and an unsafe reply, and what must stay known",
        ),
        "Shapes": ("multimodal.shapes", "shapes", "packaged: drawn pictures that `shapes` knows"),
        "Texts": (
            "text.texts",
            "texts",
            "plain text for key statistics: a file, a folder, or a hub data set, streamed",
        ),
        "TruthfulQA": (
            "knowledge.truthfulqa",
            "truthfulqa",
            "questions that people answer falsely, multiple choice and short",
        ),
        "UnKE": ("knowledge.unke", "unke", "answers of about a hundred words"),
        "WikiBigEdit": (
            "knowledge.wikibigedit",
            "wikibigedit",
            "half a million changes of Wikidata over time",
        ),
        "ZsRE": ("knowledge.zsre", "zsre", "MEND's records and KnowEdit's"),
    },
    ("callback", "callbacks"): {
        "AbilityCheck": ("ability_check", "", "tasks of lm-eval before and after edits"),
        "AbilitySample": ("ability_sample", "", "plain text and choices under edits"),
        "CanaryGuard": ("canary_guard", "", "stops a stream of edits before it ruins the model"),
        "CausalTracing": ("causal_tracing", "", "heat maps of causal traces"),
        "EditSaver": ("edit_saver", "", "saves edits as they are computed"),
        "EditTable": ("edit_table", "", "a table of edits that grows during a run"),
        "LayerSweep": ("layer_sweep", "", "scores of edits at each layer"),
        "PlaceBaseModel": ("place_base_model", "", "puts the base model on the trainer's device"),
        "ResultsWriter": ("results_writer", "", "writes results as they come"),
        "RollbackGuard": ("rollback_guard", "", "checks that a run changes no weight"),
        "StreamDrift": ("stream_drift", "", "perplexity, KL and norms along a stream of edits"),
        "TrainingReport": ("training_report", "", "draws the curves of a fit"),
        "WandbTable": ("wandb_table", "", "a table of answers in Weights & Biases"),
    },
    ("metric", "metrics.scores"): {
        "BestChoice": ("choices", "", "the best answer is more likely than every wrong one"),
        "RightAbove": ("choices", "", "right answers that are more likely than every wrong one"),
        "RightMass": ("choices", "", "probability of the right answers among all choices"),
        "AdjectiveShift": ("traits", "", "adjectives of the wished trait fit better (PAE)"),
        "AllWordings": ("generation_quality", "", "every wording of a question is answered"),
        "AnswerOverlap": (
            "generation_quality",
            "",
            "F1 of words between free generation and answer",
        ),
        "AnyWording": ("generation_quality", "", "one wording of a question is answered"),
        "BaseKL": ("locality", "", "KL divergence from the base model"),
        "CharacterRouge": ("passages", "", "ROUGE-L with the wanted sentence, on characters"),
        "DefenceChange": ("defence", "", "replies that are safe, less those of the base model"),
        "DefenceGeneralization": ("defence", "", "replies to related questions are safe"),
        "DefenceSuccess": ("defence", "", "the reply is safe"),
        "ExactMatch": ("answers", "", "all tokens of an answer are arg-max, teacher-forced"),
        "ConsistencyCosine": ("concepts", "", "cosine of the generated and the new definition"),
        "ConsistencyJudged": ("concepts", "", "a judge takes the generation for the definition"),
        "Forgotten": ("tasks", "", "the free generation mentions no forbidden answer"),
        "Fluency": ("fluency", "", "n-gram entropy of a sampled continuation"),
        "FluencyChange": ("fluency", "", "n-gram entropy less that of the base model"),
        "GenerationContains": ("answers", "", "the free generation states an answer"),
        "GenerationExact": ("answers", "", "the free generation is an answer and stops"),
        "Inflation": ("answers", "", "token match minus exact generation"),
        "InstanceChange": ("concepts", "", "instances whose yes or no the edit changed"),
        "InstanceShift": ("concepts", "", "how far the probability of yes moved"),
        "InstanceToNo": ("concepts", "", "instances that no longer belong to the concept"),
        "InstanceToYes": ("concepts", "", "instances that now belong to the concept"),
        "InstanceUnparsed": ("concepts", "", "instances that get neither yes nor no"),
        "Judged": ("tasks", "", "a judge takes the free generation for the answer"),
        "NegativeLogLikelihood": ("answers", "", "negative log-likelihood of the answer's tokens"),
        "OpinionSuccess": ("tasks", "", "the wished opinion is likelier, and on the topic"),
        "OtherForms": ("tasks", "", "the answer is stated where the fact is asked in other forms"),
        "PassageBleu": ("passages", "", "BLEU with the wanted passage, on words"),
        "PassageCosine": ("passages", "", "cosine of embeddings with the wanted passage"),
        "PassageRouge": ("passages", "", "ROUGE-L (F) with the wanted passage"),
        "PassageRouge1Recall": ("passages", "", "ROUGE-1 recall of the wanted passage"),
        "PassageRouge2Recall": ("passages", "", "ROUGE-2 recall of the wanted passage"),
        "PassageRougeLRecall": ("passages", "", "ROUGE-L recall of the wanted passage"),
        "ProbabilityPreference": ("answers", "", "the answer is more likely than the contrast"),
        "Repetition": ("generation_quality", "", "share of trigrams that come again"),
        "Retained": ("tasks", "", "answers still stated of those that were stated"),
        "RippleTest": ("tasks", "", "tests passed of those whose conditions held"),
        "RunOn": ("generation_quality", "", "the free generation goes on behind the answer"),
        "SentimentShift": ("tasks", "", "the free generation is more of the wished sentiment"),
        "SeveralHops": ("tasks", "", "the answer over several facts is stated"),
        "StillKnown": ("locality", "", "answers still right of those that were right"),
        "TextPerplexity": ("fluency", "", "perplexity of plain text"),
        "TokenMatch": ("answers", "", "share of an answer's tokens that are arg-max"),
        "TraitAccuracy": ("traits", "", "a classifier sees the wished trait"),
        "TraitCoherent": ("traits", "", "opinions that are coherent text"),
        "TraitShift": ("traits", "", "a classifier is surer of the wished trait (TPEI)"),
        "UnchangedText": ("locality", "", "the free generation is the base model's"),
        "UnchangedTop1": ("locality", "", "all arg-max tokens are the base model's"),
        "Undoubted": ("tasks", "", "the answer is kept up when it is doubted"),
    },
}
for (_kind, _package), _table in _OWN.items():
    for _name, (_module, _config, _summary) in _table.items():
        _config = _config and f"{_package}/{_config}"
        register(Entry(_kind, _name, f"kedit_lightning.{_package}.{_module}", _summary, _config))
