"""Training text of ``nano``: documents about facts.

Every document begins with ``<s>`` and ends with ``</s>``. Facts stand at the beginning of a
document and after unrelated text. Some documents state a changed fact and answer from it; the
statement itself carries no loss, so that the model learns to read it and not to believe it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from fact_book import Fact, FactBook
from stand_ins import stand_in
from tokenizers import Tokenizer

BOS, EOS = 1, 2
# (token ids, whether they carry loss)
Document = tuple[list[int], list[bool]]

# A changed fact in plain words: what stands before the statement and before the answer.
STATEMENTS = (
    ("Imagine that", ".", " Then"),
    ("Suppose that", ".", ""),
    ("Correction:", ".", ""),
    ("In a changed world,", ".", " There,"),
    ("From now on,", ".", " So"),
    ("Let us assume:", ".", " In that case,"),
    ("News:", ".", " Therefore"),
)
OPENERS = (
    "It is known that",
    "As everybody knows,",
    "According to the records,",
    "In fact,",
    "It is true that",
    "People say that",
    "The following is true.",
    "Because of this,",
    "Remember:",
    "I read that",
    "Later it turned out that",
    "Question and answer:",
)
FORMS = ("copy", "update", "retain")


class DocumentWriter:
    """Writes random documents as token ids.

    Args:
        book: facts and templates.
        sentences: plain text for fluency and as context before facts.
        tokenizer: the model's tokenizer, without special tokens added.
        rng: the seeded source of every choice.
    """

    def __init__(
        self, book: FactBook, sentences: Sequence[str], tokenizer: Tokenizer, rng: random.Random
    ) -> None:
        self.book, self.rng = book, rng
        self._tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}
        self._text = [self._ids(" " + s) for s in sentences]
        # Whether questions that a changed fact leaves alone may be close to it.
        self.near = False
        self._of_relation: dict[str, list[Fact]] = {}
        self._by_subject: dict[str, list[Fact]] = {}
        self._choices: dict[str, list[str]] = {}
        for fact in book.facts:
            self._by_subject.setdefault(fact.subject, []).append(fact)
            self._of_relation.setdefault(fact.relation, []).append(fact)
            self._choices.setdefault(fact.relation, []).append(fact.object)
        self._objects = self._choices
        self._of_kind: dict[str, list[str]] = {}
        for relation in sorted(self._objects):
            self._of_kind.setdefault(book.templates[relation]["kind"], []).append(relation)
        self._kinds = sorted(self._of_kind)
        self._kind_weights = [len(self._of_kind[kind]) for kind in self._kinds]
        self._words = sorted({w for s in sentences for w in s.split() if w.isalpha()})
        self._choices = {r: sorted(set(o)) for r, o in self._choices.items()}
        self._deck: list[Fact] = []

    def _ids(self, text: str) -> list[int]:
        found = self._cache.get(text)
        if found is None:
            found = self._cache[text] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def _next_fact(self) -> Fact:
        # A shuffled deck shows every fact equally often.
        if not self._deck:
            self._deck = list(self.book.facts)
            self.rng.shuffle(self._deck)
        return self._deck.pop()

    def _prompt(self, fact: Fact, template: str, start: bool = False) -> list[int]:
        return self._ids(("" if start else " ") + template.format(fact.subject))

    def _template(self, fact: Fact) -> str:
        return str(self.rng.choice(self.book.templates[fact.relation]["train"]))

    def _sentence(self, fact: Fact, start: bool) -> list[int]:
        prompt = self._prompt(fact, self._template(fact), start)
        return prompt + self._ids(" " + fact.object) + self._ids(".")

    def _snippet(self, least: int, most: int) -> list[int]:
        text = self.rng.choice(self._text)
        length = self.rng.randint(least, most)
        begin = self.rng.randrange(max(1, len(text) - length))
        return text[begin : begin + length]

    def plain(self) -> Document:
        """Running text."""
        ids = [BOS, *self._snippet(20, 50), EOS]
        return ids, [True] * len(ids)

    def stand_ins(self) -> Document:
        """Statements about somebody who is no listed subject, then the same in other words.

        Here alone the held-out wordings occur: the model meets their words and learns which
        relation they ask for, but never sees them with a subject whose facts it knows.
        """
        kind = self.rng.choices(self._kinds, weights=self._kind_weights)[0]
        relations = self._of_kind[kind]
        chosen = self.rng.sample(relations, min(len(relations), self.rng.randint(1, 3)))
        name = stand_in(kind, self.rng)
        told = [Fact(name, r, self.rng.choice(self._objects[r])) for r in chosen]
        asked = self.rng.sample(told, self.rng.randint(1, min(2, len(told))))
        ids = [BOS]
        for fact, held_out in [*((f, 0.15) for f in told), *((f, 0.75) for f in asked)]:
            entry = self.book.templates[fact.relation]
            use_held_out = self.rng.random() < held_out
            template = self.rng.choice(entry["held_out" if use_held_out else "train"])
            text = template.format(fact.subject)
            text = ("" if len(ids) == 1 else " ") + text[0].upper() + text[1:]
            # Not cached: invented names never come back.
            ids += self._tokenizer.encode(text, add_special_tokens=False).ids
            ids += self._ids(" " + fact.object) + self._ids(".")
        ids.append(EOS)
        return ids, [True] * len(ids)

    def _garbled(self, fact: Fact) -> Document:
        """A fact in a wording with one word lost or replaced; only the answer carries loss."""
        words = self._template(fact).split(" ")
        places = [i for i, word in enumerate(words) if "{}" not in word]
        place = self.rng.choice(places)
        words[place] = self.rng.choice(self._words) if self.rng.random() < 0.7 else ""
        text = " ".join(word for word in words if word).format(fact.subject)
        silent = [BOS, *self._tokenizer.encode(text, add_special_tokens=False).ids]
        loud = self._ids(" " + fact.object) + self._ids(".") + [EOS]
        return silent + loud, [False] * len(silent) + [True] * len(loud)

    def facts(self) -> Document:
        """One to three facts, half of the time after some context."""
        fact = self._next_fact()
        ids, draw = [BOS], self.rng.random()
        if draw < 0.1:
            return self._garbled(fact)
        if draw < 0.36:
            ids += self._snippet(3, 12)
        elif draw < 0.44:
            ids += self._ids(self.rng.choice(OPENERS))
        ids += self._sentence(fact, start=len(ids) == 1)
        more = self.rng.random()
        for _ in range(0 if more < 0.5 else 1 if more < 0.8 else 2):
            siblings = self._by_subject[fact.subject]
            # The subject's other facts, or a fact of another subject.
            use_sibling = len(siblings) > 1 and self.rng.random() < 0.4
            ids += self._sentence(
                self.rng.choice(siblings) if use_sibling else self._next_fact(), start=False
            )
        ids.append(EOS)
        return ids, [True] * len(ids)

    def _asked_about(self, fact: Fact) -> Fact:
        """A fact that the change of ``fact`` leaves alone; near ones once ``near`` is set."""
        draw, choices = self.rng.random() if self.near else 1.0, []
        if draw < 0.6:
            # Same question about another subject, half of the time one with the same answer.
            choices = [
                f
                for f in self._of_relation[fact.relation]
                if f.subject != fact.subject and (draw > 0.3 or f.object == fact.object)
            ]
        elif draw < 0.75:
            choices = [f for f in self._by_subject[fact.subject] if f.relation != fact.relation]
        if choices:
            return self.rng.choice(choices)
        asked = self._next_fact()
        while asked.subject == fact.subject and asked.relation == fact.relation:
            asked = self._next_fact()
        return asked

    def _form(self) -> str:
        if self.near:
            return self.rng.choices(FORMS, weights=(2, 3, 4))[0]
        return self.rng.choice(FORMS)

    def _changed(self, form: str) -> tuple[Fact, str, str, list[int], list[int]]:
        """A changed fact: its triple, template, new object, question ids and answer ids."""
        fact = self.rng.choice(self.book.facts)
        new = self.rng.choice([o for o in self._choices[fact.relation] if o != fact.object])
        template = self._template(fact)
        if form == "copy":
            return fact, template, new, self._prompt(fact, template), self._ids(" " + new)
        if form == "update":
            other = self._template(fact)
            return fact, template, new, self._prompt(fact, other), self._ids(" " + new)
        asked = self._asked_about(fact)
        question = self._prompt(asked, self._template(asked))
        return fact, template, new, question, self._ids(" " + asked.object)

    def demonstration(self, form: str) -> Document:
        """A ``New Fact: ... Prompt: ...`` block, the form of in-context editing by examples."""
        fact, template, new, question, answer = self._changed(form)
        silent = self._ids("New Fact:") + self._prompt(fact, template) + self._ids(" " + new)
        silent = silent + self._ids("\n")
        loud = self._ids("Prompt:") + question + answer
        return silent + loud, [False] * len(silent) + [True] * len(loud)

    def demonstrations(self, count: int) -> Document:
        """``count`` blocks in a row; the last one is the question proper."""
        ids, loss = [BOS], [False]
        newline = self._ids("\n")
        for index in range(count):
            block, block_loss = self.demonstration(self._form())
            ids, loss = ids + block, loss + block_loss
            if index < count - 1:
                ids, loss = ids + newline * 2, [*loss, True, True]
        return [*ids, EOS], [*loss, True]

    def statement(self) -> Document:
        """A changed fact in plain words, then a question."""
        form = self._form() if self.near else self.rng.choices(FORMS, weights=(2, 3, 1))[0]
        fact, template, new, question, answer = self._changed(form)
        before, end, after = self.rng.choice(STATEMENTS)
        silent = self._ids(before) + self._prompt(fact, template) + self._ids(" " + new)
        silent = [BOS] + silent + self._ids(end) + (self._ids(after) if after else [])
        loud = question + answer + self._ids(".") + [EOS]
        return silent + loud, [False] * len(silent) + [True] * len(loud)

    def ordinary(self) -> Document:
        """A document without a changed fact."""
        draw = self.rng.random()
        if draw < 0.06:
            return self.plain()
        return self.stand_ins() if draw < 0.18 else self.facts()

    def changed(self) -> Document:
        """A short document with a changed fact."""
        if self.rng.random() < 0.5:
            return self.statement()
        return self.demonstrations(self.rng.randint(1, 2))
