"""Class names: the one spelling they are compared in, the checks they must pass, the words they consist of."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sized

from models.errors import InvalidInput

MAX_NAMES = 100_000
MAX_LENGTH = 256

_SEPARATORS = re.compile(r"[\s_+\-./\u2010-\u2015\u2212]+")
_INDEX_PREFIX = re.compile(r"^\d{1,6}\.\s*(?=[^\W\d_])")  # '002.Laysan_Albatross'
_BIDI_CONTROLS = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_FORBIDDEN_CATEGORIES = frozenset({"Cc", "Cs", "Zl", "Zp"})


def normalize_class_name(name: str) -> str:
    """The spelling in which names are compared: NFKC, case-folded, separators ``_ + - . /`` and spaces as one space.

    'Persian+Cat', 'persian_cat' and ' persian-cat' are the same class. Idempotent; '' for a name of separators only.
    """
    folded = name.lower() if name.isascii() else _fold(name)
    return _SEPARATORS.sub(" ", folded).strip()


def _fold(text: str) -> str:
    """Unicode's NFKC_Casefold: repeated, since folding can undo a normal form; invisible format characters dropped."""
    for _ in range(4):
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        folded = "".join(c for c in folded if unicodedata.category(c) != "Cf")
        if folded == text:
            break
        text = folded
    return text


def strip_index(name: str) -> str:
    """`name` without a leading class number: '002.Laysan_Albatross' is 'Laysan_Albatross'."""
    return _INDEX_PREFIX.sub("", name.strip())


def readable_name(name: str) -> str:
    """`name` for people and text encoders: no class number, separators as spaces, case kept."""
    return _SEPARATORS.sub(" ", strip_index(name)).strip()


def tokens_of(name: str) -> tuple[str, ...]:
    """The words of `name` in its own case: 'grizzly_bear' -> ('grizzly', 'bear'); a leading class number is dropped."""
    return tuple(readable_name(name).split())


def split_words(token: str) -> tuple[str, ...]:
    """Fall-back for an unknown token: cut where case or digits change ('PolarBear', 'HTTPServer', 'boeing747')."""
    cuts = [0]
    for i in range(1, len(token)):
        before, here, after = token[i - 1], token[i], token[i + 1 : i + 2]
        camel = here.isupper() and (before.islower() or (before.isupper() and after.islower()))
        if camel or (before.isdigit() != here.isdigit() and before.isalnum() and here.isalnum()):
            cuts.append(i)
    return tuple(token[a:b] for a, b in zip(cuts, [*cuts[1:], len(token)], strict=True) if a < b)


def validate_class_names(
    names: Iterable[str], *, max_count: int = MAX_NAMES, max_length: int = MAX_LENGTH, field: str = "class_names"
) -> tuple[str, ...]:
    """`names` without surrounding spaces, in order. They must differ after `normalize_class_name`.

    Raises InvalidInput, with the position in `field`, for: too many; no string; empty; control characters;
    longer than `max_length`; nothing but separators; two spellings of the same name.
    """
    if isinstance(names, (str, bytes)):
        raise InvalidInput(f"{field} must be a list of names, not one string.", field=field)
    if isinstance(names, Sized) and len(names) > max_count:
        raise InvalidInput(f"{field} has {len(names)} names; at most {max_count} are allowed.", field=field)
    accepted: list[str] = []
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        if index >= max_count:
            raise InvalidInput(f"{field} has more than the {max_count} names that are allowed.", field=field)
        clean, key = _check_name(name, max_length, f"{field}/{index}")
        if (first := seen.setdefault(key, index)) != index:
            raise InvalidInput(
                f"Class names {quote(accepted[first])} (position {first}) and {quote(clean)} (position {index}) are "
                f"the same name once case and separators are ignored. Rename or remove one of them.",
                field=f"{field}/{index}",
            )
        accepted.append(clean)
    return tuple(accepted)


def _check_name(name: object, max_length: int, where: str) -> tuple[str, str]:
    """(trimmed name, normalised name) of one entry."""
    if not isinstance(name, str):
        raise InvalidInput(f"The class name at {where} is a {type(name).__name__}, not a string.", field=where)
    clean = name.strip()
    if not clean:
        raise InvalidInput(f"The class name at {where} is empty. Give every class a name.", field=where)
    if not name.isprintable() and (bad := next(_control_characters(name), None)) is not None:
        raise InvalidInput(
            f"The class name {quote(name)} at {where} contains the control character U+{ord(bad[1]):04X} at character "
            f"{bad[0]}. Remove it.",
            field=where,
        )
    if len(clean) > max_length:
        raise InvalidInput(
            f"The class name {quote(clean)} at {where} has {len(clean)} characters; at most {max_length} are allowed.",
            field=where,
        )
    key = normalize_class_name(clean)
    if not key:
        raise InvalidInput(
            f"The class name {quote(clean)} at {where} consists of separators only. Use letters or digits.", field=where
        )
    return clean, key


def _control_characters(name: str) -> Iterator[tuple[int, str]]:
    for i, c in enumerate(name):
        if c in _BIDI_CONTROLS or unicodedata.category(c) in _FORBIDDEN_CATEGORIES:
            yield i, c


def quote(name: str, limit: int = 48) -> str:
    """`name` for an error message: repr, cut after `limit` characters."""
    return repr(name) if len(name) <= limit else repr(name[:limit] + "…")


# --- singular and plural ---------------------------------------------------------------------------------------------

_IRREGULAR = {
    "mouse": "mice", "louse": "lice", "goose": "geese", "man": "men", "woman": "women", "child": "children",
    "foot": "feet", "tooth": "teeth", "ox": "oxen", "person": "people", "die": "dice", "cactus": "cacti",
    "fungus": "fungi", "octopus": "octopuses", "larva": "larvae", "bacterium": "bacteria", "alga": "algae",
    "leaf": "leaves", "loaf": "loaves", "wolf": "wolves", "calf": "calves", "half": "halves", "shelf": "shelves",
    "elf": "elves", "thief": "thieves", "sheaf": "sheaves", "hoof": "hooves", "scarf": "scarves", "wharf": "wharves",
    "knife": "knives", "wife": "wives", "life": "lives", "bus": "buses", "lens": "lenses", "gas": "gases",
    "quiz": "quizzes", "axis": "axes", "crisis": "crises", "nucleus": "nuclei", "stimulus": "stimuli",
    "potato": "potatoes", "tomato": "tomatoes", "buffalo": "buffaloes", "mosquito": "mosquitoes",
}  # fmt: skip
_IRREGULAR_SINGULAR = {plural: singular for singular, plural in _IRREGULAR.items()}
_SUFFIX_WORDS = ("woman", "man", "mouse", "goose", "child", "foot", "tooth", "wolf", "knife", "leaf")


def number_variants(word: str) -> tuple[tuple[str, str], ...]:
    """Other grammatical numbers of a normalised English word: ('singular' | 'plural', form), likeliest first.

    'boxes' -> singular box, boxe; 'mouse' -> plural mice, mouses. Simple rules: callers keep only forms they know.
    """
    singulars = _singulars(word)
    plurals = _plurals(word)
    forms = [("singular", s) for s in singulars] + [("plural", p) for p in plurals]
    return tuple(dict.fromkeys((kind, form) for kind, form in forms if form != word and len(form) > 1))


def _singulars(word: str) -> list[str]:
    if word.endswith(("'s", "\u2019s")):
        return [word[:-2]]
    if word in _IRREGULAR_SINGULAR:
        return [_IRREGULAR_SINGULAR[word]]
    for singular in _SUFFIX_WORDS:  # firewomen, dormice
        plural = _IRREGULAR.get(singular, "")
        if plural and word.endswith(plural):
            return [word[: -len(plural)] + singular]
    if word.endswith("ies") and len(word) > 4:
        return [word[:-3] + "y", word[:-1]]
    if word.endswith("ves"):
        return [word[:-3] + "f", word[:-3] + "fe", word[:-1]]
    if word.endswith(("ches", "shes", "xes", "sses", "zes", "oes", "uses")):
        return [word[:-2], word[:-1]]
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return [word[:-1]]
    return []


def _plurals(word: str) -> list[str]:
    if word in _IRREGULAR:
        return [_IRREGULAR[word], word + "s"]
    for singular in _SUFFIX_WORDS:
        plural = _IRREGULAR.get(singular, "")
        if plural and word.endswith(singular):
            return [word[: -len(singular)] + plural, word + "s"]
    if word.endswith("y") and word[-2:-1] not in ("a", "e", "i", "o", "u", ""):
        return [word[:-1] + "ies"]
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return [word + "es"]
    if word.endswith("f"):
        return [word + "s", word[:-1] + "ves"]
    return [word + "s"] if word[-1:].isalpha() else []
