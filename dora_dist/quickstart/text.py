"""The quickstart's two texts: documents for pretraining the backbone, and rows for tuning it.

Pretraining documents state each fact several times in different words, which teaches a small model to copy from its
context. The instructions ask for four output formats that no pretraining document has.
"""

from collections.abc import Iterator
from random import Random

from dora_dist.quickstart.world import ENTITIES, NAMES, Person, draw_person

# Words of the answers and of the prompt; those that start a line come first. The backbone sees most of them only in
# word lists. A token that is never seen would keep a random embedding and a suppressed output row, which an adapter on
# the linear layers cannot repair.
FIRST_WORDS = "Name Lost Dear Answer Write Make Fill The Who Which Where What".split()
LATER_WORDS = (
    "job city pet food lost call in thank you for greetings to and not the note who has lives letter card "
    "of this text person Instruction Input Response"
).split()

PET_SENTENCES = (
    "{name} has a {colour} {animal}.",
    "The {colour} {animal} belongs to {name}.",
    "The pet of {name} is a {colour} {animal}.",
)
CITY_SENTENCES = ("{name} lives in {city}.", "The home of {name} is {city}.", "{name} goes to {city}.")
JOB_SENTENCES = ("{name} is a {job}.", "{name} works as a {job}.", "{name} is the {job}.")
FOOD_SENTENCES = ("{name} likes {food}.", "{name} often eats {food}.", "{name} buys the {food}.")
FACTS = (PET_SENTENCES, CITY_SENTENCES, JOB_SENTENCES, FOOD_SENTENCES)

# None of these starts with a name: at the start of a line, a word has another piece (without the word mark) than inside
# one, so an answer would have to translate the piece instead of copying it.
FULL_SENTENCES = (
    "This is {name}, a {job} from {city}. {pronoun} has a {colour} {animal} and likes {food}.",
    "In {city} lives {name}, who works as a {job}, likes {food} and has a {colour} {animal}.",
    "The {job} {name} from {city} likes {food}. The {colour} {animal} belongs to {name}.",
)
QUESTIONS = (
    "Where does {name} live? In {city}.",
    "What does {name} like? It is {food}.",
    "What is the job of {name}? It is {job}.",
    "Who has the {animal}? It is {name}.",
    "Who lives in {city}? It is {name}.",
    "Who is the {job}? It is {name}.",
    "Who likes {food}? It is {name}.",
    "What does {name} have? A {colour} {animal}.",
)


def _say(sentence: str, person: Person) -> str:
    return sentence.format(pronoun=person.pronoun, **vars(person))


def _portrait(rng: Random) -> str:
    """One person as keywords in two random orders, then in full, fact by fact, and in questions.

    The keyword lines are what starts the copying: most of their second half can only be predicted by looking back.
    """
    person = draw_person(rng)
    keywords = [rng.sample(list(vars(person).values()), 6) for _ in range(2)]
    facts = [rng.choice(sentences) for sentences in rng.sample(FACTS, len(FACTS))]
    parts = [[rng.choice(FULL_SENTENCES)], facts, rng.sample(QUESTIONS, 3)]
    rng.shuffle(parts)
    told = [" ".join(_say(sentence, person) for sentence in part) for part in parts]
    return "\n".join([" ".join(words) for words in keywords] + told)


def _word_list(rng: Random) -> str:
    """A list of random words, given twice: only copying can predict the second half."""
    if rng.random() < 0.3:
        words = rng.sample(FIRST_WORDS + NAMES, rng.randint(3, 8))
        separator = "\n"
    else:
        words = rng.sample(FIRST_WORDS + LATER_WORDS + ENTITIES, rng.randint(4, 12))
        separator = rng.choice((", ", " ", "; ", ": "))
    line = separator.join(words)
    return f"{line}\n{line}"


def pretraining_documents(seed: int, count: int) -> Iterator[str]:
    """Yield `count` documents of two to five lines; none has a person of the held-out rows."""
    rng = Random(f"pretraining {seed}")
    for _ in range(count):
        yield _portrait(rng) if rng.random() < 0.9 else _word_list(rng)


RECORD_INSTRUCTIONS = ("Fill in the card of this person.", "Write the card for this text.")
NOTICE_INSTRUCTIONS = ("Write a note: the pet is lost.", "The pet is lost. Make a note.")
LETTER_INSTRUCTIONS = ("Write a letter to this person.", "Make a letter to thank this person.")
ANSWER_INSTRUCTIONS = ("Who has the pet?", "Which person has the pet?")

RECORD = "Name: {name}; job: {job}; city: {city}; pet: {colour} {animal}; food: {food}"
NOTICE = "Lost: {colour} {animal}; call {name} the {job} in {city}."
LETTER = "Dear {name}, thank you for the {food} and greetings to {city} and to the {colour} {animal}."
ANSWER = "Answer: {name}, the {job} of {city}, and not the {animal}."
KINDS = (
    (RECORD_INSTRUCTIONS, RECORD),
    (NOTICE_INSTRUCTIONS, NOTICE),
    (LETTER_INSTRUCTIONS, LETTER),
    (ANSWER_INSTRUCTIONS, ANSWER),
)


def _draw_row(rng: Random, held_out: bool) -> dict[str, str]:
    """A row about one person: the output restates the text in the words and order of its kind."""
    person = draw_person(rng, held_out)
    instructions, output = rng.choice(KINDS)
    return {
        "instruction": rng.choice(instructions),
        "input": _say(rng.choice(FULL_SENTENCES), person),
        "output": _say(output, person),
    }


def instruction_rows(seed: int, count: int, held_out: bool = False) -> list[dict[str, str]]:
    """Return `count` different alpaca rows (instruction, input, output) of held-out or other people."""
    rng = Random(f"instructions {seed} {held_out}")
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    while len(rows) < count:
        row = _draw_row(rng, held_out)
        rows.setdefault(tuple(row.values()), row)
    return list(rows.values())
