"""Where each method was published."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """Where a method was published.

    Args:
        title: Title of the paper.
        authors: First author, and the year.
        arxiv: Its number at arXiv.
    """

    title: str
    authors: str
    arxiv: str

    def __str__(self) -> str:
        return f"[{self.title}](https://arxiv.org/abs/{self.arxiv}) ({self.authors})"


ROME = Paper(
    "Locating and Editing Factual Associations in GPT", "Meng et al., NeurIPS 2022", "2202.05262"
)
PAPERS: dict[str, tuple[Paper, ...]] = {
    "AdaLoRA": (
        Paper(
            "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
            "Zhang et al., ICLR 2023",
            "2303.10512",
        ),
    ),
    "AlphaEdit": (
        Paper(
            "AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models",
            "Fang et al., ICLR 2025",
            "2410.02355",
        ),
    ),
    "AnyEdit": (
        Paper(
            "AnyEdit: Edit Any Knowledge Encoded in Language Models",
            "Jiang et al., ICML 2025",
            "2502.05628",
        ),
    ),
    "CaliNet": (
        Paper(
            "Calibrating Factual Knowledge in Pretrained Language Models",
            "Dong et al., Findings of EMNLP 2022",
            "2210.03329",
        ),
    ),
    "CrispEdit": (
        Paper(
            "CrispEdit: Low-Curvature Projections for Scalable Non-Destructive LLM Editing",
            "Ikram et al., ICML 2026",
            "2602.15823",
        ),
    ),
    "DeCo": (
        Paper(
            "MLLM Can See? Dynamic Correction Decoding for Hallucination Mitigation",
            "Wang et al., ICLR 2025",
            "2410.11779",
        ),
    ),
    "DoLa": (
        Paper(
            "DoLa: Decoding by Contrasting Layers Improves Factuality in Large Language Models",
            "Chuang et al., ICLR 2024",
            "2309.03883",
        ),
    ),
    "DPOEdit": (
        Paper(
            "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
            "Rafailov et al., NeurIPS 2023",
            "2305.18290",
        ),
    ),
    "DEFER": (
        Paper(
            "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors (DEFER)",
            "Hartvigsen et al., NeurIPS 2023",
            "2211.11031",
        ),
    ),
    "DINM": (
        Paper(
            "Detoxifying Large Language Models via Knowledge Editing",
            "Wang et al., ACL 2024",
            "2403.14472",
        ),
    ),
    "EMMET": (
        Paper("A Unified Framework for Model Editing", "Gupta et al., EMNLP 2024", "2403.14236"),
    ),
    "FTL": (ROME,),
    "FTM": (
        Paper(
            "A Comprehensive Study of Knowledge Editing for Large Language Models (FT-M)",
            "Zhang et al., 2024",
            "2401.01286",
        ),
        ROME,
    ),
    "GRACE": (
        Paper(
            "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors",
            "Hartvigsen et al., NeurIPS 2023",
            "2211.11031",
        ),
    ),
    "ICE": (
        Paper(
            "A Comprehensive Study of Knowledge Editing for Large Language Models (ICE)",
            "Zhang et al., 2024",
            "2401.01286",
        ),
    ),
    "IKE": (
        Paper(
            "Can We Edit Factual Knowledge by In-Context Learning?",
            "Zheng et al., EMNLP 2023",
            "2305.12740",
        ),
    ),
    "InstructEdit": (
        Paper(
            "InstructEdit: Instruction-based Knowledge Editing for Large Language Models",
            "Zhang et al., IJCAI 2024",
            "2402.16123",
        ),
    ),
    "KE": (
        Paper(
            "Editing Factual Knowledge in Language Models",
            "De Cao et al., EMNLP 2021",
            "2104.08164",
        ),
    ),
    "KN": (
        Paper("Knowledge Neurons in Pretrained Transformers", "Dai et al., ACL 2022", "2104.08696"),
    ),
    "LoRA": (
        Paper(
            "LoRA: Low-Rank Adaptation of Large Language Models",
            "Hu et al., ICLR 2022",
            "2106.09685",
        ),
    ),
    "LocFTBF": (
        Paper("Fine-tuning Done Right in Model Editing", "Yang et al., 2025", "2509.22072"),
    ),
    "LyapLock": (
        Paper(
            "LyapLock: Bounded Knowledge Preservation in Sequential Large Language Model Editing",
            "Wang et al., EMNLP 2025",
            "2505.15702",
        ),
    ),
    "MALMEN": (
        Paper(
            "Massive Editing for Large Language Models via Meta Learning",
            "Tan et al., ICLR 2024",
            "2311.04661",
        ),
    ),
    "MELO": (
        Paper(
            "MELO: Enhancing Model Editing with Neuron-Indexed Dynamic LoRA",
            "Yu et al., AAAI 2024",
            "2312.11795",
        ),
    ),
    "MEMIT": (
        Paper("Mass-Editing Memory in a Transformer", "Meng et al., ICLR 2023", "2210.07229"),
    ),
    "MEMOIR": (
        Paper(
            "MEMOIR: Lifelong Model Editing with Minimal Overwrite and Informed Retention",
            "Wang et al., 2025",
            "2506.07899",
        ),
    ),
    "MEND": (Paper("Fast Model Editing at Scale", "Mitchell et al., ICLR 2022", "2110.11309"),),
    "MeLLo": (
        Paper(
            "MQuAKE: Assessing Knowledge Editing in Language Models via Multi-Hop Questions",
            "Zhong et al., EMNLP 2023",
            "2305.14795",
        ),
    ),
    "NSE": (
        Paper(
            "Neuron-Level Sequential Editing for Large Language Models",
            "Jiang et al., ACL 2025",
            "2410.04045",
        ),
    ),
    "PMET": (
        Paper("PMET: Precise Model Editing in a Transformer", "Li et al., AAAI 2024", "2308.08742"),
    ),
    "PROMPT": (
        Paper(
            "Can We Edit Factual Knowledge by In-Context Learning? (PROMPT)",
            "Zheng et al., EMNLP 2023",
            "2305.12740",
        ),
    ),
    "QLoRA": (
        Paper(
            "QLoRA: Efficient Finetuning of Quantized LLMs",
            "Dettmers et al., NeurIPS 2023",
            "2305.14314",
        ),
    ),
    "RLEdit": (
        Paper(
            "Reinforced Lifelong Editing for Language Models", "Li et al., ICML 2025", "2502.05759"
        ),
    ),
    "ROME": (ROME,),
    "RROME": (
        Paper(
            "Rebuilding ROME: Resolving Model Collapse during Sequential Model Editing",
            "Gupta et al., EMNLP 2024",
            "2403.07175",
        ),
    ),
    "SERAC": (
        Paper("Memory-Based Model Editing at Scale", "Mitchell et al., ICML 2022", "2206.06520"),
    ),
    "TPatcher": (
        Paper(
            "Transformer-Patcher: One Mistake worth One Neuron",
            "Huang et al., ICLR 2023",
            "2301.09785",
        ),
    ),
    "UltraEdit": (
        Paper(
            "UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing in Language Models",
            "Gu et al., 2025",
            "2505.14679",
        ),
    ),
    "UnKE": (
        Paper(
            "Everything is Editable: Extend Knowledge Editing to Unstructured Data in Large "
            "Language Models",
            "Deng et al., ICLR 2025",
            "2405.15349",
        ),
    ),
    "WISE": (
        Paper(
            "WISE: Rethinking the Knowledge Memory for Lifelong Model Editing",
            "Wang et al., NeurIPS 2024",
            "2405.14768",
        ),
    ),
}
