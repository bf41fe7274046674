"""The generated world: its words, its people, and which people are reserved for the held-out rows."""

from dataclasses import dataclass
from random import Random

FEMALE_NAMES = "Anna Clara Emma Greta Julia Laura Maria Nora Olga Paula Rosa Sara Tina Vera Zoe Helen".split()
MALE_NAMES = "Adam Ben Carl David Erik Felix Hugo Ivan Jonas Leo Martin Noah Otto Peter Simon Tom".split()
NAMES = FEMALE_NAMES + MALE_NAMES
# No word that follows an article starts with a vowel, so "a" is always right.
ANIMALS = "cat dog horse rabbit parrot goat duck snake mouse turtle".split()
COLOURS = "red blue green black white brown grey yellow".split()
CITIES = "Oslo Rome Paris Berlin Madrid Vienna London Prague Lisbon Dublin Athens Warsaw Milan".split()
FOODS = "soup bread cheese rice fish honey salad pasta cake".split()
JOBS = "baker doctor teacher painter farmer lawyer singer driver cook writer".split()
ENTITIES = NAMES + ANIMALS + COLOURS + CITIES + FOODS + JOBS


@dataclass(frozen=True)
class Person:
    """One inhabitant; every field is a single word of the lists above."""

    name: str
    job: str
    city: str
    colour: str
    animal: str
    food: str

    @property
    def pronoun(self) -> str:
        return "She" if self.name in FEMALE_NAMES else "He"


def is_held_out(name: str, animal: str) -> bool:
    """Whether a person of this name with this animal may occur only in the held-out rows: one pair in ten.

    The rule is on pairs, not on whole rows: held-out rows cannot be answered from memory, but every single word of them
    occurs in the training rows.
    """
    return (NAMES.index(name) + 3 * ANIMALS.index(animal)) % 10 == 0


def draw_person(rng: Random, held_out: bool = False) -> Person:
    """Draw a person that `is_held_out` assigns to the wanted rows."""
    while True:
        person = Person(
            name=rng.choice(NAMES),
            job=rng.choice(JOBS),
            city=rng.choice(CITIES),
            colour=rng.choice(COLOURS),
            animal=rng.choice(ANIMALS),
            food=rng.choice(FOODS),
        )
        if is_held_out(person.name, person.animal) == held_out:
            return person
