"""What several tests of tasks share."""

from stethoscope.records import Answer

QUESTIONS = [
    {"question_id": 1, "image": "a.png", "text": "Is there a dog in the image?", "label": "yes"},
    {"question_id": 2, "image": "a.png", "text": "Is there a fire hydrant in the image?", "label": "no"},
    {"question_id": 3, "image": "b.png", "text": "Is there an apple in the image?", "label": "Yes"},
]


def reply(text: str, finished: bool = True) -> Answer:
    """An answer of one token."""
    return Answer(text, (1,), ((0, len(text)),), (0.0,), finished)
