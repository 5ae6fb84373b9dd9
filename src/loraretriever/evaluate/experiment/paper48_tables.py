"""The figures that the paper published for its 48 tasks, under the names that the experiment uses.

Source: Zhao et al., "LoraRetriever: Input-Aware LoRA Retrieval and Composition for Mixed Tasks in the Wild", Findings
of ACL 2024 (arXiv 2402.09997): table 1 (means of each domain, for Llama-2-7b and Llama-2-13b), table 4 (each task, 7b)
and table 5 (each task, 13b). The files in `published/` hold the tables as printed, with their spellings.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

from loraretriever.errors import InvalidInputError

SIZES = ("7b", "13b")
# Columns of the tables -> (method, setting). A method that the paper ran once has no second setting: it counts as iid.
COLUMNS: Mapping[str, tuple[str, str]] = {
    "perfect": ("oracle", "iid"),
    "sel_iid": ("selection", "iid"),
    "sel_ood": ("selection", "ood"),
    "fus_iid": ("fusion", "iid"),
    "fus_ood": ("fusion", "ood"),
    "mix_iid": ("mixture", "iid"),
    "mix_ood": ("mixture", "ood"),
    "moe_top1": ("moe_top1", "iid"),
    "moe_top3": ("moe_top3", "iid"),
    "moe_soft": ("moe_soft", "iid"),
    "smear": ("smear", "iid"),
    "adaptersoup": ("adaptersoup", "iid"),
    "lorahub": ("lorahub", "iid"),
}
METHODS = tuple(dict.fromkeys(method for method, _ in COLUMNS.values()))
# Ends of the rows' names -> name in `results.METRICS`. The minus sign of table 1 is U+2212.
_ROUGE = {
    "Rouge-1": "rouge1",
    "Rouge-2": "rouge2",
    "Rouge-l": "rougeL",
    "Rouge−1": "rouge1",
    "Rouge−2": "rouge2",
    "Rouge−l": "rougeL",
}


@dataclass(frozen=True, slots=True)
class PaperTask:
    """One of the paper's tasks. `rows` are its names in tables 4 and 5."""

    domain: str
    metric: str  # "em", "rouge" or "bleu"
    rows: tuple[str, ...]


# Domains -> their names in table 1: rows that are means over the tasks of a domain.
DOMAINS: Mapping[str, str] = {
    "struct to text": "Struct to Text",
    "translation": "TranslationBLEU",
    "commonsense": "COMMONSENSE",
    "sentiment": "SENTIMENT",
    "reading comp": "READING Comp.",
    "closed_book QA": "CLOSE-BOOK QA",
    "coreference": "COREFERENCE",
    "read.comp.w:commonsense": "READ. COOMP. W/ COM",
    "paraphrase": "PARAPHRASE",
    "nli": "NLI",
}
_TASKS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "struct to text": {
        "web_nlg_en": ("WebNLG",),
        "dart": ("DART",),
        "e2e_nlg": ("E2ENLG",),
        "common_gen": ("CommonGen",),
    },
    "translation": {
        "para_crawl_enes": ("Paracrawl-enes",),
        "wmt16_translate_tren": ("WMT’16-tren",),
        "wmt16_translate_ruen": ("WMT’16-ruen",),
        "wmt16_translate_deen": ("WMT’16-deen",),
        "wmt16_translate_fien": ("WMT’16-fien",),
        "wmt16_translate_roen": ("WMT’16-roen",),
        "wmt14_enfr": ("WMT’14-enfr",),
        "wmt16_translate_csen": ("WMT’16-csen",),
    },
    "commonsense": {
        "story_cloze": ("StoryCloze",),
        "piqa": ("PIQA",),
        "copa": ("COPA",),
        "hellaswag": ("HellaSwag",),
    },
    "sentiment": {
        "sst2": ("SST-2",),
        "yelp_polarity_reviews": ("Yelp",),
        "imdb_reviews": ("IMDB",),
        "sentiment140": ("sentiment140",),
    },
    "reading comp": {
        "multirc": ("MultiRC",),
        "squad_v2": ("SQuADv2",),
        "squad_v1": ("SQuADv1",),
        "openbookqa": ("OBQA",),
        "bool_q": ("BoolQ",),
        "drop": ("drop", "Drpo"),  # as table 5 spells it
    },
    "closed_book QA": {
        "natural_questions": ("NQ",),
        "arc_easy": ("ARC-e",),
        "arc_challenge": ("ARC-c",),
        "trivia_qa": ("TriviaQa",),
    },
    "coreference": {"definite_pronoun_resolution": ("DPR",), "wsc": ("WSC",)},
    "read.comp.w:commonsense": {"cosmos_qa": ("CosmosQa",), "record": ("record",)},
    "paraphrase": {
        "paws_wiki": ("Paws Wiki",),
        "glue_qqp": ("QQP",),
        "glue_mrpc": ("MRPC",),
        "stsb": ("STSB",),
    },
    "nli": {
        "cb": ("CB",),
        "wnli": ("WNLI",),
        "anli_r1": ("ANLI-r1",),
        "anli_r2": ("ANLI-r2",),
        "anli_r3": ("ANLI-r3",),
        "mnli_matched": ("MNLI-m",),
        "mnli_mismatched": ("MNLI-mm",),
        "snli": ("SNLI",),
        "qnli": ("QNLI",),
        "rte": ("RTE",),
    },
}
_METRICS = {"struct to text": "rouge", "translation": "bleu"}  # of domains; all others: "em"
TASKS: Mapping[str, PaperTask] = MappingProxyType(
    {
        task: PaperTask(domain, _METRICS.get(domain, "em"), rows)
        for domain, tasks in _TASKS.items()
        for task, rows in tasks.items()
    }
)
_FOLDER = Path(__file__).parent / "published"


def check_size(size: str) -> str:
    """The size of the paper's base model.

    Raises:
        InvalidInputError: the paper has no such one.
    """
    if size not in SIZES:
        raise InvalidInputError(f"the size is {size!r}; expected one of {', '.join(SIZES)}.")
    return size


@cache
def published(size: str) -> Mapping[tuple[str, str, str, str], float]:
    """The paper's figures, from 0 to 100: (method, setting, task or domain, metric) -> figure.

    Methods and settings are those in `COLUMNS`. A task's or a domain's metric is one of `results.METRICS`; only struct
    to text has three of them. The figure of a domain is the paper's own mean over its tasks (table 1).

    Args:
        size: "7b" (tables 1 and 4) or "13b" (tables 1 and 5).

    Raises:
        InvalidInputError: the size is another.
    """
    check_size(size)
    figures: dict[tuple[str, str, str, str], float] = {}
    for file in sorted(_FOLDER.glob(f"table*_{size}.csv")):
        with file.open(encoding="utf-8", newline="") as handle:
            for row in csv.DictReader(handle):
                place, metric = find_row(row.pop("task"))
                for column, value in row.items():
                    figures[(*COLUMNS[column], place, metric)] = float(value)
    return MappingProxyType(figures)


def find_row(name: str) -> tuple[str, str]:
    """The task or the domain that a row of the tables is of, and its metric (one of `results.METRICS`).

    Raises:
        InvalidInputError: no row has that name.
    """
    metric, short = "", name
    for end, found in _ROUGE.items():
        if name.endswith(end):
            metric, short = found, name.removesuffix(end).strip()
    for domain, row in DOMAINS.items():
        if row == short:
            return domain, metric or _METRICS.get(domain, "em")
    for task, known in TASKS.items():
        if short in known.rows:
            return task, metric or known.metric
    raise InvalidInputError(f"{name!r} is no row of the paper's tables 1, 4 and 5; expected one of their names.")
