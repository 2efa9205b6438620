"""Plain talk: short questions and answers about everyday things, so that words stay words.

Made by rules from small tables, every answer correct; a few hundred pairs in a millisecond.
"""

import numpy as np

_OPPOSITES = """\
hot cold, tall short, fast slow, day night, happy sad, open closed, early late, hard soft, light
dark, full empty, old new, rich poor, wet dry, loud quiet, strong weak, near far, wide narrow,
thick thin, heavy light, clean dirty, always never, inside outside, win lose, push pull"""
_CAPITALS = """\
France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, Japan Tokyo, China
Beijing, India Delhi, Egypt Cairo, Kenya Nairobi, Canada Ottawa, Brazil Brasilia, Chile
Santiago, Peru Lima, Cuba Havana, Norway Oslo, Sweden Stockholm, Finland Helsinki, Denmark
Copenhagen, Poland Warsaw, Austria Vienna, Hungary Budapest, Greece Athens, Turkey Ankara,
Russia Moscow, Ireland Dublin, Belgium Brussels, Thailand Bangkok, Vietnam Hanoi, Australia
Canberra, Iran Tehran, Iraq Baghdad, Ghana Accra, Ukraine Kyiv, Romania Bucharest, Bulgaria
Sofia, Croatia Zagreb"""
_PLURALS = """\
cat cats, dog dogs, child children, mouse mice, foot feet, tooth teeth, box boxes, leaf leaves,
city cities, woman women, man men, goose geese, knife knives, baby babies, bus buses, sheep
sheep"""
_YOUNG = """\
dog puppy, cat kitten, cow calf, horse foal, sheep lamb, hen chick, duck duckling, bear cub,
goat kid, frog tadpole, pig piglet, goose gosling"""
_PAST = """\
go went, see saw, eat ate, run ran, write wrote, sing sang, think thought, buy bought, come
came, give gave, take took, find found, make made, know knew, speak spoke, swim swam"""
_WORDS = """\
house river garden window bread music letter summer forest planet pencil doctor silver monkey
market bottle dragon flower castle winter orange bridge island rocket"""
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
_MONTHS = "January February March April May June July August September October November December"
_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve"
_FACTS = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hi there.", "Hi! What can I do for you?"),
    ("Good morning.", "Good morning! How can I help you today?"),
    ("Good evening!", "Good evening! What can I do for you?"),
    ("How are you?", "I am fine, thank you. How are you?"),
    ("Thank you!", "You are welcome."),
    ("Thanks a lot.", "You are welcome. Is there anything else?"),
    ("Goodbye.", "Goodbye! Have a nice day."),
    ("See you later.", "See you later!"),
    (
        "What can you do?",
        "I can talk, and I can take in and make pictures, videos and sounds.",
    ),
    ("Who are you?", "I am an assistant that works with text, pictures, videos and sounds."),
    ("Can you help me?", "Yes, of course. What do you need?"),
    ("What colour is the sky on a clear day?", "The sky is blue."),
    ("What colour is grass?", "Grass is green."),
    ("What colour is snow?", "Snow is white."),
    ("What colour is a ripe lemon?", "A ripe lemon is yellow."),
    ("What colour do blue and yellow paint make?", "They make green."),
    ("What colour do red and yellow paint make?", "They make orange."),
    ("What colour do red and blue paint make?", "They make purple."),
    ("How many days are there in a week?", "There are seven days in a week."),
    ("How many months are there in a year?", "There are twelve months in a year."),
    ("How many hours are there in a day?", "There are 24 hours in a day."),
    ("How many minutes are there in an hour?", "There are 60 minutes in an hour."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("How many legs does an insect have?", "An insect has six legs."),
    ("How many wheels does a bicycle have?", "A bicycle has two wheels."),
    ("How many sides does a triangle have?", "A triangle has three sides."),
    ("How many corners does a square have?", "A square has four corners."),
    ("What do bees make?", "Bees make honey."),
    ("What do cows give us to drink?", "Cows give us milk."),
    ("What is ice made of?", "Ice is frozen water."),
    ("At what temperature does water boil?", "Water boils at 100 degrees Celsius at sea level."),
    ("At what temperature does water freeze?", "Water freezes at 0 degrees Celsius."),
    ("Which planet do we live on?", "We live on the Earth."),
    ("What does the Earth go around?", "The Earth goes around the Sun."),
    ("Which is the largest ocean?", "The largest ocean is the Pacific Ocean."),
    ("Which is the largest planet of the solar system?", "The largest planet is Jupiter."),
    ("What do plants need to grow?", "Plants need light, water and air."),
    ("What do we use an umbrella for?", "An umbrella keeps us dry in the rain."),
    ("Where do fish live?", "Fish live in water."),
    ("Name three fruits.", "Apples, pears and bananas are fruits."),
    ("Name three vegetables.", "Carrots, onions and peas are vegetables."),
    ("Name the four seasons.", "Spring, summer, autumn and winter."),
    ("Name three musical instruments.", "The piano, the violin and the guitar."),
)


def plain_talk(rng: np.random.Generator, most: int) -> list[tuple[str, str]]:
    """At most `most` pairs of question and answer, no question twice, in random order."""
    pairs = dict([*_FACTS, *_language(), *_order(), *_sums(rng)])
    items = list(pairs.items())
    return [items[index] for index in rng.permutation(len(items))[:most]]


def _pairs(table: str) -> list[tuple[str, str]]:
    return [(entry.split()[0], entry.split()[1]) for entry in table.split(",")]


def _language() -> list[tuple[str, str]]:
    found = []
    for one, other in _pairs(_OPPOSITES):
        found.append((f"What is the opposite of {one}?", f"The opposite of {one} is {other}."))
    for country, city in _pairs(_CAPITALS):
        found.append((f"What is the capital of {country}?", f"The capital of {country} is {city}."))
        found.append((f"{city} is the capital of which country?", f"{city} is in {country}."))
    for one, many in _pairs(_PLURALS):
        found.append((f"What is the plural of {one}?", f"The plural of {one} is {many}."))
    for animal, young in _pairs(_YOUNG):
        found.append(
            (f"What is a young {animal} called?", f"A young {animal} is called a {young}.")
        )
    for verb, past in _pairs(_PAST):
        question = f"What is the past tense of {verb}?"
        found.append((question, f"The past tense of {verb} is {past}."))
    for word in _WORDS.split():
        spelt = "-".join(word.upper())
        found.append((f"How do you spell {word}?", f"It is spelt {spelt}."))
        found.append((f"What letter does {word} begin with?", f"It begins with {word[0].upper()}."))
        found.append((f"How many letters are in the word {word}?", f"It has {len(word)} letters."))
    return found


def _order() -> list[tuple[str, str]]:
    found = []
    for names in (_DAYS.split(), _MONTHS.split()):
        for index, name in enumerate(names):
            after = names[(index + 1) % len(names)]
            found.append((f"What comes after {name}?", f"{after} comes after {name}."))
            found.append((f"What comes before {after}?", f"{name} comes before {after}."))
    for number, word in enumerate(_NUMBERS.split()):
        found.append((f"Write {number} as a word.", f"{word.capitalize()}."))
    for letter, following in zip(
        "ABCDEFGHIJKLMNOPQRSTUVWXY", "BCDEFGHIJKLMNOPQRSTUVWXYZ", strict=True
    ):
        found.append((f"Which letter follows {letter}?", f"{following} follows {letter}."))
    return found


def _sums(rng: np.random.Generator) -> list[tuple[str, str]]:
    found = []
    for _ in range(60):
        a, b = (int(n) for n in rng.integers(1, 20, size=2))
        low, high = sorted((a, b))
        found.append((f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."))
        found.append((f"What is {high} minus {low}?", f"{high} minus {low} is {high - low}."))
        small = (a % 10 + 1, b % 10 + 1)
        product = f"{small[0]} times {small[1]}"
        found.append((f"What is {product}?", f"{product} is {small[0] * small[1]}."))
        if low != high:
            question = f"Which number is larger, {a} or {b}?"
            found.append((question, f"{high} is larger than {low}."))
    return found
