"""The words of the grammar, in English and German. English singular and plural differ everywhere, and so do present
and past: an English sentence names its German one.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Gender = Literal["m", "f", "n"]
Case = Literal["nominative", "accusative", "dative"]


class Noun(NamedTuple):
    """weak: a masculine noun that takes its plural form in every singular case but the nominative."""

    singular: str
    plural: str
    gender: Gender
    german: str
    german_plural: str
    weak: bool = False


class Verb(NamedTuple):
    """third: third person singular; German's third person plural is its infinitive."""

    base: str
    third: str
    past: str
    infinitive: str
    german_third: str
    participle: str
    case: Case = "accusative"


class Modal(NamedTuple):
    """A verb that sends the main verb to the end as an infinitive."""

    singular: str
    plural: str
    german: str
    german_plural: str


PERSONS = (
    Noun("man", "men", "m", "Mann", "Männer"),
    Noun("woman", "women", "f", "Frau", "Frauen"),
    Noun("child", "children", "n", "Kind", "Kinder"),
    Noun("boy", "boys", "m", "Junge", "Jungen", weak=True),
    Noun("girl", "girls", "n", "Mädchen", "Mädchen"),
    Noun("king", "kings", "m", "König", "Könige"),
    Noun("queen", "queens", "f", "Königin", "Königinnen"),
    Noun("dog", "dogs", "m", "Hund", "Hunde"),
    Noun("cat", "cats", "f", "Katze", "Katzen"),
    Noun("horse", "horses", "n", "Pferd", "Pferde"),
)
THINGS = (
    Noun("book", "books", "n", "Buch", "Bücher"),
    Noun("house", "houses", "n", "Haus", "Häuser"),
    Noun("table", "tables", "m", "Tisch", "Tische"),
    Noun("lamp", "lamps", "f", "Lampe", "Lampen"),
    Noun("car", "cars", "n", "Auto", "Autos"),
    Noun("tree", "trees", "m", "Baum", "Bäume"),
    Noun("flower", "flowers", "f", "Blume", "Blumen"),
    Noun("letter", "letters", "m", "Brief", "Briefe"),
    Noun("picture", "pictures", "n", "Bild", "Bilder"),
    Noun("key", "keys", "m", "Schlüssel", "Schlüssel"),
    Noun("bag", "bags", "f", "Tasche", "Taschen"),
    Noun("apple", "apples", "m", "Apfel", "Äpfel"),
)
LOCATIONS = (
    Noun("garden", "gardens", "m", "Garten", "Gärten"),
    Noun("city", "cities", "f", "Stadt", "Städte"),
    Noun("village", "villages", "n", "Dorf", "Dörfer"),
    Noun("school", "schools", "f", "Schule", "Schulen"),
    Noun("forest", "forests", "m", "Wald", "Wälder"),
    Noun("room", "rooms", "n", "Zimmer", "Zimmer"),
)
ADJECTIVES = (
    ("big", "groß"),
    ("small", "klein"),
    ("old", "alt"),
    ("new", "neu"),
    ("beautiful", "schön"),
    ("red", "rot"),
    ("black", "schwarz"),
    ("quiet", "ruhig"),
)
ACTIONS = (
    Verb("see", "sees", "saw", "sehen", "sieht", "gesehen"),
    Verb("buy", "buys", "bought", "kaufen", "kauft", "gekauft"),
    Verb("find", "finds", "found", "finden", "findet", "gefunden"),
    Verb("paint", "paints", "painted", "malen", "malt", "gemalt"),
    Verb("carry", "carries", "carried", "tragen", "trägt", "getragen"),
    Verb("love", "loves", "loved", "lieben", "liebt", "geliebt"),
)
FAVORS = (
    Verb("help", "helps", "helped", "helfen", "hilft", "geholfen", "dative"),
    Verb("thank", "thanks", "thanked", "danken", "dankt", "gedankt", "dative"),
    Verb("answer", "answers", "answered", "antworten", "antwortet", "geantwortet", "dative"),
)
GIFTS = (
    Verb("give", "gives", "gave", "geben", "gibt", "gegeben"),
    Verb("show", "shows", "showed", "zeigen", "zeigt", "gezeigt"),
    Verb("send", "sends", "sent", "schicken", "schickt", "geschickt"),
)
STATES = (
    Verb("sleep", "sleeps", "slept", "schlafen", "schläft", "geschlafen"),
    Verb("laugh", "laughs", "laughed", "lachen", "lacht", "gelacht"),
    Verb("work", "works", "worked", "arbeiten", "arbeitet", "gearbeitet"),
    Verb("wait", "waits", "waited", "warten", "wartet", "gewartet"),
)
THOUGHTS = (
    Verb("know", "knows", "knew", "wissen", "weiß", "gewusst"),
    Verb("say", "says", "said", "sagen", "sagt", "gesagt"),
    Verb("believe", "believes", "believed", "glauben", "glaubt", "geglaubt"),
)
MODALS = (
    Modal("can", "can", "kann", "können"),
    Modal("must", "must", "muss", "müssen"),
    Modal("wants to", "want to", "will", "wollen"),
)

TIMES = {
    "present": (("today", "heute"), ("now", "jetzt"), ("often", "oft")),
    "past": (("yesterday", "gestern"), ("today", "heute")),
    "modal": (("today", "heute"), ("tomorrow", "morgen")),
}
PREPOSITIONS = (("in", "in"), ("near", "bei"), ("behind", "hinter"))
"""All take the dative."""

Determiner = Literal["the", "a", "this", "my", "two"]

DETERMINER_ENDINGS: dict[Case, dict[str, str]] = {
    "nominative": {"m": "er", "f": "e", "n": "es", "plural": "e"},
    "accusative": {"m": "en", "f": "e", "n": "es", "plural": "e"},
    "dative": {"m": "em", "f": "er", "n": "em", "plural": "en"},
}
DEFINITE_ARTICLES: dict[Case, dict[str, str]] = {
    "nominative": {"m": "der", "f": "die", "n": "das", "plural": "die"},
    "accusative": {"m": "den", "f": "die", "n": "das", "plural": "die"},
    "dative": {"m": "dem", "f": "der", "n": "dem", "plural": "den"},
}
