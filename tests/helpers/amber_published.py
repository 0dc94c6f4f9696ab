"""AMBER's published scoring once more, image by image and list by list, to hold ``stethoscope.tasks.amber`` against.

Written from the description of the authors' procedure, on purpose without short cuts: flags in parallel
lists, every list searched from the front.
"""


def describe(answers, annotations, association, safe, nouns_of, alike):
    """CHAIR, Cover, Hal and Cog as fractions of descriptions.

    Args:
        answers: image id -> description.
        annotations: image id -> its annotation, with lists ``truth`` and ``hallu``.
        association: object -> words that stand for it.
        safe: words that are never wrong.
        nouns_of: description -> nouns of the vocabulary, every time they occur.
        alike: whether two words are taken for synonyms.
    """
    wrong = nouns_in_all = cover = cover_of = cog = cog_of = clean = 0
    for id_, text in answers.items():
        truth, hallu = annotations[id_]["truth"], annotations[id_]["hallu"]
        truth_flags, hallu_flags = [False] * len(truth), [False] * len(hallu)
        truth_words, truth_owner = _words(truth, association)
        hallu_words, hallu_owner = _words(hallu, association)
        wrong_here = 0
        for noun in nouns_of(text):
            nouns_in_all += 1
            if noun in safe:
                continue
            if noun in truth_words:
                truth_flags[truth_owner[truth_words.index(noun)]] = True
                continue
            if noun in hallu_words:
                hallu_flags[hallu_owner[hallu_words.index(noun)]] = True
            for position, word in enumerate(hallu_words):
                if alike(noun, word):
                    hallu_flags[hallu_owner[position]] = True
                    break
            excused = False
            for position, word in enumerate(truth_words):
                if alike(noun, word):
                    truth_flags[truth_owner[position]] = True
                    excused = True
                    break
            if not excused:
                wrong_here += 1
        wrong += wrong_here
        clean += wrong_here == 0
        cover, cover_of = cover + sum(truth_flags), cover_of + len(truth)
        cog, cog_of = cog + sum(hallu_flags), cog_of + len(hallu)
    hal = 1 - clean / len(answers)
    return {"chair": wrong / nouns_in_all, "cover": cover / cover_of, "hal": hal, "cog": cog / cog_of}


def _words(objects, association):
    """All words that stand for objects, first those associated with them, then their own; and whose each is."""
    words, owner = [], []
    for index, name in enumerate(objects):
        for word in association[name]:
            words.append(word)
            owner.append(index)
    for index, name in enumerate(objects):
        words.append(name)
        owner.append(index)
    return words, owner


def questions(answers, annotations):
    """Accuracy and F1 as fractions of answers to questions; any text but Yes and No is wrong."""
    correct = said_no = said_no_rightly = should_no = did_no = 0
    for id_, text in answers.items():
        truth = annotations[id_]["truth"]
        correct += text == {"yes": "Yes", "no": "No"}[truth]
        if truth == "no":
            should_no += 1
            did_no += text == "No"
        if text == "No":
            said_no += 1
            said_no_rightly += truth == "no"
    precision, recall = said_no_rightly / said_no, did_no / should_no
    return {"accuracy": correct / len(answers), "f1": 2 * precision * recall / (precision + recall)}
