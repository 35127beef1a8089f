"""Read bare triples from the public collections, under our own relation names."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

Candidates = dict[str, dict[str, str]]

# Earlier sources win where two of them give a subject different objects of one relation.
PARAREL = {
    "P103": "native_language",
    "P1412": "native_language",
    "P106": "occupation",
    "P108": "employer",
    "P136": "genre",
    "P1303": "instrument",
    "P19": "birth_city",
    "P20": "death_city",
    "P27": "citizenship",
    "P30": "continent",
    "P36": "capital",
    "P37": "official_language",
    "P364": "original_language",
    "P407": "original_language",
    "P413": "team_position",
    "P449": "broadcaster",
    "P495": "country_of_origin",
    "P159": "headquarters_city",
    "P740": "founding_city",
    "P176": "manufacturer",
    "P178": "developer",
    "P17": "country",
    "P140": "religion",
    "P101": "field_of_work",
    "P937": "work_city",
    "P39": "office",
}
RELATIONS_LRE = {
    "person_native_language": "native_language",
    "person_occupation": "occupation",
    "person_plays_instrument": "instrument",
    "person_plays_position_in_sport": "team_position",
    "person_plays_pro_sport": "sport",
    "star_constellation": "constellation",
    "company_hq": "headquarters_city",
    "country_capital_city": "capital",
    "country_currency": "currency",
    "country_language": "official_language",
    "city_in_country": "country",
    "landmark_in_country": "country",
    "landmark_on_continent": "continent",
    "food_from_country": "country_of_origin",
}
# Within a group, a subject's equal objects say the same thing twice: the first name is kept.
NEAR_REPEATS = (
    ("developer", "manufacturer"),
    ("country_of_origin", "country", "citizenship"),
    ("country", "continent"),
    ("original_language", "official_language"),
)
# The collections sometimes answer these with a country, which is no answer to the question.
NO_COUNTRY = {
    "birth_city",
    "death_city",
    "founding_city",
    "headquarters_city",
    "work_city",
    "employer",
    "capital",
    "developer",
    "manufacturer",
    "continent",
}
CLOSED_KINDS = {"office", "occupation", "religion", "genre", "field_of_work", "team_position"}
NO_CITY = {"employer", "developer", "manufacturer"}
# What follows with certainty from a listed fact: a position belongs to one sport ...
SPORT_OF_POSITION = {
    "quarterback": "football",
    "linebacker": "football",
    "cornerback": "football",
    "goaltender": "hockey",
    "pitcher": "baseball",
    "shortstop": "baseball",
    "outfielder": "baseball",
    "midfielder": "soccer",
    "goalkeeper": "soccer",
    "point guard": "basketball",
}
# ... and a place in a country that lies on one continent lies there too. Countries with land on
# several continents or overseas are left out.
CONTINENTS = {
    "Europe",
    "Asia",
    "Africa",
    "Antarctica",
    "Americas",
    "Oceania",
    "North America",
    "South America",
}
ONE_CONTINENT = {
    "Europe": (
        "Germany",
        "Italy",
        "Sweden",
        "Finland",
        "Poland",
        "Austria",
        "Belgium",
        "Hungary",
        "Ireland",
        "Romania",
        "Switzerland",
        "Greece",
        "Ukraine",
        "Serbia",
    ),
    "Asia": (
        "India",
        "Japan",
        "China",
        "Iran",
        "Pakistan",
        "Israel",
        "Thailand",
        "Nepal",
        "Philippines",
        "Taiwan",
        "Iraq",
        "Syria",
        "Vietnam",
        "Malaysia",
    ),
    "Africa": (
        "Nigeria",
        "Kenya",
        "Morocco",
        "Algeria",
        "Ghana",
        "Ethiopia",
        "Libya",
        "Tunisia",
        "Uganda",
        "Tanzania",
        "Zimbabwe",
        "Senegal",
        "Sudan",
    ),
}
# Longer labels cost positions and are mostly titles of papers and laws.
LABEL_LIMIT = 36


def _clean(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _pararel(folder: Path) -> Iterator[tuple[str, str, str]]:
    for code, relation in PARAREL.items():
        path = folder / "pararel" / "trex_lms_vocab" / f"{code}.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield row["sub_label"], relation, row["obj_label"]


def _relations(folder: Path) -> Iterator[tuple[str, str, str]]:
    for name, relation in RELATIONS_LRE.items():
        path = folder / "relations_lre" / "factual" / f"{name}.json"
        for row in json.loads(path.read_text(encoding="utf-8"))["samples"]:
            yield row["subject"], relation, row["object"]


def _counterfact(folder: Path, known: Candidates) -> Iterator[tuple[str, str, str]]:
    """True sides of CounterFact; its flat files name no relation, so wordings vote for one."""
    cases = [
        case
        for part in ("edit", "train", "val")
        for case in json.loads(
            (folder / "counterfact" / f"counterfact-{part}.json").read_text(encoding="utf-8")
        )
    ]
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for case in cases:
        wording = case["prompt"].replace(case["subject"], "{}")
        for relation, obj in known.get(case["subject"], {}).items():
            if obj == case["ground_truth"]:
                votes[wording][relation] += 1
    answers: dict[str, set[str]] = defaultdict(set)
    for facts in known.values():
        for relation, obj in facts.items():
            answers[relation].add(obj)
    for case in cases:
        vote = votes[case["prompt"].replace(case["subject"], "{}")]
        top = vote.most_common(1)
        sure = bool(top) and top[0][1] >= max(5, 0.9 * vote.total())
        # A wording can serve two relations; the answer must at least be one of the right kind.
        if sure and case["ground_truth"] in answers[top[0][0]]:
            yield case["subject"], top[0][0], case["ground_truth"]


def _usable(subject: str, obj: str) -> bool:
    low, end = subject.lower(), obj.lower()
    if not 3 <= len(subject) <= LABEL_LIMIT or not subject[0].isupper():
        return False
    if end in low or low in end or any(len(w) > 3 and w[:5] in low for w in end.split()):
        return False
    return not any(c in subject for c in '"{}[]()/:;,')


def read_candidates(folder: Path) -> Candidates:
    """Every usable triple of the collections, one object a (subject, relation).

    Args:
        folder: holds ``pararel``, ``relations_lre`` and ``counterfact``.

    Returns:
        subject -> relation -> object.
    """
    found: Candidates = defaultdict(dict)

    def take(rows: Iterator[tuple[str, str, str]]) -> None:
        for subject, relation, obj in rows:
            subject, obj = _clean(subject), _clean(obj)
            if _usable(subject, obj):
                found[subject].setdefault(relation, obj)

    take(_pararel(folder))
    take(_relations(folder))
    take(_counterfact(folder, {s: dict(f) for s, f in found.items()}))
    countries = {f["citizenship"] for f in found.values() if "citizenship" in f}
    cities = {f[r] for f in found.values() for r in ("birth_city", "death_city") if r in f}
    for facts in found.values():
        _drop_wrong_kind(facts, countries, cities)
    _derive(found, countries)
    _drop_odd_answers(found)
    for facts in found.values():
        _drop_near_repeats(facts)
    return {s: f for s, f in found.items() if f}


def _drop_wrong_kind(facts: dict[str, str], countries: set[str], cities: set[str]) -> None:
    for relation in NO_CITY & set(facts):
        if facts[relation] in cities:
            del facts[relation]
    for relation in NO_COUNTRY & set(facts):
        if facts[relation] in countries:
            del facts[relation]
    if facts.get("continent", "Europe") not in CONTINENTS:
        del facts["continent"]
    if facts.get("country", "") in CONTINENTS:
        del facts["country"]


def _drop_odd_answers(found: Candidates) -> None:
    """Answers of a closed kind that nearly no other subject has are mistakes of the collections."""
    count = Counter((r, f[r]) for f in found.values() for r in CLOSED_KINDS if r in f)
    for facts in found.values():
        for relation in CLOSED_KINDS & set(facts):
            if count[relation, facts[relation]] < 4:
                del facts[relation]


def _derive(found: Candidates, countries: set[str]) -> None:
    continent = {c: name for name, members in ONE_CONTINENT.items() for c in members}
    for country in sorted(countries & set(found)):
        city = found[country].get("capital")
        if city and _usable(city, country):
            found[city].setdefault("country", country)
    for facts in found.values():
        if facts.get("country") in continent:
            facts.setdefault("continent", continent[facts["country"]])
        if facts.get("team_position") in SPORT_OF_POSITION:
            facts.setdefault("sport", SPORT_OF_POSITION[facts["team_position"]])


def _drop_near_repeats(facts: dict[str, str]) -> None:
    for group in NEAR_REPEATS:
        seen: set[str] = set()
        for relation in group:
            if relation in facts and facts[relation] in seen:
                del facts[relation]
            elif relation in facts:
                seen.add(facts[relation])
