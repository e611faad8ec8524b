"""Rows that people wrote and judged, for specialists: film reviews, mail, names in sentences.

Nothing of them is in the repository: they come in packages that `other_peoples_files` pins.
Each task gives all its rows in one fixed order, so that the first ones can be held out.
"""

from __future__ import annotations

import email
import email.policy
import html
import random
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser

from other_peoples_files import (
    as_written,
    brown_documents_tagged,
    rated_film_reviews,
    spam_assassin,
)

Row = dict[str, str]
_MAIL_WORDS = 50
_SENTENCE_WORDS = (6, 30)


def film_reviews() -> list[Row]:
    """10,605 sentences from Rotten Tomatoes, rated by twenty people from -4 to 4. Those that are
    between the two are left out."""
    return _in_order(
        {
            "prompt": f"Is this film review positive or negative?\n{html.unescape(text)}",
            "completion": "positive" if rating > 0 else "negative",
        }
        for text, rating in rated_film_reviews()
        if abs(rating) >= 0.5
    )


def mail() -> list[Row]:
    """SpamAssassin's public corpus, hard ham with it: subject and first words."""
    return _in_order(
        {
            "prompt": f"Is this mail spam? Answer yes or no.\n{_beginning(text)}",
            "completion": "yes" if group.startswith("spam") else "no",
        }
        for group, text in spam_assassin()
    )


def names() -> list[Row]:
    """Sentences of the Brown corpus and the proper names that its editors marked in them; a fifth
    of the rows have none, where they are two thirds of the corpus."""
    rows = _in_order(
        {
            "prompt": f"List the proper names.\n{sentence}",
            "completion": ", ".join(found) or "none",
        }
        for document in brown_documents_tagged()
        for sentence, found in _sentences(document)
    )
    without = [row for row in rows if row["completion"] == "none"]
    dropped = {row["prompt"] for row in without[(len(rows) - len(without)) // 4 :]}
    return [row for row in rows if row["prompt"] not in dropped]


TASKS: dict[str, Callable[[], list[Row]]] = {
    "film reviews": film_reviews,
    "spam": mail,
    "names": names,
}


def _in_order(rows: Iterator[Row]) -> list[Row]:
    """Each prompt once, shuffled alike every time."""
    different = list({row["prompt"]: row for row in rows}.values())
    random.Random(0).shuffle(different)
    return different


def _beginning(text: str) -> str:
    message = email.message_from_string(text, policy=email.policy.compat32)
    part = next((p for p in message.walk() if p.get_content_maintype() == "text"), message)
    payload = part.get_payload(decode=True)
    body = payload.decode("latin-1") if isinstance(payload, bytes) else ""
    if part.get_content_subtype() == "html":
        body = _without_tags(body)
    words = [word for word in body.split() if len(word) < 30][:_MAIL_WORDS]
    return f"{str(message.get('subject', '')).strip()}\n{' '.join(words)}"


def _without_tags(page: str) -> str:
    parser = _Text()
    parser.feed(page)
    return " ".join(parser.pieces)


class _Text(HTMLParser):
    """Keeps what stands between the tags."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)


def _sentences(document: str) -> Iterator[tuple[str, list[str]]]:
    """(a sentence as people write it, the names in it) of a text with tags: `Paris/np is/bez`."""
    for line in re.split(r"(?<=\./\.)\s", document):
        tagged = [word.rsplit("/", 1) for word in line.split() if "/" in word]
        if not _SENTENCE_WORDS[0] <= len(tagged) <= _SENTENCE_WORDS[1]:
            continue
        found: list[str] = []
        within = False
        for word, tag in tagged:
            if is_name := bool(re.match(r"np(?!s)", tag)):
                plain = word.removesuffix("'s").removesuffix("'")
                found[-1:] = [f"{found[-1]} {plain}"] if within else [*found[-1:], plain]
            within = is_name and not tag.startswith("np$")
        yield as_written(word for word, _ in tagged), list(dict.fromkeys(found))
